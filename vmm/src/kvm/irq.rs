#![forbid(unsafe_code)]
//! Interrupt chips, timer and clock of a VM: their saved form, and interrupt lines into them.

use std::io;
use std::mem::offset_of;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_ioapic_state, kvm_irqchip, kvm_msi, kvm_pic_state,
};
use kvm_ioctls::Cap;
use vmm_sys_util::eventfd::EventFd;

use super::vm::{OpenVm, Vm};
use super::{KvmError, abi, ioctl};

/// An in-kernel interrupt chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chip {
    /// The first 8259.
    PicMaster,
    /// The second 8259.
    PicSlave,
    /// The I/O APIC.
    IoApic,
}

impl Chip {
    fn id(self) -> u32 {
        match self {
            Self::PicMaster => KVM_IRQCHIP_PIC_MASTER,
            Self::PicSlave => KVM_IRQCHIP_PIC_SLAVE,
            Self::IoApic => KVM_IRQCHIP_IOAPIC,
        }
    }
}

/// The VM's clock (`kvmclock`) at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    /// What the guest's clock shows, in nanoseconds.
    pub clock_ns: u64,
    /// The host's wall-clock time at the same moment in nanoseconds since 1970; `None` to go on
    /// from `clock_ns` as if no time had passed.
    pub realtime_ns: Option<u64>,
}

impl ClockReading {
    /// Wall-clock time since the reading in nanoseconds; zero when it is not known, or when the
    /// host's clock is behind it.
    pub fn elapsed_ns(&self) -> u64 {
        self.realtime_ns
            .map_or(0, |then| wall_clock_ns().saturating_sub(then))
    }
}

fn wall_clock_ns() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// A way to raise message-signalled interrupts of a VM, from any thread.
#[derive(Debug, Clone)]
pub struct MessageSender {
    fd: Arc<OpenVm>,
}

impl MessageSender {
    /// Raises the interrupt that a write of `data` to `address` stands for: it is in its local APIC when
    /// this returns, so that nothing is on its way when state is saved.
    ///
    /// Without a route of the kernel's and an event: a change of the routes waits for a grace period of
    /// the kernel (milliseconds), which every restored machine would pay.
    pub fn send(&self, address: u64, data: u32) -> io::Result<()> {
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        let message = kvm_msi {
            address_lo: u32::from_le_bytes([a, b, c, d]),
            address_hi: u32::from_le_bytes([e, f, g, h]),
            data,
            ..Default::default()
        };
        match self.fd.signal_msi(message) {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

/// A global interrupt line of a VM with two levels, from any thread.
#[derive(Debug, Clone)]
pub struct LevelLine {
    fd: Arc<OpenVm>,
    line: u32,
}

impl LevelLine {
    /// Raises or lowers the line: the interrupt chips know when this returns.
    pub fn set(&self, is_raised: bool) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(self.line, is_raised)
            .map_err(ioctl("KVM_IRQ_LINE"))
    }
}

impl Vm {
    /// A global interrupt line with two levels.
    pub fn level_line(&self, line: u32) -> LevelLine {
        LevelLine {
            fd: Arc::clone(&self.fd),
            line,
        }
    }

    /// A way to raise interrupts by message.
    pub fn message_sender(&self) -> MessageSender {
        MessageSender {
            fd: Arc::clone(&self.fd),
        }
    }

    /// Connects an event to a global interrupt line: each write of the event is an edge.
    pub fn connect_irq(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, line)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Raises and lowers a global interrupt line: one edge, which has reached the interrupt chips when this
    /// returns.
    pub fn pulse_irq(&self, line: u32) -> Result<(), KvmError> {
        for active in [true, false] {
            self.fd
                .set_irq_line(line, active)
                .map_err(ioctl("KVM_IRQ_LINE"))?;
        }
        Ok(())
    }

    /// Waits until every edge that was written to `event` has reached the interrupt chips.
    ///
    /// KVM raises an I/O APIC line from a work queue; disconnecting the event waits for that. Only
    /// while no vCPU runs and nobody writes the event.
    pub fn flush_irq(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_irqfd(event, line)
            .map_err(ioctl("KVM_IRQFD"))?;
        self.connect_irq(event, line)
    }

    /// State of an interrupt chip, as the kernel's bytes.
    pub fn chip(&self, chip: Chip) -> Result<Vec<u8>, KvmError> {
        let mut state = kvm_irqchip {
            chip_id: chip.id(),
            ..Default::default()
        };
        self.fd
            .get_irqchip(&mut state)
            .map_err(ioctl("KVM_GET_IRQCHIP"))?;
        Ok(abi::to_bytes(&state))
    }

    /// Sets the state of an interrupt chip. The bytes' own idea of which chip they are is ignored.
    pub fn set_chip(&self, chip: Chip, bytes: &[u8]) -> Result<(), KvmError> {
        let mut state: kvm_irqchip = abi::from_bytes("interrupt chip", bytes)?;
        state.chip_id = chip.id();
        self.fd
            .set_irqchip(&state)
            .map_err(ioctl("KVM_SET_IRQCHIP"))
    }

    /// Masks every line of both 8259s, as firmware leaves them. They begin unmasked, and a guest
    /// that only uses the I/O APIC would get each interrupt a second time, as an exception.
    pub fn mask_pics(&self) -> Result<(), KvmError> {
        let mask = offset_of!(kvm_irqchip, chip) + offset_of!(kvm_pic_state, imr);
        for chip in [Chip::PicMaster, Chip::PicSlave] {
            let mut bytes = self.chip(chip)?;
            bytes[mask] = 0xff;
            self.set_chip(chip, &bytes)?;
        }
        Ok(())
    }

    /// Reads the guest's clock.
    pub fn clock(&self) -> Result<ClockReading, KvmError> {
        let clock = self.fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        Ok(ClockReading {
            clock_ns: clock.clock,
            // KVM knows only where the host's clock is its TSC. The second look is later by less
            // than anybody can tell a frozen guest.
            realtime_ns: if clock.flags & KVM_CLOCK_REALTIME != 0 {
                Some(clock.realtime)
            } else {
                Some(wall_clock_ns())
            },
        })
    }

    /// Sets the guest's clock to a reading and moves it forward by the wall-clock time that has
    /// passed since then. It never goes back, whatever the host's clock says.
    pub fn set_clock(&self, reading: &ClockReading) -> Result<(), KvmError> {
        let data = match reading.realtime_ns {
            // The kernel adds the time itself, at the moment of setting.
            Some(realtime) if self.clock_follows_realtime() => kvm_clock_data {
                clock: reading.clock_ns,
                flags: KVM_CLOCK_REALTIME,
                realtime,
                ..Default::default()
            },
            _ => kvm_clock_data {
                clock: reading.clock_ns.saturating_add(reading.elapsed_ns()),
                ..Default::default()
            },
        };
        self.fd.set_clock(&data).map_err(ioctl("KVM_SET_CLOCK"))
    }

    /// Whether `KVM_SET_CLOCK` can add the wall-clock time that has passed (Linux 5.16).
    pub(super) fn clock_follows_realtime(&self) -> bool {
        static FOLLOWS: OnceLock<bool> = OnceLock::new();
        *FOLLOWS.get_or_init(|| {
            let flags = self.fd.check_extension_int(Cap::AdjustClock);
            u32::try_from(flags).is_ok_and(|flags| flags & KVM_CLOCK_REALTIME != 0)
        })
    }
}

/// Whether the timer's interrupt reaches nobody, by the saved forms of the first 8259 and the I/O APIC.
/// It comes in at line 0 of both, or at 2 of the latter where a machine routes it as PCs do.
pub fn is_timer_masked(pic_master: &[u8], io_apic: &[u8]) -> bool {
    let chip = offset_of!(kvm_irqchip, chip);
    let pic = pic_master.get(chip + offset_of!(kvm_pic_state, imr));
    let entries = chip + offset_of!(kvm_ioapic_state, redirtbl);
    // Bit 16 of an entry of 8 bytes.
    let is_masked = |line: usize| {
        io_apic
            .get(entries + line * 8 + 2)
            .is_some_and(|b| b & 1 != 0)
    };
    pic.is_some_and(|mask| mask & 1 != 0) && is_masked(0) && is_masked(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_since_a_reading_is_never_negative() {
        let at = |realtime_ns| ClockReading {
            clock_ns: 5,
            realtime_ns,
        };
        assert_eq!(at(None).elapsed_ns(), 0);
        assert_eq!(at(Some(u64::MAX)).elapsed_ns(), 0);
        assert!(at(Some(0)).elapsed_ns() > 1_700_000_000_000_000_000);
    }
}
