#![forbid(unsafe_code)]
//! An interrupt line of the machine.

use std::io;
use std::sync::Arc;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line: an event that KVM turns into an interrupt (`KVM_IRQFD`).
///
/// Cheap to clone; all clones are the same line. A trigger before the line is connected is kept
/// and raised when it is.
#[derive(Debug, Clone)]
pub struct IrqLine {
    event: Arc<EventFd>,
}

impl IrqLine {
    /// A line that is connected to nothing yet.
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Raises the interrupt once. Never blocks.
    pub fn trigger(&self) -> io::Result<()> {
        match self.event.write(1) {
            // The counter is full: the interrupt is pending anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// The event to register with KVM.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        IrqLine::trigger(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_the_same_line() {
        let line = IrqLine::new().unwrap();
        line.clone().trigger().unwrap();
        line.trigger().unwrap();
        assert_eq!(line.event().read().unwrap(), 2);
    }

    #[test]
    fn a_full_line_does_not_block() {
        let line = IrqLine::new().unwrap();
        line.event().write(u64::MAX - 1).unwrap();
        line.trigger().unwrap();
    }
}
