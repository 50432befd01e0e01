//! A shared pager that keeps what it tells.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pando_pager::source::faulty::{FaultPlan, Faulty};
use pando_pager::source::{PageRead, PageSource, ReadDone, ReadPort, Started};
use pando_pager::{ClientEvent, IoMode, SharedOptions, SharedPager};

/// Events in the order in which they were told.
pub(crate) type Told = Arc<Mutex<Vec<ClientEvent>>>;
/// Images in the order in which reads of them were started.
pub(crate) type Log = Arc<Mutex<Vec<usize>>>;

/// Options with a plan around the source, and a log of its reads.
pub(crate) fn shared_options(io: IoMode, plan: FaultPlan) -> (SharedOptions, Log) {
    let log = Log::default();
    let kept = Arc::clone(&log);
    let options = SharedOptions {
        io,
        decorate: Some(Arc::new(move |inner| {
            let inner = Box::new(Faulty::new(inner, plan.clone()));
            let log = Arc::clone(&kept);
            Box::new(Logged { inner, log })
        })),
        ..SharedOptions::default()
    };
    (options, log)
}

pub(crate) fn start(options: SharedOptions) -> (SharedPager, Told) {
    let told = Told::default();
    let kept = Arc::clone(&told);
    let listener = Arc::new(move |event| kept.lock().unwrap().push(event));
    (SharedPager::start(options, listener).unwrap(), told)
}

/// Every read delayed.
pub(crate) fn slow(delay: Duration) -> FaultPlan {
    FaultPlan {
        delayed_per_mille: 1000,
        delay,
        ..FaultPlan::default()
    }
}

/// Waits for something that must come; a hang is ended, and is a failure.
pub(crate) fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let started = Instant::now();
    while !seen() {
        assert!(started.elapsed() < Duration::from_secs(60), "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn pidfd_of(process: u32) -> OwnedFd {
    let pid = rustix::process::Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
}

#[derive(Debug)]
struct Logged {
    inner: Box<dyn PageSource>,
    log: Log,
}

impl PageSource for Logged {
    fn start(&mut self, read: PageRead, port: &mut ReadPort<'_>) -> Started {
        self.log.lock().unwrap().push(read.image());
        self.inner.start(read, port)
    }

    fn finish(&mut self, done: ReadDone) -> Option<ReadDone> {
        self.inner.finish(done)
    }

    fn tick(&mut self, now: Instant, done: &mut Vec<ReadDone>) {
        self.inner.tick(now, done);
    }

    fn next_due(&self) -> Option<Instant> {
        self.inner.next_due()
    }
}
