#![forbid(unsafe_code)]
//! The device: answers requests from its image.

use std::io;

use rustix::io::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::backend::Disk;
use super::flight::{Flights, Job, Landed};
use super::request::{
    Extent, HEAD_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, Request, SECTOR_BYTES, Status,
};
use super::state::BlockState;
use crate::device::virtio::device::{Begun, DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::limit::Limiter;
use crate::device::virtio::queue::{Chain, MAX_REQUEST_BYTES};
use crate::memory::guest::GuestRam;
use crate::spec::MAX_SERIAL_BYTES;

/// Entries of the queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Most pieces of data of one request: head and status take a descriptor each.
const MAX_PIECES: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of a piece: with the most pieces, less than a request can have.
const MAX_PIECE_BYTES: u32 = 128 << 10;
const _: () = assert!(MAX_PIECES as u64 * MAX_PIECE_BYTES as u64 + HEAD_BYTES < MAX_REQUEST_BYTES);
/// Physical blocks are this power of two of sectors: 4 KiB.
const PHYSICAL_EXPONENT: u8 = 3;
/// Sectors in a page, which is what is best discarded.
const DISCARD_ALIGN_SECTORS: u32 = 8;
/// Length of the registers.
const CONFIG_BYTES: usize = 60;
/// What is copied between image and guest at once.
const BUFFER_BYTES: usize = 128 << 10;

static TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_BLOCK.to_le_bytes()[0] as u16,
    kind: "virtio-blk",
    version: 1,
    // Mass storage: SCSI, as QEMU has it.
    pci_class: 0x01_0000,
    queues: &[QUEUE_SIZE],
};

/// A disk.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    serial: [u8; MAX_SERIAL_BYTES],
    config: [u8; CONFIG_BYTES],
    buffer: Vec<u8>,
    flights: Flights,
    failures: u64,
    /// A guest that does not flush may take what is answered to be durable (virtio 1.2, 5.2.6.2).
    is_write_through: bool,
    limiter: Option<Limiter>,
}

impl Block {
    /// A disk with a serial number of at most [`MAX_SERIAL_BYTES`] bytes.
    pub fn new(disk: Disk, serial: &str) -> Self {
        let mut padded = [0; MAX_SERIAL_BYTES];
        for (place, byte) in padded.iter_mut().zip(serial.bytes()) {
            *place = byte;
        }
        Self {
            config: config(&disk),
            disk,
            serial: padded,
            buffer: Vec::new(),
            flights: Flights::default(),
            failures: 0,
            is_write_through: false,
            limiter: None,
        }
    }

    /// The same disk with a limit to how fast it is used. A reset of the device leaves the limit as it is.
    #[must_use]
    pub fn with_limiter(self, limiter: Option<Limiter>) -> Self {
        Self { limiter, ..self }
    }

    /// The same disk, with its ring for writes of any length, or on a host that refuses rings.
    #[cfg(test)]
    pub(in crate::device::virtio) fn with_ring(self, has_ring: bool) -> Self {
        let flights = if has_ring {
            Flights::eager()
        } else {
            Flights::refused()
        };
        Self { flights, ..self }
    }

    /// Does what is asked for; how many bytes the guest got.
    fn serve(&mut self, chain: &Chain, ram: &GuestRam) -> Result<u64, Status> {
        let bytes = self.obey(chain, ram)?;
        if self.is_write_through {
            self.flush_pending()?;
        }
        Ok(bytes)
    }

    fn flush_pending(&mut self) -> Result<(), Status> {
        if self.disk.has_pending_writes() {
            self.noted("flushed", |disk| disk.flush())?;
        }
        Ok(())
    }

    fn obey(&mut self, chain: &Chain, ram: &GuestRam) -> Result<u64, Status> {
        let request = Request::parse(chain, ram, self.disk.bytes())?;
        match request {
            Request::Read(extent) => self.read(chain, ram, extent),
            Request::Write(extent) => self.write(chain, ram, extent).map(|()| 0),
            Request::Serial => {
                let room = usize::try_from(chain.writable_bytes() - 1).unwrap_or(usize::MAX);
                let serial = &self.serial[..room.min(MAX_SERIAL_BYTES)];
                chain.write(ram, 0, serial).map_err(|_| Status::Failed)?;
                Ok(serial.len() as u64)
            }
            Request::Flush => self.noted("flushed", |disk| disk.flush()).map(|()| 0),
            Request::Discard(extents) => self
                .noted("discarded", |disk| {
                    extents.iter().try_for_each(|&extent| disk.discard(extent))
                })
                .map(|()| 0),
            Request::Zero { extents, may_free } => self
                .noted("zeroed", |disk| {
                    extents
                        .iter()
                        .try_for_each(|&extent| disk.zero(extent, may_free))
                })
                .map(|()| 0),
        }
    }

    fn read(&mut self, chain: &Chain, ram: &GuestRam, extent: Extent) -> Result<u64, Status> {
        let mut done = 0;
        while done < extent.bytes {
            let mut buffer = self.take_buffer(extent.bytes - done);
            let offset = extent.offset + done;
            let read = self.noted("read", |disk| disk.read_at(offset, &mut buffer));
            let copied = read.and_then(|()| {
                let written = chain.write(ram, done, &buffer);
                written.map_err(|_| Status::Failed)
            });
            done += buffer.len() as u64;
            self.buffer = buffer;
            copied?;
        }
        Ok(done)
    }

    fn write(&mut self, chain: &Chain, ram: &GuestRam, extent: Extent) -> Result<(), Status> {
        if self.disk.is_readonly() {
            return Err(Status::Failed);
        }
        let mut done = 0;
        while done < extent.bytes {
            let mut buffer = self.take_buffer(extent.bytes - done);
            let offset = extent.offset + done;
            let copied = chain.read(ram, HEAD_BYTES + done, &mut buffer);
            let written = copied
                .map_err(|_| Status::Failed)
                .and_then(|()| self.noted("written", |disk| disk.write_at(offset, &buffer)));
            done += buffer.len() as u64;
            self.buffer = buffer;
            written?;
        }
        Ok(())
    }

    /// Begins what can be under way with others; gives back what cannot.
    fn take_off(&mut self, chain: Chain, ram: &GuestRam) -> Result<(), Chain> {
        // A guest that does not flush has each request made durable before the next.
        if self.is_write_through {
            return Err(chain);
        }
        let (job, file) = match Request::parse(&chain, ram, self.disk.bytes()) {
            Ok(Request::Read(extent)) => (Job::Read(extent), self.disk.file_to_read(extent)),
            Ok(Request::Write(extent)) => (Job::Write(extent), self.disk.file_to_write()),
            Ok(Request::Flush) => (Job::Flush, self.disk.file_to_write()),
            _ => return Err(chain),
        };
        let Some(file) = file else {
            return Err(chain);
        };
        if !self.flights.takes(job) || !self.flights.can_start() {
            return Err(chain);
        }
        let mut buffer = self.flights.buffer(job);
        if matches!(job, Job::Write(_)) && chain.read(ram, HEAD_BYTES, &mut buffer).is_err() {
            return Err(chain);
        }
        if job == Job::Flush {
            self.disk.begin_flush();
        }
        self.flights.start(chain, job, file, buffer)
    }

    /// What became of a request that was under way; how many bytes the guest got.
    fn land(&mut self, landed: &mut Landed, ram: &GuestRam) -> Result<u64, Status> {
        let result = std::mem::replace(&mut landed.result, Ok(()));
        let buffer = &mut landed.buffer;
        match landed.job {
            Job::Flush => {
                self.noted("flushed", |disk| match result {
                    // Not again: what has failed once is forgotten by the kernel.
                    Err(error) if was_tried(&error) => {
                        disk.flush_failed();
                        Err(error)
                    }
                    Err(_) => disk.flush(),
                    Ok(()) => Ok(()),
                })?;
                Ok(0)
            }
            Job::Read(extent) => {
                self.noted("read", |disk| match result {
                    Ok(()) => Ok(()),
                    Err(_) => disk.read_at(extent.offset, buffer),
                })?;
                let written = landed.chain.write(ram, 0, buffer);
                written.map_err(|_| Status::Failed)?;
                Ok(extent.bytes)
            }
            Job::Write(extent) => {
                self.noted("written", |disk| match result {
                    Err(_) => disk.write_at(extent.offset, buffer),
                    Ok(()) => disk.written(Ok(())),
                })?;
                Ok(0)
            }
        }
    }

    /// Says how a request went; how many bytes of its memory were written.
    fn say(&self, request: &Chain, ram: &GuestRam, served: Result<u64, Status>) -> u32 {
        let Some(last) = request.writable_bytes().checked_sub(1) else {
            // There is nowhere to say it.
            return 0;
        };
        let (status, bytes) = match served {
            Ok(bytes) => (Status::Ok, bytes),
            Err(status) => (status, 0),
        };
        match request.write(ram, last, &[status.code()]) {
            Ok(()) => u32::try_from(bytes + 1).unwrap_or(u32::MAX),
            Err(_) => 0,
        }
    }

    /// The buffer, as long as what is left or as it can be.
    fn take_buffer(&mut self, left: u64) -> Vec<u8> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let length = usize::try_from(left).map_or(BUFFER_BYTES, |left| left.min(BUFFER_BYTES));
        buffer.resize(length, 0);
        buffer
    }

    /// Does something with the image. What fails is a line in the log the 1st, 2nd, 4th, 8th... time:
    /// the guest decides how often it tries.
    fn noted(
        &mut self,
        done: &str,
        act: impl FnOnce(&mut Disk) -> io::Result<()>,
    ) -> Result<(), Status> {
        act(&mut self.disk).map_err(|error| {
            self.failures += 1;
            if self.failures.is_power_of_two() {
                let failures = self.failures;
                tracing::warn!(failures, "a disk could not be {done}: {error}");
            }
            Status::Failed
        })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        let more = if self.disk.is_readonly() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | more
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, _queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        if request.writable_bytes() == 0 {
            // There is nowhere to say how it went.
            return 0;
        }
        let served = self.serve(request, ram);
        self.say(request, ram, served)
    }

    fn start(&mut self, queue: usize, request: Chain, ram: &GuestRam) -> Begun {
        let begun = if request.writable_bytes() == 0 {
            Err(request)
        } else {
            self.take_off(request, ram)
        };
        match begun {
            Ok(()) => Begun::UnderWay,
            Err(request) => {
                // What was asked for before is worked on meanwhile.
                self.flights.hand_over();
                let bytes = self.process(queue, &request, ram);
                Begun::Done(request, bytes)
            }
        }
    }

    fn finish(&mut self, ram: &GuestRam) -> Option<(Chain, u32)> {
        let mut landed = self.flights.finish()?;
        let served = if landed.is_lost {
            self.serve(&landed.chain, ram)
        } else {
            self.land(&mut landed, ram)
        };
        let Landed { chain, buffer, .. } = landed;
        self.flights.keep(buffer);
        let bytes = self.say(&chain, ram, served);
        Some((chain, bytes))
    }

    fn reset(&mut self) {
        // What the guest asked for and hears no more of is done all the same.
        while let Some(landed) = self.flights.finish() {
            if let Job::Write(_) = landed.job {
                let _noted = self.disk.written(landed.result);
            }
        }
    }

    fn limit(&mut self, _queue: usize, request: &Chain) -> Option<(&mut Limiter, u64)> {
        // All between the head and the status: what is read or written, or says what to discard.
        let out_bytes = request.readable_bytes().saturating_sub(HEAD_BYTES);
        let in_bytes = request.writable_bytes().saturating_sub(1);
        Some((self.limiter.as_mut()?, out_bytes + in_bytes))
    }

    fn activate(&mut self, features: u64) -> Result<(), VirtioStateError> {
        self.is_write_through = features >> VIRTIO_BLK_F_FLUSH & 1 == 0;
        Ok(())
    }

    fn settle(&mut self) {
        // What fails is in the log, and counted.
        let _noted = self.flush_pending();
        self.flights.rest();
    }

    fn save(&self) -> Vec<u8> {
        let state = BlockState {
            sectors: self.disk.bytes() / SECTOR_BYTES,
            is_readonly: self.disk.is_readonly(),
        };
        // Two integers into memory: there is no way to fail.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let state = BlockState::decode(state)?;
        let sectors = self.disk.bytes() / SECTOR_BYTES;
        if state.sectors != sectors {
            return Err(VirtioStateError::new(format!(
                "the guest knows a disk of {} sectors, its image has {sectors}",
                state.sectors
            )));
        }
        if state.is_readonly != self.disk.is_readonly() {
            let word = |is_readonly| if is_readonly { "read-only" } else { "writable" };
            return Err(VirtioStateError::new(format!(
                "the guest knows a {} disk, its image is {}",
                word(state.is_readonly),
                word(self.disk.is_readonly())
            )));
        }
        Ok(())
    }
}

/// Whether the kernel has done what failed, and not only failed to begin.
fn was_tried(error: &io::Error) -> bool {
    let never = [
        Errno::CANCELED,
        Errno::AGAIN,
        Errno::BUSY,
        Errno::INTR,
        Errno::NOMEM,
    ];
    Errno::from_io_error(error).is_some_and(|errno| !never.contains(&errno))
}

/// The registers (virtio 1.2, 5.2.4).
fn config(disk: &Disk) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.bytes() / SECTOR_BYTES).to_le_bytes());
    put(8, &MAX_PIECE_BYTES.to_le_bytes());
    put(12, &MAX_PIECES.to_le_bytes());
    put(20, &512_u32.to_le_bytes());
    put(24, &[PHYSICAL_EXPONENT]);
    put(34, &1_u16.to_le_bytes());
    // Discards, then zeroes.
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &DISCARD_ALIGN_SECTORS.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}
