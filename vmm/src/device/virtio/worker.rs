#![forbid(unsafe_code)]
//! A device with its queues, and the thread that works on them.
//!
//! ```text
//! vCPU                          worker                       whoever owns the machine
//! kick: bit, wake  ---------->  take bits, lock the core,
//!                               requests until none is left
//! registers: lock the core  ->  (gives the lock up between
//!                               two requests)          <---  pause: lock the core, do what
//!                                                            is left, until resume
//! ```
//!
//! The thread is started by the first kick. A machine in which no guest asks anything of a device
//! has no thread for it: not one that was made, not one that was restored. A device that is fed from
//! outside has its thread from when the guest has set it up, or the machine goes on: the thread waits
//! for kicks and for the source of what comes.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::bell::{Bell, Source};
use super::device::{DeviceType, Interrupt, VirtioDevice, VirtioStateError};
use super::inbound::{self, Waits};
use super::queue::{QueueError, VirtQueue};
use crate::memory::guest::GuestRam;

/// Most requests that are worked on for one kick before others get their turn.
const ROUND_REQUESTS: u32 = 256;

/// A device, its queues, and what they need.
pub struct Core {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Its queues.
    pub queues: Vec<VirtQueue>,
    outside: Option<Outside>,
    is_active: bool,
    is_paused: bool,
    /// Everything that waited outside was delivered: more is to be looked for.
    wants_input: bool,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("device", &self.device)
            .field("queues", &self.queues)
            .field("is_active", &self.is_active)
            .field("is_paused", &self.is_paused)
            .finish_non_exhaustive()
    }
}

/// What a device reaches.
#[derive(Clone)]
struct Outside {
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
}

struct Shared {
    core: Mutex<Core>,
    /// A bit for each queue that the guest has notified of.
    kicked: AtomicU64,
    /// How many wait for the core while the worker has it.
    waiting: AtomicU32,
    is_active: AtomicBool,
    is_broken: AtomicBool,
    quit: AtomicBool,
    bell: Bell,
}

/// A device with its worker.
pub struct Worker {
    name: String,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.name)
            .field("is_active", &self.is_active())
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// A device as after power-on.
    pub fn new(name: &str, device: Box<dyn VirtioDevice>) -> Self {
        let sizes = device.device_type().queues.iter().enumerate();
        let queues = sizes.filter_map(|(number, &size)| VirtQueue::new(number, size));
        let core = Core {
            queues: queues.collect(),
            device,
            outside: None,
            is_active: false,
            is_paused: false,
            wants_input: false,
        };
        Self {
            name: name.to_owned(),
            shared: Arc::new(Shared {
                core: Mutex::new(core),
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
        self.with_core(|core| core.outside = Some(Outside { ram, interrupt }));
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
                tracing::error!(device = self.name, "it cannot be set up: {error}");
                return core.fail(&self.shared);
            }
            core.is_active = true;
            self.shared.is_active.store(true, Ordering::SeqCst);
        });
        self.look_outside();
    }

    /// Has the worker look whether something came from outside, where something can.
    fn look_outside(&self) {
        let inbound = self.with_core(|core| {
            let inbound = core.device.inbound()?;
            inbound.source().map(|_| inbound.queue())
        });
        if let Some(queue) = inbound.and_then(|queue| u16::try_from(queue).ok()) {
            self.kick(queue);
        }
    }

    /// As after power-on, but for the device's own state.
    pub fn reset(&self) {
        self.with_core(|core| {
            core.is_active = false;
            core.wants_input = false;
            for queue in &mut core.queues {
                queue.reset();
            }
            core.device.reset();
            self.shared.is_active.store(false, Ordering::SeqCst);
            self.shared.is_broken.store(false, Ordering::SeqCst);
            self.shared.kicked.store(0, Ordering::SeqCst);
        });
    }

    /// Goes on as a device was saved: set up, with these features, or not; broken or not.
    pub fn restore_phase(
        &self,
        features: Option<u64>,
        is_broken: bool,
    ) -> Result<(), VirtioStateError> {
        self.with_core(|core| {
            if let Some(features) = features {
                core.device.activate(features)?;
            }
            core.is_active = features.is_some() && !is_broken;
            self.shared
                .is_active
                .store(core.is_active, Ordering::SeqCst);
            self.shared.is_broken.store(is_broken, Ordering::SeqCst);
            Ok(())
        })
    }

    /// The guest says that a queue has requests. Returns at once.
    pub fn kick(&self, queue: u16) {
        if !self.is_active() || queue >= 64 {
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
                    tracing::error!(device = self.name, "its thread cannot be started: {error}");
                    self.with_core(|core| core.fail(&self.shared));
                }
            },
            None => (),
        }
    }

    fn start(&self) -> io::Result<JoinHandle<()>> {
        // Not through `with_core`, which wakes the thread that is being started.
        if lock(&self.shared.core).device.inbound().is_some() {
            self.shared.bell.hang()?;
        }
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().name(self.name.clone());
        builder.spawn(move || work(&shared))
    }

    /// Does all that the guest has asked for, and nothing more until [`Self::resume`]. No vCPU may run.
    /// What waits outside stays there.
    pub fn pause(&self) {
        self.with_core(|core| {
            core.is_paused = true;
            core.wants_input = false;
            let mut bits = self.shared.kicked.swap(0, Ordering::SeqCst);
            if let Some(inbound) = core.device.inbound() {
                bits &= !(1 << inbound.queue());
            }
            // A guest that stands still can have no more than its queues hold.
            for _ in 0..=core.queues.len() {
                if bits == 0 {
                    break;
                }
                bits = core.round(&self.shared, bits, &|| false);
            }
            self.shared.kicked.fetch_or(bits, Ordering::SeqCst);
        });
    }

    /// Works from now on, for the first time or again after [`Self::pause`]. Before a vCPU runs.
    pub fn resume(&self) {
        self.with_core(|core| {
            core.is_paused = false;
            match core.device.begin() {
                Ok(false) => (),
                Ok(true) => {
                    if let Some(outside) = &core.outside {
                        outside.interrupt.config();
                    }
                }
                Err(error) => {
                    tracing::error!(device = self.name, "it cannot go on: {error}");
                    core.fail(&self.shared);
                }
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
                tracing::error!(device = self.name, "the thread of a device panicked");
            }
        }
    }
}

/// The body of the thread. Between two looks it sleeps; a wake-up that comes first is not lost.
fn work(shared: &Shared) {
    let mut source = None;
    while !shared.quit.load(Ordering::SeqCst) {
        let must_wait = || shared.waiting.load(Ordering::SeqCst) != 0;
        let bits = if must_wait() {
            0
        } else {
            shared.kicked.swap(0, Ordering::SeqCst)
        };
        if bits == 0 {
            // Whoever waits for the core wakes this thread if there is something to do.
            let source = source.as_ref().filter(|_| !must_wait());
            let input = shared.bell.sleep(source);
            shared.kicked.fetch_or(input, Ordering::SeqCst);
            continue;
        }
        let mut core = lock(&shared.core);
        if core.is_paused {
            shared.kicked.fetch_or(bits, Ordering::SeqCst);
            drop(core);
            source = None;
            shared.bell.sleep(None);
            continue;
        }
        let is_over = || must_wait() || shared.quit.load(Ordering::SeqCst);
        let left = core.round(shared, bits, &is_over);
        source = core.source();
        drop(core);
        shared.kicked.fetch_or(left, Ordering::SeqCst);
    }
}

impl Core {
    /// Works on the queues in `bits`; returns those that have more. Ends early when it `is_over`.
    fn round(&mut self, shared: &Shared, bits: u64, is_over: &dyn Fn() -> bool) -> u64 {
        let Some(outside) = self.outside.clone() else {
            return bits;
        };
        let mut left = 0;
        for number in 0..self.queues.len() {
            if bits >> number & 1 == 0 || !self.is_active {
                continue;
            }
            match self.serve(number, &outside, is_over) {
                Ok(true) => left |= 1 << number,
                Ok(false) => (),
                Err(error) => {
                    tracing::warn!(device = self.device.device_type().kind, "{error}");
                    self.fail(shared);
                    return 0;
                }
            }
        }
        left
    }

    /// Where something may come from that the guest has room for.
    fn source(&mut self) -> Option<Source> {
        if !self.wants_input || !self.is_active {
            return None;
        }
        let inbound = self.device.inbound()?;
        Some(Source {
            bit: 1 << inbound.queue(),
            file: inbound.source()?,
        })
    }

    /// Works on one queue; whether it has more.
    fn serve(
        &mut self,
        number: usize,
        outside: &Outside,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, QueueError> {
        let Some(queue) = self.queues.get_mut(number) else {
            return Ok(false);
        };
        if !queue.is_ready() {
            return Ok(false);
        }
        let ram = &*outside.ram;
        if !queue.is_valid(ram) {
            return Err(QueueError {
                queue: number,
                reason: "its rings are not in RAM".to_owned(),
            });
        }
        if let Some(inbound) = self.device.inbound()
            && inbound.queue() == number
        {
            let interrupt = &*outside.interrupt;
            let waits = inbound::serve(inbound, queue, ram, interrupt, ROUND_REQUESTS, is_over)?;
            self.wants_input = waits == Waits::ForInput;
            return Ok(waits == Waits::ForNothing);
        }
        let (mut done, mut has_more) = (0, true);
        while has_more {
            queue.hush(ram)?;
            while let Some(chain) = queue.pop(ram)? {
                let bytes = if chain.is_malformed() {
                    0
                } else {
                    self.device.process(number, &chain, ram)
                };
                queue.push(ram, &chain, bytes)?;
                if queue.wants_interrupt(ram)? {
                    outside.interrupt.queue(number);
                }
                done += 1;
                if done >= ROUND_REQUESTS || is_over() {
                    break;
                }
            }
            has_more = queue.listen(ram)?;
            if done >= ROUND_REQUESTS || is_over() {
                break;
            }
        }
        Ok(has_more)
    }

    /// Nothing more until the guest resets the device.
    fn fail(&mut self, shared: &Shared) {
        self.is_active = false;
        self.wants_input = false;
        shared.is_active.store(false, Ordering::SeqCst);
        shared.is_broken.store(true, Ordering::SeqCst);
        if let Some(outside) = &self.outside {
            outside.interrupt.config();
        }
    }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}
