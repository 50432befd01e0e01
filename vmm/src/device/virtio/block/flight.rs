#![forbid(unsafe_code)]
//! Requests of a disk that are under way at once, on a ring of the device's own.
//!
//! The ring is made when requests wait behind each other for the first time: a clone that does not use its
//! disk, or asks for one thing at a time, has none. Data goes through buffers of the device, never from or to
//! guest memory itself. A host that refuses rings has requests done one after the other.

use std::fs::File;
use std::io;
use std::mem;
use std::sync::{Arc, Once};

use super::request::Extent;
use crate::device::virtio::device::MAX_UNDER_WAY;
use crate::device::virtio::queue::Chain;
use crate::sys::uring::{FileRing, FileWork};

/// Most bytes of a request on the ring; one that has more is done by itself, piece by piece.
const MAX_FLIGHT_BYTES: u64 = 256 << 10;
/// Fewest bytes of a write on the ring. The kernel hands a write of a cached file to a thread; a shorter one is
/// in the cache by then (measured on ext4: 4 KiB take 7 us so, and 20 us on the ring; 64 KiB take 55 and 45).
const MIN_WRITE_BYTES: u64 = 64 << 10;
/// Most bytes of buffers that are kept for the next requests.
const MAX_SPARE_BYTES: usize = 1 << 20;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    Read(Extent),
    Write(Extent),
    Flush,
}

impl Job {
    fn bytes(self) -> usize {
        match self {
            Self::Read(extent) | Self::Write(extent) => {
                usize::try_from(extent.bytes).unwrap_or_default()
            }
            Self::Flush => 0,
        }
    }
}

/// A request that is over.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) chain: Chain,
    pub(super) job: Job,
    /// What was read, or written.
    pub(super) buffer: Vec<u8>,
    /// Whether all of it was; else maybe a part.
    pub(super) result: io::Result<()>,
    /// The ring broke: what became of it is not known, and it is done again.
    pub(super) is_lost: bool,
}

/// The ring, as far as there is one.
#[derive(Debug, Default)]
enum State {
    /// Nobody has needed it.
    #[default]
    Unused,
    Ring(Box<FileRing>),
    /// There is none, or it broke.
    Refused,
}

/// All requests that are under way.
#[derive(Debug)]
pub(super) struct Flights {
    state: State,
    /// [`MIN_WRITE_BYTES`].
    min_write_bytes: u64,
    /// By their numbers on the ring.
    jobs: Vec<Option<(Chain, Job)>>,
    /// Requests of a ring that broke: what became of them is not known.
    lost: Vec<(Chain, Job)>,
    spare: Vec<Vec<u8>>,
}

impl Default for Flights {
    fn default() -> Self {
        Self {
            state: State::Unused,
            min_write_bytes: MIN_WRITE_BYTES,
            jobs: Vec::new(),
            lost: Vec::new(),
            spare: Vec::new(),
        }
    }
}

impl Flights {
    /// With writes of any length on the ring.
    #[cfg(test)]
    pub(super) fn eager() -> Self {
        Self {
            min_write_bytes: 0,
            ..Self::default()
        }
    }

    /// On a host without rings.
    #[cfg(test)]
    pub(super) fn refused() -> Self {
        Self {
            state: State::Refused,
            ..Self::default()
        }
    }

    /// Whether something can be begun.
    pub(super) fn can_start(&mut self) -> bool {
        if matches!(self.state, State::Unused) {
            let depth = u32::try_from(MAX_UNDER_WAY).unwrap_or(1);
            self.state = match FileRing::new(depth) {
                Ok(ring) => State::Ring(Box::new(ring)),
                Err(error) => {
                    tell(&error);
                    State::Refused
                }
            };
            self.jobs.resize_with(MAX_UNDER_WAY, || None);
        }
        matches!(&self.state, State::Ring(ring) if ring.free_number().is_some())
    }

    /// Whether a request of this kind and length gains by being under way with others.
    pub(super) fn takes(&self, job: Job) -> bool {
        match job {
            Job::Read(extent) => extent.bytes <= MAX_FLIGHT_BYTES,
            Job::Write(extent) => (self.min_write_bytes..=MAX_FLIGHT_BYTES).contains(&extent.bytes),
            Job::Flush => true,
        }
    }

    /// A buffer for a request.
    pub(super) fn buffer(&mut self, job: Job) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(job.bytes(), 0);
        buffer
    }

    /// Keeps a buffer for the next request.
    pub(super) fn keep(&mut self, buffer: Vec<u8>) {
        let kept: usize = self.spare.iter().map(Vec::capacity).sum();
        if buffer.capacity() > 0 && kept + buffer.capacity() <= MAX_SPARE_BYTES {
            self.spare.push(buffer);
        }
    }

    /// Begins a request; gives it back where that cannot be.
    pub(super) fn start(
        &mut self,
        chain: Chain,
        job: Job,
        file: Arc<File>,
        buffer: Vec<u8>,
    ) -> Result<(), Chain> {
        let work = match job {
            Job::Read(extent) => FileWork::Read(extent.offset),
            Job::Write(extent) => FileWork::Write(extent.offset),
            Job::Flush => FileWork::Flush,
        };
        let State::Ring(ring) = &mut self.state else {
            return Err(chain);
        };
        let number = ring.free_number();
        let Some((number, slot)) =
            number.and_then(|number| Some((number, self.jobs.get_mut(number)?)))
        else {
            return Err(chain);
        };
        match ring.start(number, file, work, buffer) {
            Ok(()) => {
                *slot = Some((chain, job));
                Ok(())
            }
            Err(buffer) => {
                self.keep(buffer);
                Err(chain)
            }
        }
    }

    /// Waits for a request; `None` where none is under way.
    pub(super) fn finish(&mut self) -> Option<Landed> {
        if let State::Ring(ring) = &mut self.state {
            match ring.wait() {
                Ok(None) => (),
                Ok(Some(done)) => {
                    let (chain, job) = self.jobs.get_mut(done.number)?.take()?;
                    let result = done.result.and_then(|bytes| {
                        if bytes == job.bytes() {
                            Ok(())
                        } else {
                            Err(io::ErrorKind::UnexpectedEof.into())
                        }
                    });
                    return Some(Landed {
                        chain,
                        job,
                        buffer: done.buffer,
                        result,
                        is_lost: false,
                    });
                }
                Err(error) => {
                    tracing::error!("the ring of a disk broke, requests are done singly: {error}");
                    self.state = State::Refused;
                    self.lost
                        .extend(self.jobs.iter_mut().filter_map(Option::take));
                }
            }
        }
        let (chain, job) = self.lost.pop()?;
        Some(Landed {
            chain,
            job,
            buffer: Vec::new(),
            result: Err(io::Error::other("the ring broke")),
            is_lost: true,
        })
    }

    /// Hands what was begun to the kernel, without waiting for it.
    pub(super) fn hand_over(&mut self) {
        if let State::Ring(ring) = &mut self.state {
            ring.hand_over();
        }
    }

    /// Gives buffers back that nothing needs while the disk rests.
    pub(super) fn rest(&mut self) {
        drop(mem::take(&mut self.spare));
    }
}

/// Says, once, that this host has no rings.
fn tell(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            "this host refuses io_uring ({error}): requests of disks are done one after the other (pando doctor \
             says what to change)"
        );
    });
}
