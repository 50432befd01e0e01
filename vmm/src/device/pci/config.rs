#![forbid(unsafe_code)]
//! The configuration registers of a function (PCI 3.0, chapter 6): what they hold, and which bits of
//! them can be written.

/// Length of the registers of a conventional function.
pub const CONFIG_BYTES: usize = 256;
/// Where the capabilities begin, behind the header.
const FIRST_CAPABILITY: usize = 0x40;
/// Offset of the command register.
const COMMAND: usize = 0x04;
/// Offset of the status register.
const STATUS: usize = 0x06;
/// Offset of the first base address register.
const BARS: usize = 0x10;
/// Offset of the pointer to the first capability.
const CAPABILITIES: usize = 0x34;
/// Command: answer to device memory.
const MEMORY_SPACE: u16 = 1 << 1;
/// Command: may read and write memory of the guest.
const BUS_MASTER: u16 = 1 << 2;
/// Command: no interrupt by pin.
const INTERRUPT_DISABLE: u16 = 1 << 10;
/// Status: there is a list of capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;
/// A base address register of 64 bits, not prefetchable.
const BAR_MEMORY_64: u64 = 0b100;
/// Bits of a memory base address register that are no address.
const BAR_FLAGS: u64 = 0xf;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device of that vendor.
    pub device: u16,
    /// Base class, subclass and programming interface, as one number.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
}

/// Where the memory of a function lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// First address as it was given at power-on.
    pub address: u64,
    /// Length: a power of two.
    pub bytes: u64,
}

/// Registers of a function with at most one base address (a pair of registers, 64 bits).
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits that a guest can write.
    writable: [u8; CONFIG_BYTES],
    bar_bytes: u64,
    /// Offset of the last capability's pointer to the next.
    last_pointer: usize,
    /// Where the next capability goes.
    next_capability: usize,
}

impl ConfigSpace {
    /// The registers of a function as after power-on.
    pub fn new(identity: Identity, bar: Option<Bar>) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar_bytes: bar.map_or(0, |bar| bar.bytes),
            last_pointer: CAPABILITIES,
            next_capability: FIRST_CAPABILITY,
        };
        let [programming, subclass, base, _] = identity.class.to_le_bytes();
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, programming, subclass, base]);
        space.set(0x2c, &identity.subsystem.0.to_le_bytes());
        space.set(0x2e, &identity.subsystem.1.to_le_bytes());
        // The interrupt line is the guest's to note down; there is no interrupt pin.
        space.allow(0x3c, &[0xff]);
        let command = MEMORY_SPACE | BUS_MASTER | INTERRUPT_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        if let Some(bar) = bar {
            space.set(BARS, &(bar.address | BAR_MEMORY_64).to_le_bytes());
            let mask = !(bar.bytes.next_power_of_two() - 1) & !BAR_FLAGS;
            space.allow(BARS, &mask.to_le_bytes());
        }
        space
    }

    /// Adds a capability: its body, without the two bytes of its head, and which bits of the body can
    /// be written. Returns its offset; `None` where there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        let pointer = u8::try_from(at).ok()?;
        if end > CONFIG_BYTES {
            return None;
        }
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.last_pointer, &[pointer]);
        self.set(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Some(at)
    }

    /// Reads; bytes behind the end are zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, &new) in (offset..).zip(data) {
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// A register of two bytes.
    pub fn u16_at(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A register of four bytes.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The offset inside the function's memory of an address; `None` where it answers to none such.
    pub fn bar_offset(&self, address: u64) -> Option<u64> {
        if self.u16_at(COMMAND) & MEMORY_SPACE == 0 || self.bar_bytes == 0 {
            return None;
        }
        let low = u64::from(self.u32_at(BARS));
        let high = u64::from(self.u32_at(BARS + 4));
        let base = (high << 32 | low) & !BAR_FLAGS;
        let offset = address.checked_sub(base)?;
        (offset < self.bar_bytes).then_some(offset)
    }

    /// All registers, to be saved.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over from saved registers what a guest can have written.
    pub fn restore(&mut self, saved: &[u8]) {
        self.write(0, saved);
    }

    /// What cannot be written differs from saved registers at this offset.
    pub fn first_difference(&self, saved: &[u8]) -> Option<usize> {
        if saved.len() != CONFIG_BYTES {
            return Some(saved.len());
        }
        let registers = self.bytes.iter().zip(&self.writable).zip(saved);
        registers
            .enumerate()
            .find_map(|(at, ((ours, mask), theirs))| ((ours ^ theirs) & !mask != 0).then_some(at))
    }

    fn set(&mut self, offset: usize, data: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(offset..offset + data.len()) {
            bytes.copy_from_slice(data);
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        if let Some(bytes) = self.writable.get_mut(offset..offset + mask.len()) {
            bytes.copy_from_slice(mask);
        }
    }
}
