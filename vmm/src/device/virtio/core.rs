#![forbid(unsafe_code)]
//! A device and its queues, and what is done with them in one go.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::device::{Begun, Interrupt, MAX_UNDER_WAY, VirtioDevice};
use super::inbound::{self, Left};
use super::queue::{Chain, QueueError, VirtQueue};
use crate::memory::guest::GuestRam;

/// Most requests that are worked on for one kick before others get their turn.
const ROUND_REQUESTS: u32 = 256;
/// The bit that stands for what comes from outside; a queue has one of those below.
pub(super) const SOURCE_BIT: u16 = 63;
pub(super) const SOURCE: u64 = 1 << SOURCE_BIT;

/// A device, its queues, and what they need.
pub struct Core {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Its queues.
    pub queues: Vec<VirtQueue>,
    pub(super) outside: Option<Outside>,
    pub(super) is_active: bool,
    pub(super) is_paused: bool,
    /// Queues whose next request has to wait for its device's limit, a bit for each.
    pub(super) limited: u64,
    /// How long something has to wait for a limit, as the last round found it.
    pub(super) wait: Option<Duration>,
    /// How often the guest has broken it.
    failures: u64,
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
pub(super) struct Outside {
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl Core {
    /// A device as after power-on.
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let sizes = device.device_type().queues.iter().enumerate();
        let queues = sizes.filter_map(|(number, &size)| {
            let queue = VirtQueue::new(number, size)?;
            let copies = device.copies(number);
            Some(if copies { queue } else { queue.of_any_length() })
        });
        let queues = queues.collect();
        Self {
            queues,
            device,
            outside: None,
            is_active: false,
            is_paused: false,
            limited: 0,
            wait: None,
            failures: 0,
        }
    }

    /// Gives the device guest memory and a way to make itself heard.
    pub(super) fn connect(&mut self, ram: Arc<GuestRam>, interrupt: Arc<dyn Interrupt>) {
        self.outside = Some(Outside { ram, interrupt });
    }

    /// Takes guest memory and interrupts away again.
    pub(super) fn disconnect(&mut self) {
        self.is_active = false;
        (self.limited, self.wait) = (0, None);
        self.outside = None;
    }

    /// Tells the guest that the registers changed, or the status.
    pub(super) fn tell_config(&self) {
        if let Some(outside) = &self.outside {
            outside.interrupt.config();
        }
    }

    /// Works on the queues in `bits`, and on those that a limit holds up; returns those that have more. Ends
    /// early when it `is_over`.
    pub(super) fn round(
        &mut self,
        bits: u64,
        is_over: &dyn Fn() -> bool,
    ) -> Result<u64, QueueError> {
        let Some(outside) = self.outside.clone() else {
            return Ok(bits);
        };
        self.wait = None;
        let bits = bits | std::mem::take(&mut self.limited);
        let (bits, inbound) = self.look(bits);
        let is_inbound = |number: &usize| inbound >> number & 1 != 0;
        let (mut left, mut stalled) = (0, Vec::new());
        // Requests first: what they bring about goes into the rest. Of these the last is first, which has
        // what the guest must know before anything else.
        let numbers = 0..self.queues.len();
        let requests = numbers.clone().filter(|number| !is_inbound(number));
        for number in requests.chain(numbers.filter(is_inbound).rev()) {
            if bits >> number & 1 == 0 || !self.is_active {
                continue;
            }
            let served = if is_inbound(&number) {
                let before = self.device.generation();
                let delivered = self.deliver(number, &outside, is_over);
                self.tell_of_change(before);
                delivered
            } else {
                self.serve(number, &outside, is_over)
            };
            if !is_inbound(&number) && !self.device.is_ready(number) {
                stalled.push(number);
            }
            left |= u64::from(served?) << number;
        }
        for number in stalled {
            left |= u64::from(self.device.is_ready(number)) << number;
        }
        let may_look = self.is_active && !self.is_paused;
        let inbound = self.device.inbound().filter(|_| may_look);
        if inbound.is_some_and(|inbound| inbound.is_behind()) {
            left |= SOURCE;
        }
        Ok(left)
    }

    /// Takes in what has happened outside; which queues to serve, and which of them give room. Where there
    /// are such, all take part: what one brings about another may wait for. A device that is paused, or is
    /// not set up, takes nothing in and gives nothing.
    fn look(&mut self, bits: u64) -> (u64, u64) {
        let may_look = self.is_active && !self.is_paused;
        let before = self.device.generation();
        let Some(inbound) = self.device.inbound() else {
            return (bits, 0);
        };
        let queues = inbound.queues();
        if !may_look {
            return (bits & !queues & !SOURCE, queues);
        }
        inbound.look();
        self.tell_of_change(before);
        (!SOURCE, queues)
    }

    /// Tells the guest when the registers changed by what happened outside.
    fn tell_of_change(&self, before: u8) {
        if self.device.generation() != before {
            self.tell_config();
        }
    }

    /// Readable when something has happened outside that the guest may hear of.
    pub(super) fn source(&mut self) -> Option<Arc<OwnedFd>> {
        if !self.is_active || self.is_paused {
            return None;
        }
        match self.device.delegate() {
            Some(delegate) => Some(delegate.source()),
            None => self.device.inbound()?.source(),
        }
    }

    /// Gives the guest what one queue has room for; whether there is more.
    fn deliver(
        &mut self,
        number: usize,
        outside: &Outside,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, QueueError> {
        let Some(queue) = ready_queue(&mut self.queues, number, &outside.ram)? else {
            return Ok(false);
        };
        let Some(device) = self.device.inbound() else {
            return Ok(false);
        };
        let (ram, interrupt) = (&*outside.ram, &*outside.interrupt);
        let left = inbound::deliver(
            device,
            (number, queue),
            ram,
            interrupt,
            ROUND_REQUESTS,
            is_over,
        )?;
        if let Left::Later(time) = left {
            self.wait_for(time);
        }
        Ok(matches!(left, Left::More))
    }

    /// Something has to wait: another round is due when the first of all has waited.
    fn wait_for(&mut self, time: Duration) {
        self.wait = Some(self.wait.map_or(time, |other| other.min(time)));
    }

    /// Works on one queue; whether it has more. Nothing is under way when this returns: whoever has the core
    /// next finds a device that rests.
    fn serve(
        &mut self,
        number: usize,
        outside: &Outside,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, QueueError> {
        let has_more = self.take(number, outside, is_over);
        while let Some(answer) = self.device.finish(&outside.ram) {
            // A queue that is broken takes no answers, and the device is reset.
            if has_more.is_ok() {
                self.answer(number, outside, &answer)?;
            }
        }
        has_more
    }

    /// Takes requests and works on them; some may be under way when it returns.
    fn take(
        &mut self,
        number: usize,
        outside: &Outside,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, QueueError> {
        let ram = &*outside.ram;
        let (mut done, mut under_way, mut has_more) = (0, 0, true);
        while has_more {
            let Some(queue) = ready_queue(&mut self.queues, number, ram)? else {
                return Ok(false);
            };
            queue.hush(ram)?;
            loop {
                if !self.device.is_ready(number) {
                    // It is served again when that has changed.
                    return Ok(false);
                }
                let Some(queue) = self.queues.get_mut(number) else {
                    return Ok(false);
                };
                let is_full = under_way >= MAX_UNDER_WAY;
                let chain = if is_full { None } else { queue.pop(ram)? };
                let Some(chain) = chain else {
                    // More may have been asked for when one of these is done.
                    let Some(answer) = self.device.finish(ram) else {
                        if is_full {
                            // It lost count; nothing is under way.
                            under_way = 0;
                            continue;
                        }
                        break;
                    };
                    under_way -= 1;
                    self.answer(number, outside, &answer)?;
                    continue;
                };
                let has_company = under_way > 0 || queue.has_next(ram)?;
                if let Some((limiter, bytes)) = self.device.limit(number, &chain) {
                    // Who stands still finishes: what is done then is counted, and waited for later.
                    let wait = limiter.wait(bytes).filter(|_| !self.is_paused);
                    if let Some(time) = wait {
                        queue.put_back(1);
                        self.limited |= 1 << number;
                        self.wait_for(time);
                        return Ok(false);
                    }
                    limiter.count(bytes);
                }
                let begun = if chain.is_malformed() {
                    Begun::Done(chain, 0)
                } else if has_company {
                    self.device.start(number, chain, ram)
                } else {
                    match self.device.attempt(number, &chain, ram) {
                        Some(bytes) => Begun::Done(chain, bytes),
                        None => Begun::NotNow,
                    }
                };
                match begun {
                    Begun::Done(chain, bytes) => {
                        self.answer(number, outside, &(chain, bytes))?;
                        // Nor do those that were begun before wait for all that are done at once.
                        let earlier = if under_way > 0 {
                            self.device.finish(ram)
                        } else {
                            None
                        };
                        if let Some(answer) = earlier {
                            under_way -= 1;
                            self.answer(number, outside, &answer)?;
                        }
                    }
                    Begun::UnderWay => under_way += 1,
                    Begun::NotNow => {
                        let Some(queue) = self.queues.get_mut(number) else {
                            return Ok(false);
                        };
                        queue.put_back(1);
                        return Ok(self.device.is_ready(number));
                    }
                }
                done += 1;
                if done >= ROUND_REQUESTS || is_over() {
                    break;
                }
            }
            let Some(queue) = self.queues.get_mut(number) else {
                return Ok(false);
            };
            has_more = queue.listen(ram)?;
            if done >= ROUND_REQUESTS || is_over() {
                break;
            }
        }
        Ok(has_more)
    }

    /// Gives a request back to the guest.
    fn answer(
        &mut self,
        number: usize,
        outside: &Outside,
        (chain, bytes): &(Chain, u32),
    ) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(number) else {
            return Ok(());
        };
        queue.push(&outside.ram, chain, *bytes)?;
        if queue.wants_interrupt(&outside.ram)? {
            outside.interrupt.queue(number);
        }
        Ok(())
    }

    /// Writes down how the guest broke a queue.
    pub(super) fn note(&mut self, error: &QueueError) {
        // The 1st, 2nd, 4th, 8th... time: the guest decides how often it does that.
        self.failures += 1;
        if self.failures.is_power_of_two() {
            let (kind, failures) = (self.device.device_type().kind, self.failures);
            tracing::warn!(device = kind, failures, "{error}");
        }
    }
}

/// A queue, if the guest has set it up.
fn ready_queue<'a>(
    queues: &'a mut [VirtQueue],
    number: usize,
    ram: &GuestRam,
) -> Result<Option<&'a mut VirtQueue>, QueueError> {
    let Some(queue) = queues.get_mut(number).filter(|queue| queue.is_ready()) else {
        return Ok(None);
    };
    if queue.is_valid(ram) {
        return Ok(Some(queue));
    }
    Err(QueueError {
        queue: number,
        reason: "its rings are not in RAM".to_owned(),
    })
}
