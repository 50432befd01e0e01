#![forbid(unsafe_code)]
//! From an address to the device that is there. Port I/O and device memory are separate types.
//!
//! An access belongs to the device whose range holds its first byte. Bytes that reach past the end
//! of that range, and bytes that nobody claims, read as `0xff`; such writes go nowhere. No access
//! of a guest can fail.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// What a write asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub enum DeviceEvent {
    /// Nothing.
    #[default]
    None,
    /// Start again.
    Reset,
    /// End.
    PowerOff,
}

/// A device behind I/O ports.
///
/// Each call is one access of 1, 2 or 4 bytes: string instructions are taken apart by the caller.
/// `offset + data.len()` never exceeds the range under which the device was inserted. A device must
/// not panic or block, whatever the guest does.
pub trait PioDevice {
    /// Fills `data`, which comes in as all `0xff`.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent;
}

/// A device behind guest physical addresses. The rules are those of [`PioDevice`], with accesses
/// of 1 to 8 bytes.
pub trait MmioDevice {
    /// Fills `data`, which comes in as all `0xff`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]) -> DeviceEvent;
}

/// Why a device cannot be inserted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range holds nothing.
    #[error("device range {first:#x} to {end:#x} is empty")]
    Empty {
        /// First address.
        first: u64,
        /// First address behind it.
        end: u64,
    },
    /// Another device is there already.
    #[error("device range {first:#x} to {end:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address.
        first: u64,
        /// First address behind it.
        end: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

/// The I/O ports of a machine.
#[derive(Default)]
pub struct PioBus {
    ranges: Ranges<dyn PioDevice + Send>,
    dropped: Dropped,
}

/// The device memory of a machine.
#[derive(Default)]
pub struct MmioBus {
    ranges: Ranges<dyn MmioDevice + Send>,
    dropped: Dropped,
}

impl PioBus {
    /// No device at all.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at a range of ports.
    pub fn insert(
        &mut self,
        ports: Range<u16>,
        device: Arc<Mutex<dyn PioDevice + Send>>,
    ) -> Result<(), BusError> {
        self.ranges
            .insert(u64::from(ports.start)..u64::from(ports.end), device)
    }

    /// One access of a guest that reads.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset, length)) = self.ranges.find(u64::from(port), data.len()) {
            // A range of ports never exceeds 16 bits.
            let offset = u16::try_from(offset).unwrap_or(u16::MAX);
            lock(device).read(offset, &mut data[..length]);
        }
    }

    /// One access of a guest that writes.
    pub fn write(&self, port: u16, data: &[u8]) -> DeviceEvent {
        match self.ranges.find(u64::from(port), data.len()) {
            Some((device, offset, length)) => {
                let offset = u16::try_from(offset).unwrap_or(u16::MAX);
                lock(device).write(offset, &data[..length])
            }
            None => {
                self.dropped.note("a port", u64::from(port));
                DeviceEvent::None
            }
        }
    }

    /// Writes so far that no device took.
    #[must_use]
    pub fn dropped_writes(&self) -> u64 {
        self.dropped.count()
    }
}

impl MmioBus {
    /// No device at all.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at a range of guest physical addresses.
    pub fn insert(
        &mut self,
        addresses: Range<u64>,
        device: Arc<Mutex<dyn MmioDevice + Send>>,
    ) -> Result<(), BusError> {
        self.ranges.insert(addresses, device)
    }

    /// One access of a guest that reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset, length)) = self.ranges.find(address, data.len()) {
            lock(device).read(offset, &mut data[..length]);
        }
    }

    /// One access of a guest that writes.
    pub fn write(&self, address: u64, data: &[u8]) -> DeviceEvent {
        match self.ranges.find(address, data.len()) {
            Some((device, offset, length)) => lock(device).write(offset, &data[..length]),
            None => {
                self.dropped.note("an address", address);
                DeviceEvent::None
            }
        }
    }

    /// Writes so far that no device took.
    #[must_use]
    pub fn dropped_writes(&self) -> u64 {
        self.dropped.count()
    }
}

/// Counts writes that nobody took. A guest decides how many there are, so that only the 1st, 2nd,
/// 4th, 8th... of them makes a line in the log.
#[derive(Debug, Default)]
struct Dropped(AtomicU64);

impl Dropped {
    fn note(&self, what: &str, at: u64) {
        let count = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::debug!(
                at = format_args!("{at:#x}"),
                count,
                "a write to {what} without a device"
            );
        }
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for PioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ranges.fmt("PioBus", f)
    }
}

impl fmt::Debug for MmioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ranges.fmt("MmioBus", f)
    }
}

/// A device that panicked has broken its contract; the others, and the guest, go on.
fn lock<D: ?Sized>(device: &Mutex<D>) -> std::sync::MutexGuard<'_, D> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Disjoint ranges by their first address, each with its end and its device.
struct Ranges<D: ?Sized> {
    by_first: BTreeMap<u64, (u64, Arc<Mutex<D>>)>,
}

impl<D: ?Sized> Default for Ranges<D> {
    fn default() -> Self {
        Self {
            by_first: BTreeMap::new(),
        }
    }
}

impl<D: ?Sized> Ranges<D> {
    fn insert(&mut self, range: Range<u64>, device: Arc<Mutex<D>>) -> Result<(), BusError> {
        let Range { start: first, end } = range;
        if first >= end {
            return Err(BusError::Empty { first, end });
        }
        if let Some((&other, (other_end, _))) = self.by_first.range(..end).next_back()
            && *other_end > first
        {
            return Err(BusError::Overlap { first, end, other });
        }
        self.by_first.insert(first, (end, device));
        Ok(())
    }

    /// The device at `address`, the offset inside its range, and how many of `length` bytes are its.
    fn find(&self, address: u64, length: usize) -> Option<(&Mutex<D>, u64, usize)> {
        let (&first, (end, device)) = self.by_first.range(..=address).next_back()?;
        let room = end.checked_sub(address).filter(|&room| room > 0)?;
        let length = usize::try_from(room).map_or(length, |room| room.min(length));
        Some((device, address - first, length))
    }

    fn fmt(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{name}")?;
        f.debug_list()
            .entries(
                self.by_first
                    .iter()
                    .map(|(first, (end, _))| format!("{first:#x}..{end:#x}")),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl PioDevice for Recorder {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
            self.writes.push((u64::from(offset), data.to_vec()));
            DeviceEvent::Reset
        }
    }

    impl MmioDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> DeviceEvent {
            self.writes.push((offset, data.to_vec()));
            DeviceEvent::PowerOff
        }
    }

    fn recorder() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    #[test]
    fn what_nobody_claims_reads_all_ones_and_swallows_writes() {
        let bus = PioBus::new();
        let mut data = [0; 4];
        bus.read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.write(0xcf8, &[1, 2, 3, 4]), DeviceEvent::None);
        assert_eq!(bus.dropped_writes(), 1);
    }

    #[test]
    fn a_device_sees_offsets_and_only_its_own_bytes() {
        let device = recorder();
        let mut bus = PioBus::new();
        bus.insert(0x3f8..0x400, device.clone()).unwrap();
        assert_eq!(bus.write(0x3fe, &[1, 2, 3, 4]), DeviceEvent::Reset);
        assert_eq!(bus.write(0x3f7, &[9]), DeviceEvent::None);
        assert_eq!(bus.write(0x400, &[9]), DeviceEvent::None);
        assert_eq!(device.lock().unwrap().writes, [(6, vec![1, 2])]);
        let mut data = [0; 4];
        bus.read(0x3fe, &mut data);
        assert_eq!(data, [6, 6, 0xff, 0xff]);
    }

    #[test]
    fn the_last_port_is_not_past_the_end() {
        let device = recorder();
        let mut bus = PioBus::new();
        bus.insert(0xfff0..0xffff, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0xffff, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0xfffe, &mut data);
        assert_eq!(data, [14, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let mut bus = PioBus::new();
        bus.insert(0x60..0x65, recorder()).unwrap();
        for range in [0x64..0x66, 0x5f..0x61, 0x61..0x62, 0x50..0x70] {
            let error = bus.insert(range, recorder()).unwrap_err();
            assert!(matches!(error, BusError::Overlap { other: 0x60, .. }));
        }
        #[expect(clippy::reversed_empty_ranges, reason = "what is tested")]
        let backwards = 0x20..0x10;
        assert!(matches!(
            bus.insert(backwards, recorder()),
            Err(BusError::Empty { .. })
        ));
        bus.insert(0x65..0x66, recorder()).unwrap();
        assert_eq!(format!("{bus:?}"), r#"PioBus["0x60..0x65", "0x65..0x66"]"#);
    }

    #[test]
    fn device_memory_works_alike_up_to_the_end_of_the_address_space() {
        let device = recorder();
        let mut bus = MmioBus::new();
        bus.insert(u64::MAX - 8..u64::MAX, device.clone()).unwrap();
        assert_eq!(
            bus.write(u64::MAX - 2, &[1, 2, 3, 4]),
            DeviceEvent::PowerOff
        );
        assert_eq!(device.lock().unwrap().writes, [(6, vec![1, 2])]);
        let mut data = [0; 8];
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
}
