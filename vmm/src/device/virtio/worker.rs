#![forbid(unsafe_code)]
//! A device with its queues, and the thread that works on them.
//!
//! ```text
//! vCPU                          worker                       whoever owns the machine
//! kick: bit, wake  ---------->  lock the core, take bits,
//!                               requests until none is left
//! registers: lock the core  ->  (gives the lock up between
//!                               two requests)          <---  pause: lock the core, do what
//!                                                            is left, until resume
//! ```
//!
//! The thread is started by the first kick. A machine in which no guest asks anything of a device
//! has no thread for it: not one that was made, not one that was restored. A device to which something can
//! come from outside has its thread from when the guest has set it up, or the machine goes on: the
//! thread waits for kicks and for the source of what comes. A device that is held up by a limit has its
//! thread sleep until the limit lets the next request go; a pause does not wait for that.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::bell::Bell;
use super::core::{Core, SOURCE, SOURCE_BIT};
use super::delegate::DelegateError;
use super::device::{DeviceType, Interrupt, MemoryFigures, VirtioDevice, VirtioStateError};
use crate::memory::guest::GuestRam;
use crate::report::one_line;

struct Shared {
    name: String,
    core: Mutex<Core>,
    /// What to write when the guest notifies of a queue, where somebody else works on the rings.
    kicks: Option<Arc<[EventFd]>>,
    /// A bit for each queue that the guest has notified of.
    kicked: AtomicU64,
    /// How many wait for the core while the worker has it.
    waiting: AtomicU32,
    is_active: AtomicBool,
    is_broken: AtomicBool,
    quit: AtomicBool,
    bell: Bell,
}

impl Shared {
    /// As [`Core::round`]; a queue that the guest broke ends the device's work.
    fn round(&self, core: &mut Core, bits: u64, is_over: &dyn Fn() -> bool) -> u64 {
        if core.is_delegated() {
            let passed = if core.is_active {
                core.pass_on()
            } else {
                Ok(())
            };
            self.noted(core, passed);
            return 0;
        }
        core.round(bits, is_over).unwrap_or_else(|error| {
            core.note(&error);
            self.fail(core);
            0
        })
    }

    /// A device whose rings are not worked on any more is broken.
    fn noted(&self, core: &mut Core, outcome: Result<(), DelegateError>) {
        if let Err(error) = outcome {
            tracing::error!(device = self.name, "{}", one_line(&*error));
            self.fail(core);
        }
    }

    /// Nothing more until the guest resets the device.
    fn fail(&self, core: &mut Core) {
        core.is_active = false;
        // Why it fails is known already.
        let _known = core.take_back();
        core.device.reset();
        self.is_active.store(false, Ordering::SeqCst);
        self.is_broken.store(true, Ordering::SeqCst);
        core.tell_config();
    }
}

/// A device with its worker.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.shared.name)
            .field("is_active", &self.is_active())
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// A device as after power-on.
    pub fn new(name: &str, device: Box<dyn VirtioDevice>) -> Self {
        let mut device = device;
        let kicks = device.delegate().map(|delegate| delegate.kicks());
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                core: Mutex::new(Core::new(device)),
                kicks,
                kicked: AtomicU64::new(0),
                waiting: AtomicU32::new(0),
                is_active: AtomicBool::new(false),
                is_broken: AtomicBool::new(false),
                quit: AtomicBool::new(false),
                bell: Bell::default(),
            }),
            thread: Mutex::new(None),
        }
    }

    /// What the device is.
    pub fn device_type(&self) -> &'static DeviceType {
        self.with_core(|core| core.device.device_type())
    }

    /// Gives the device guest memory and a way to make itself heard. Before the guest runs.
    pub fn connect(&self, ram: Arc<GuestRam>, interrupt: Arc<dyn Interrupt>) {
        self.with_core(|core| core.connect(ram, interrupt));
    }

    /// Does something with the device and its queues, between two requests.
    pub fn with_core<T>(&self, act: impl FnOnce(&mut Core) -> T) -> T {
        let shared = &self.shared;
        shared.waiting.fetch_add(1, Ordering::SeqCst);
        let result = act(&mut lock(&shared.core));
        shared.waiting.fetch_sub(1, Ordering::SeqCst);
        // The worker may have gone to sleep to let this in.
        if shared.kicked.load(Ordering::SeqCst) != 0 {
            self.wake(false);
        }
        result
    }

    /// Whether the guest has set the device up.
    pub fn is_active(&self) -> bool {
        self.shared.is_active.load(Ordering::SeqCst)
    }

    /// Whether the guest broke it: it does nothing until it is reset.
    pub fn is_broken(&self) -> bool {
        self.shared.is_broken.load(Ordering::SeqCst)
    }

    /// The guest has set the device up and takes these features.
    pub fn activate(&self, features: u64) {
        let has_event_index = features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0;
        self.with_core(|core| {
            for queue in &mut core.queues {
                queue.set_event_index(has_event_index);
            }
            if let Err(error) = core.device.activate(features) {
                tracing::error!(device = self.shared.name, "it cannot be set up: {error}");
                return self.shared.fail(core);
            }
            core.is_active = true;
            self.shared.is_active.store(true, Ordering::SeqCst);
            let handed = core.hand_over();
            self.shared.noted(core, handed);
        });
        self.look_outside();
    }

    /// Has the worker look whether something came from outside, where something can, and wait for it, or for
    /// a limit.
    fn look_outside(&self) {
        if self.with_core(|core| core.wait.is_some() || core.source().is_some()) {
            self.shared.kicked.fetch_or(SOURCE, Ordering::SeqCst);
            self.wake(true);
        }
    }

    /// As after power-on, but for the device's own state.
    pub fn reset(&self) {
        self.with_core(|core| {
            core.forsake();
            core.is_active = false;
            (core.limited, core.wait) = (0, None);
            for queue in &mut core.queues {
                queue.reset();
            }
            core.device.reset();
            self.shared.is_active.store(false, Ordering::SeqCst);
            self.shared.is_broken.store(false, Ordering::SeqCst);
            self.shared.kicked.store(0, Ordering::SeqCst);
        });
    }

    /// The device is taken out: what it works on is done, and nothing comes after it. When this returns guest
    /// memory and the guest's interrupts are out of its reach.
    pub fn detach(&self) {
        self.with_core(|core| {
            core.forsake();
            if let Some(delegate) = core.device.delegate() {
                delegate.close();
            }
            core.disconnect();
            self.shared.is_active.store(false, Ordering::SeqCst);
            self.shared.kicked.store(0, Ordering::SeqCst);
            self.shared.quit.store(true, Ordering::SeqCst);
        });
    }

    /// What there is of a device that is memory.
    pub fn memory(&self) -> Option<MemoryFigures> {
        self.with_core(|core| core.device.memory())
    }

    /// Requests so much of a device that is memory, and tells the guest.
    pub fn request_memory(&self, bytes: u64) {
        self.with_core(|core| {
            let before = core.device.generation();
            core.device.request_memory(bytes);
            if core.device.generation() != before {
                core.tell_config();
            }
        });
    }

    /// What was written is on the host's disk when this returns: the device goes, and nobody asks it again.
    pub fn settle(&self) {
        self.with_core(|core| core.device.settle());
    }

    /// Becomes as a device was saved: set up, with these features, or not; broken or not. It stands still
    /// until [`Self::resume`], as after [`Self::pause`]: its rings are not handed over before that.
    pub fn restore_phase(
        &self,
        features: Option<u64>,
        is_broken: bool,
    ) -> Result<(), VirtioStateError> {
        self.with_core(|core| {
            core.is_paused = true;
            if let Some(features) = features.filter(|_| !is_broken) {
                core.device.activate(features)?;
                core.is_active = true;
            }
            self.shared
                .is_active
                .store(core.is_active, Ordering::SeqCst);
            self.shared.is_broken.store(is_broken, Ordering::SeqCst);
            Ok(())
        })
    }

    /// The guest says that a queue has requests. Returns at once.
    pub fn kick(&self, queue: u16) {
        if !self.is_active() || queue >= SOURCE_BIT {
            return;
        }
        if let Some(kicks) = &self.shared.kicks {
            if let Some(kick) = kicks.get(usize::from(queue)) {
                // A counter that is full is a kick as well.
                let _ = kick.write(1);
            }
            return;
        }
        self.shared.kicked.fetch_or(1 << queue, Ordering::SeqCst);
        self.wake(true);
    }

    /// Has the worker look; starts it, where it `may_start`.
    fn wake(&self, may_start: bool) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match &*thread {
            Some(thread) => self.shared.bell.ring(thread.thread()),
            None if may_start => match self.start() {
                Ok(started) => *thread = Some(started),
                Err(error) => {
                    drop(thread);
                    tracing::error!(
                        device = self.shared.name,
                        "its thread cannot be started: {error}"
                    );
                    self.with_core(|core| self.shared.fail(core));
                }
            },
            None => (),
        }
    }

    fn start(&self) -> io::Result<JoinHandle<()>> {
        // Not through `with_core`, which wakes the thread that is being started.
        let mut core = lock(&self.shared.core);
        if core.is_delegated() || core.device.inbound().is_some() {
            self.shared.bell.hang()?;
        }
        drop(core);
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().name(self.shared.name.clone());
        builder.spawn(move || work(&shared))
    }

    /// Guest memory is about to have more, or has less: who else works on the rings is told of it. What the
    /// guest has asked for is done before.
    pub fn memory_changed(&self) {
        self.with_core(|core| {
            if core.is_delegated() && core.is_active && !core.is_paused {
                let handed = core.take_back().and_then(|()| core.hand_over());
                self.shared.noted(core, handed);
            }
        });
    }

    /// Does all that the guest has asked for, and nothing more until [`Self::resume`]. No vCPU may run.
    /// What waits outside stays there.
    pub fn pause(&self) {
        self.with_core(|core| {
            core.is_paused = true;
            core.wait = None;
            if core.is_delegated() {
                let taken = core.take_back();
                return self.shared.noted(core, taken);
            }
            let mut bits = self.shared.kicked.swap(0, Ordering::SeqCst) | core.limited;
            // A guest that stands still can have no more than its queues hold.
            for _ in 0..=core.queues.len() {
                if bits == 0 {
                    break;
                }
                bits = self.shared.round(core, bits, &|| false);
            }
            self.shared.kicked.fetch_or(bits, Ordering::SeqCst);
            core.device.settle();
        });
    }

    /// Works from now on, for the first time or again after [`Self::pause`]. Before a vCPU runs.
    pub fn resume(&self) {
        self.with_core(|core| {
            core.is_paused = false;
            match core.device.begin() {
                Ok(false) => (),
                Ok(true) => core.tell_config(),
                Err(error) => {
                    tracing::error!(device = self.shared.name, "it cannot go on: {error}");
                    self.shared.fail(core);
                }
            }
            let handed = core.hand_over();
            self.shared.noted(core, handed);
            if core.device.inbound().is_some() && core.is_active {
                // The guest finds it when it first looks, and a device to which nothing comes needs no
                // thread for it.
                let bits = SOURCE | self.shared.kicked.swap(0, Ordering::SeqCst);
                let left = self.shared.round(core, bits, &|| false);
                self.shared.kicked.fetch_or(left, Ordering::SeqCst);
            }
        });
        self.look_outside();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            self.shared.bell.ring(thread.thread());
            if thread.join().is_err() {
                tracing::error!(device = self.shared.name, "the thread of a device panicked");
            }
        }
    }
}

/// The body of the thread. Between two looks it sleeps; a wake-up that comes first is not lost.
fn work(shared: &Shared) {
    let mut source: Option<Arc<OwnedFd>> = None;
    // When a limit lets something go.
    let mut until: Option<Instant> = None;
    while !shared.quit.load(Ordering::SeqCst) {
        if until.is_some_and(|until| until <= Instant::now()) {
            until = None;
            shared.kicked.fetch_or(SOURCE, Ordering::SeqCst);
        }
        let must_wait = || shared.waiting.load(Ordering::SeqCst) != 0;
        let is_due = shared.kicked.load(Ordering::SeqCst) != 0;
        if must_wait() || !is_due {
            // Whoever waits for the core wakes this thread if there is something to do.
            let source = source.as_deref().filter(|_| !is_due);
            if shared.bell.sleep(source, until.filter(|_| !is_due)) {
                shared.kicked.fetch_or(SOURCE, Ordering::SeqCst);
            }
            continue;
        }
        let mut core = lock(&shared.core);
        if core.is_paused {
            drop(core);
            (source, until) = (None, None);
            shared.bell.sleep(None, None);
            continue;
        }
        let is_over = || must_wait() || shared.quit.load(Ordering::SeqCst);
        // Taken and put back while the core is held: a pause finds all that is asked for.
        let bits = shared.kicked.swap(0, Ordering::SeqCst);
        let left = shared.round(&mut core, bits, &is_over);
        shared.kicked.fetch_or(left, Ordering::SeqCst);
        source = core.source();
        // A time that no clock has is never.
        until = (core.wait).and_then(|wait| Instant::now().checked_add(wait));
        drop(core);
    }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}
