#![forbid(unsafe_code)]
//! Template files through the ring.

use std::time::Instant;

use super::{PageRead, PageSource, ReadDone, ReadPort, Started};

/// Reads through io_uring: registered files, registered buffers, which the ring owns meanwhile.
#[derive(Debug, Default)]
pub(crate) struct FileSource;

impl PageSource for FileSource {
    fn start(&mut self, read: PageRead, port: &mut ReadPort<'_>) -> Started {
        let Some(ring) = port.0.as_deref_mut() else {
            return Started::Busy(read);
        };
        let PageRead {
            slot,
            number,
            file,
            offset,
            bytes,
            lease,
        } = read;
        match ring.read(slot, number, offset.get(), bytes, lease) {
            Ok(()) => Started::Pending,
            Err(lease) => Started::Busy(PageRead {
                slot,
                number,
                file,
                offset,
                bytes,
                lease,
            }),
        }
    }

    fn finish(&mut self, done: ReadDone) -> Option<ReadDone> {
        Some(done)
    }

    fn tick(&mut self, _now: Instant, _done: &mut Vec<ReadDone>) {}

    fn next_due(&self) -> Option<Instant> {
        None
    }
}
