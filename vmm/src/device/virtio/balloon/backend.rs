#![forbid(unsafe_code)]
//! The host's side of a balloon: how large it is to be, how large the guest says it is, and what the guest
//! says of its memory.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Statistics by their tags, as QEMU calls them.
pub const STATS: [&str; 16] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
];

/// What the guest says of its memory, in the order of [`STATS`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// A value each, where the guest has said it.
    pub values: [Option<u64>; STATS.len()],
    /// Seconds since 1970 when it said so; 0 while it has not.
    pub last_update: u64,
}

/// Who hears how many pages the guest has given away.
pub type OnChange = Box<dyn Fn(u32) + Send>;

/// The way to a balloon, for whoever has the machine.
#[derive(Clone)]
pub struct BalloonPort(Arc<Place>);

struct Place {
    wishes: Mutex<Wishes>,
    /// Readable when a wish has changed; `None` where the system gives none.
    events: Option<Events>,
}

struct Events {
    all: Arc<OwnedFd>,
    bell: OwnedFd,
    timer: OwnedFd,
}

#[derive(Default)]
struct Wishes {
    /// What the device has not taken in yet.
    target_pages: Option<u32>,
    /// What it had when it was saved.
    restored_target_pages: Option<u32>,
    actual_pages: u32,
    stats: Stats,
    on_change: Option<OnChange>,
}

impl fmt::Debug for BalloonPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonPort")
            .field("actual_pages", &self.actual_pages())
            .finish_non_exhaustive()
    }
}

impl Default for BalloonPort {
    fn default() -> Self {
        let events = Events::new();
        if let Err(error) = &events {
            tracing::error!("a balloon cannot be told of wishes while its machine runs: {error}");
        }
        Self(Arc::new(Place {
            wishes: Mutex::default(),
            events: events.ok(),
        }))
    }
}

impl Events {
    fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [&bell, &timer] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&all, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            all: Arc::new(all),
            bell,
            timer,
        })
    }
}

impl BalloonPort {
    /// How many pages of 4 KiB the guest is to give away. It hears of it when its machine runs.
    pub fn set_target(&self, pages: u32) {
        self.wishes().target_pages = Some(pages);
        self.ring();
    }

    /// How many pages the guest says that it has given away.
    pub fn actual_pages(&self) -> u32 {
        self.wishes().actual_pages
    }

    /// What the guest last said of its memory.
    pub fn stats(&self) -> Stats {
        self.wishes().stats
    }

    /// Asks the guest for statistics so often from now on; zero for never.
    pub fn set_interval(&self, interval: Duration) {
        let Some(events) = &self.0.events else {
            return;
        };
        let time = Timespec {
            tv_sec: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let timer = Itimerspec {
            it_interval: time,
            it_value: time,
        };
        if let Err(error) = timerfd_settime(&events.timer, TimerfdTimerFlags::empty(), &timer) {
            tracing::warn!("the guest is not asked for statistics: {error}");
        }
    }

    /// Has somebody hear how many pages the guest has given away, whenever it says so.
    pub fn on_change(&self, hear: OnChange) {
        self.wishes().on_change = Some(hear);
    }

    /// Readable when there is something to take in.
    pub(super) fn source(&self) -> Option<Arc<OwnedFd>> {
        self.0.events.as_ref().map(|events| Arc::clone(&events.all))
    }

    /// Takes in a new target, and whether the guest is to be asked for statistics.
    pub(super) fn look(&self) -> (Option<u32>, bool) {
        let target = self.wishes().target_pages.take();
        let Some(events) = &self.0.events else {
            return (target, false);
        };
        let drain = |fd: &OwnedFd| rustix::io::read(fd, &mut [0; 8]).is_ok();
        drain(&events.bell);
        (target, drain(&events.timer))
    }

    /// The guest has given away so many pages.
    pub(super) fn changed(&self, pages: u32) {
        let mut wishes = self.wishes();
        wishes.actual_pages = pages;
        if let Some(hear) = &wishes.on_change {
            hear(pages);
        }
    }

    /// A device was saved with so many pages given away, and so many to be: nobody hears of it.
    pub(super) fn restored(&self, actual_pages: u32, target_pages: u32) {
        let mut wishes = self.wishes();
        wishes.actual_pages = actual_pages;
        wishes.restored_target_pages = Some(target_pages);
    }

    /// How many pages were to be given away when the device was saved, of one that was.
    pub fn restored_target_pages(&self) -> Option<u32> {
        self.wishes().restored_target_pages
    }

    /// A target that the device has not taken in yet.
    pub(super) fn next_target_pages(&self) -> Option<u32> {
        self.wishes().target_pages
    }

    /// The guest says this of its memory.
    pub(super) fn said(&self, stats: Stats) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.wishes().stats = Stats {
            last_update: now.map_or(0, |now| now.as_secs()),
            ..stats
        };
    }

    fn ring(&self) {
        if let Some(events) = &self.0.events {
            // Full: it is readable.
            let _ = rustix::io::write(&events.bell, &1_u64.to_ne_bytes());
        }
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
