#![forbid(unsafe_code)]
//! What the guest asks of a disk: a head of 16 bytes, data, and a byte for how it went.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

/// Length of a sector, in which everything is counted.
pub const SECTOR_BYTES: u64 = 512;
/// Length of the head.
pub const HEAD_BYTES: u64 = 16;
/// Length of a range to discard or zero.
const RANGE_BYTES: u64 = 16;
/// Most ranges of one request.
pub const MAX_RANGES: u32 = 16;
/// Most sectors of one range: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is done.
    Ok,
    /// It failed, or cannot be done.
    Failed,
    /// There is no such request.
    Unsupported,
}

impl Status {
    /// The byte that says so.
    pub fn code(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::Failed => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        code.to_le_bytes()[0]
    }
}

/// Bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// What is asked for: every extent lies in the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Read.
    Read(Extent),
    /// Write.
    Write(Extent),
    /// Have everything that was written on stable storage.
    Flush,
    /// Say the serial number.
    Serial,
    /// The content is not needed any more.
    Discard(Vec<Extent>),
    /// Make zero; `may_free` the storage.
    Zero {
        /// What.
        extents: Vec<Extent>,
        /// Whether storage may be given back.
        may_free: bool,
    },
}

impl Request {
    /// Reads what a chain asks of a disk of `disk_bytes` bytes, or why it cannot be done.
    pub fn parse(chain: &Chain, ram: &GuestRam, disk_bytes: u64) -> Result<Self, Status> {
        let mut head = [0; 16];
        if chain.readable_bytes() < HEAD_BYTES || chain.read(ram, 0, &mut head).is_err() {
            return Err(Status::Failed);
        }
        let kind = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let sector = u64_at(&head, 8);
        let out_bytes = chain.readable_bytes() - HEAD_BYTES;
        // The last byte is the status.
        let in_bytes = chain.writable_bytes().saturating_sub(1);
        let data = |bytes: u64| {
            let is_whole = bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES);
            let extent = extent(sector, bytes, disk_bytes).filter(|_| is_whole);
            extent.ok_or(Status::Failed)
        };
        match kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read(data(in_bytes)?)),
            VIRTIO_BLK_T_OUT => Ok(Self::Write(data(out_bytes)?)),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Serial),
            VIRTIO_BLK_T_DISCARD => {
                let (extents, flags) = ranges(chain, ram, out_bytes, disk_bytes)?;
                if flags == 0 {
                    Ok(Self::Discard(extents))
                } else {
                    Err(Status::Unsupported)
                }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (extents, flags) = ranges(chain, ram, out_bytes, disk_bytes)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Status::Unsupported);
                }
                Ok(Self::Zero {
                    extents,
                    may_free: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
                })
            }
            _ => Err(Status::Unsupported),
        }
    }
}

/// The ranges behind the head, and all their flags together.
fn ranges(
    chain: &Chain,
    ram: &GuestRam,
    bytes: u64,
    disk_bytes: u64,
) -> Result<(Vec<Extent>, u32), Status> {
    let count = bytes / RANGE_BYTES;
    if count == 0 || count > MAX_RANGES.into() || !bytes.is_multiple_of(RANGE_BYTES) {
        return Err(Status::Failed);
    }
    let mut extents = Vec::new();
    let mut all_flags = 0;
    for number in 0..count {
        let mut range = [0; 16];
        let at = HEAD_BYTES + number * RANGE_BYTES;
        chain
            .read(ram, at, &mut range)
            .map_err(|_| Status::Failed)?;
        let sectors = u32::from_le_bytes([range[8], range[9], range[10], range[11]]);
        all_flags |= u32::from_le_bytes([range[12], range[13], range[14], range[15]]);
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::Failed);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        let extent = extent(u64_at(&range, 0), bytes, disk_bytes).ok_or(Status::Failed)?;
        extents.push(extent);
    }
    Ok((extents, all_flags))
}

/// Bytes from a sector on, if all of them are in the disk.
fn extent(sector: u64, bytes: u64, disk_bytes: u64) -> Option<Extent> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let end = offset.checked_add(bytes)?;
    (end <= disk_bytes).then_some(Extent { offset, bytes })
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let word = bytes.iter().skip(at).take(8).rev();
    word.fold(0, |value, &byte| value << 8 | u64::from(byte))
}
