#![forbid(unsafe_code)]
//! The words in which KVM and the vCPU loop talk: how the guest is entered and why it was left.

/// How to enter the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmEntry {
    /// Finish what the last exit left open, then run guest instructions until the next exit.
    Run,
    /// Only finish what the last exit left open: no guest instruction runs.
    Retire,
}

/// Why the guest was left.
///
/// Data of accesses lies in the page that KVM shares with this process; a read is answered by
/// filling it in before the next entry.
#[derive(Debug, PartialEq, Eq)]
pub enum VmExit<'run> {
    /// The guest reads a port; `data` holds one element of `width` bytes, or several for a string
    /// instruction.
    PioRead {
        /// Port number.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// Where the answer goes.
        data: &'run mut [u8],
    },
    /// The guest writes a port.
    PioWrite {
        /// Port number.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// What it wrote.
        data: &'run [u8],
    },
    /// The guest reads an address that no memory slot provides.
    MmioRead {
        /// Guest physical address.
        guest_address: u64,
        /// Where the answer goes, 1 to 8 bytes.
        data: &'run mut [u8],
    },
    /// The guest writes an address that no memory slot provides.
    MmioWrite {
        /// Guest physical address.
        guest_address: u64,
        /// What it wrote, 1 to 8 bytes.
        data: &'run [u8],
    },
    /// A signal, a kick, or KVM itself ended the stay in the guest; nothing is left open.
    Interrupted,
    /// The guest halted. With the local APIC in the kernel KVM handles this itself.
    Halted,
    /// Triple fault.
    Shutdown,
    /// The guest asked the host, through KVM, for something that x86 guests do not ask for.
    SystemEvent {
        /// KVM's number of the event.
        event: u32,
    },
    /// Guest memory cannot be read: the page is poisoned, or its backing is gone.
    MemoryError {
        /// Address in the guest, where KVM or the signal named it.
        address: FaultAddress,
    },
    /// The processor refused to enter the guest.
    EntryFailed {
        /// The processor's reason (VM-entry failure or VMRUN exit code).
        reason: u64,
    },
    /// KVM could not go on, most often because it cannot emulate an instruction.
    InternalError {
        /// KVM's suberror: 1 emulation, 2 simultaneous exceptions, 3 delivery of an event, 4
        /// unexpected exit.
        suberror: u32,
    },
    /// An exit that was never asked for.
    Unexpected {
        /// KVM's number of the exit.
        reason: u32,
    },
}

/// Where guest memory could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAddress {
    /// A guest physical address.
    Guest(u64),
    /// An address in this process, from a SIGBUS.
    Host(u64),
    /// Nobody said.
    Unknown,
}

impl VmExit<'_> {
    /// Whether the vCPU's state may be saved at this exit.
    ///
    /// At port and memory accesses KVM holds half of an instruction back: registers are final only
    /// after the next entry (Linux, Documentation/virt/kvm/api.rst, `KVM_RUN`).
    pub fn is_consistent(&self) -> bool {
        match self {
            Self::PioRead { .. }
            | Self::PioWrite { .. }
            | Self::MmioRead { .. }
            | Self::MmioWrite { .. }
            | Self::SystemEvent { .. }
            | Self::Unexpected { .. } => false,
            Self::Interrupted
            | Self::Halted
            | Self::Shutdown
            | Self::MemoryError { .. }
            | Self::EntryFailed { .. }
            | Self::InternalError { .. } => true,
        }
    }
}
