#![forbid(unsafe_code)]
//! Devices whose rings somebody else works on: when rings go to that process and come back, and how what
//! it has done reaches the guest.

use std::error::Error;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::core::Core;
use super::queue::VirtQueue;
use crate::memory::guest::GuestRam;
use crate::report::one_line;

/// Why rings are not worked on any more.
pub type DelegateError = Box<dyn Error + Send + Sync>;

/// The side of a device whose rings another process works on. It is called from one thread at a time, and
/// returns in bounded time whatever that process does.
pub trait Delegate: fmt::Debug {
    /// What the process sleeps on, an event for each queue.
    fn kicks(&self) -> Arc<[EventFd]>;

    /// Hands over all rings that the guest has set up. The features are those of
    /// [`activate`](super::device::VirtioDevice::activate).
    fn start(&mut self, queues: &[VirtQueue], ram: &GuestRam) -> Result<(), DelegateError>;

    /// Takes the rings back, with how far each has come: from then on nobody writes guest memory. Where the
    /// process does not say how far it has come, guest memory does.
    fn stop(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), DelegateError>;

    /// Queues that have answers, a bit for each, since this was asked last.
    fn look(&mut self) -> Result<u64, DelegateError>;

    /// Readable when there is something to look at.
    fn source(&self) -> Arc<OwnedFd>;

    /// Nothing comes after this: the process is to let go of guest memory.
    fn close(&mut self);
}

impl Core {
    /// Whether somebody else works on the rings.
    pub(super) fn is_delegated(&mut self) -> bool {
        self.device.delegate().is_some()
    }

    /// Hands the rings over, where the guest has set them up and the machine runs.
    pub(super) fn hand_over(&mut self) -> Result<(), DelegateError> {
        if !self.is_active || self.is_paused {
            return Ok(());
        }
        let (Some(outside), Some(delegate)) = (&self.outside, self.device.delegate()) else {
            return Ok(());
        };
        delegate.start(&self.queues, &outside.ram)
    }

    /// Takes the rings back, and gives the guest its last interrupts.
    pub(super) fn take_back(&mut self) -> Result<(), DelegateError> {
        let (Some(outside), Some(delegate)) = (&self.outside, self.device.delegate()) else {
            return Ok(());
        };
        delegate.stop(&mut self.queues, &outside.ram)?;
        if self.is_active {
            self.pass_on()
        } else {
            Ok(())
        }
    }

    /// Gives the guest the interrupts that it is due.
    pub(super) fn pass_on(&mut self) -> Result<(), DelegateError> {
        let (Some(outside), Some(delegate)) = (&self.outside, self.device.delegate()) else {
            return Ok(());
        };
        let calls = delegate.look()?;
        for number in 0..self.queues.len() {
            if calls >> number & 1 != 0 {
                outside.interrupt.queue(number);
            }
        }
        Ok(())
    }

    /// As [`Self::take_back`], when nobody is to hear of what goes wrong: the device begins again, or goes.
    pub(super) fn forsake(&mut self) {
        if let Err(error) = self.take_back() {
            let kind = self.device.device_type().kind;
            tracing::warn!(device = kind, "{}", one_line(&*error));
        }
    }
}
