#![forbid(unsafe_code)]
//! The ports of the timer, as long as the kernel does not have them.

use std::sync::{Arc, OnceLock};

use crate::device::bus::{DeviceEvent, PioDevice};
use crate::kvm::KvmError;
use crate::kvm::timer::{Timer, TimerPort};

/// Where the ports find their timer, once there is a VM.
pub(super) type TimerSlot = Arc<OnceLock<Arc<Timer>>>;

/// Ports of the timer.
#[derive(Debug)]
pub(super) struct TimerPorts {
    timer: TimerSlot,
    port: fn(u16) -> TimerPort,
}

impl TimerPorts {
    /// Counters and control word.
    pub(super) fn registers(timer: &TimerSlot) -> Self {
        Self {
            timer: Arc::clone(timer),
            // Of four ports.
            port: |offset| TimerPort::Register(offset.to_le_bytes()[0]),
        }
    }

    /// The speaker's port.
    pub(super) fn speaker(timer: &TimerSlot) -> Self {
        Self {
            timer: Arc::clone(timer),
            port: |_| TimerPort::Speaker,
        }
    }

    /// What the timer says; nothing where it cannot be made: the guest goes on without.
    fn ask<T>(&self, act: impl FnOnce(&Timer) -> Result<T, KvmError>) -> Option<T> {
        match self.timer.get().map(|timer| act(timer)) {
            Some(Ok(answer)) => Some(answer),
            Some(Err(error)) => {
                tracing::warn!("the guest gets no timer: {}", crate::report::chain(&error));
                None
            }
            None => None,
        }
    }
}

// As in the kernel, each access is one of a byte.
impl PioDevice for TimerPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some(byte) = self.ask(|timer| timer.read((self.port)(offset))) {
            data.fill(0);
            if let Some(first) = data.first_mut() {
                *first = byte;
            }
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        if let Some(&byte) = data.first() {
            self.ask(|timer| timer.write((self.port)(offset), byte));
        }
        DeviceEvent::None
    }
}
