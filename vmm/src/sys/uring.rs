// UNSAFETY: entries hold the addresses of buffers that the kernel reads or writes later. The ring owns each
// buffer, and the file, from the submission to the completion, and leaks what the kernel does not give back.
#![expect(unsafe_code, reason = "submission entries with raw buffer addresses")]
//! A ring for reads, writes and flushes of files, several at once.

use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};

/// How often in a row the kernel may ask to be asked again.
const MAX_RETRIES: u32 = 10_000;

/// What is to be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileWork {
    /// Fill the buffer from this place on.
    Read(u64),
    /// Write the buffer from this place on.
    Write(u64),
    /// Have on stable storage what was written. The buffer is not used.
    Flush,
}

/// What was done.
#[derive(Debug)]
pub struct FileDone {
    /// The number that it was given.
    pub number: usize,
    /// The buffer, back again.
    pub buffer: Vec<u8>,
    /// How many bytes were read or written: maybe fewer than there were.
    pub result: io::Result<usize>,
}

/// What the kernel works on.
struct UnderWay {
    buffer: Vec<u8>,
    /// Open as long as the kernel needs it.
    _file: Arc<File>,
}

/// A ring. One thread at a time uses it.
pub struct FileRing {
    ring: IoUring,
    /// By their numbers.
    under_way: Vec<Option<UnderWay>>,
}

impl fmt::Debug for FileRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRing")
            .field("under_way", &self.under_way.iter().flatten().count())
            .finish_non_exhaustive()
    }
}

impl FileRing {
    /// A ring for so many requests at once; an error where this host has none.
    pub fn new(depth: u32) -> io::Result<Self> {
        let ring = IoUring::new(depth)?;
        let slots = usize::try_from(depth).unwrap_or_default();
        Ok(Self {
            ring,
            under_way: (0..slots).map(|_| None).collect(),
        })
    }

    /// A number that is free; `None` where all are taken.
    pub fn free_number(&self) -> Option<usize> {
        self.under_way.iter().position(Option::is_none)
    }

    /// Begins something, by a number that is free. Gives the buffer back where it cannot.
    pub fn start(
        &mut self,
        number: usize,
        file: Arc<File>,
        work: FileWork,
        mut buffer: Vec<u8>,
    ) -> Result<(), Vec<u8>> {
        let (Some(slot @ None), Ok(length)) =
            (self.under_way.get_mut(number), u32::try_from(buffer.len()))
        else {
            return Err(buffer);
        };
        let fd = Fd(file.as_raw_fd());
        let entry = match work {
            FileWork::Read(offset) => opcode::Read::new(fd, buffer.as_mut_ptr(), length)
                .offset(offset)
                .build(),
            FileWork::Write(offset) => opcode::Write::new(fd, buffer.as_ptr(), length)
                .offset(offset)
                .build(),
            FileWork::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        let entry = entry.user_data(number as u64);
        // SAFETY: the buffer's bytes stay where they are when the vector is moved into its slot, where it is
        // until the completion of this number, and so does the file; `drop` waits for it, or leaks both.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(buffer);
        }
        *slot = Some(UnderWay {
            buffer,
            _file: file,
        });
        Ok(())
    }

    /// Hands what was begun to the kernel, where there is anything.
    pub fn hand_over(&mut self) {
        if !self.ring.submission().is_empty() {
            // What cannot be taken now is handed over with the next, or by `wait`, which says why not.
            let _ = self.ring.submit();
        }
    }

    /// Hands what was begun to the kernel, and waits until something is done; `None` where nothing is under
    /// way. After an error the ring is of no use any more.
    pub fn wait(&mut self) -> io::Result<Option<FileDone>> {
        let mut retries = 0;
        while self.under_way.iter().any(Option::is_some) {
            // What has come already is taken without asking the kernel, once all is handed over.
            if self.ring.submission().is_empty()
                && let Some(done) = self.next_done()
            {
                return Ok(Some(done));
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => (),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if !is_passing(&error) || retries >= MAX_RETRIES => return Err(error),
                Err(_) => {
                    retries += 1;
                    std::thread::yield_now();
                }
            }
            if let Some(done) = self.next_done() {
                return Ok(Some(done));
            }
        }
        Ok(None)
    }

    fn next_done(&mut self) -> Option<FileDone> {
        let entry = self.ring.completion().next()?;
        let number = usize::try_from(entry.user_data()).ok()?;
        let UnderWay { buffer, .. } = self.under_way.get_mut(number)?.take()?;
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
        Some(FileDone {
            number,
            buffer,
            result,
        })
    }
}

impl Drop for FileRing {
    /// No buffer is freed that the kernel may still write to: work on files ends by itself.
    fn drop(&mut self) {
        while let Ok(Some(_)) = self.wait() {}
        for left in self.under_way.drain(..).flatten() {
            mem::forget(left);
        }
    }
}

/// Whether the kernel only asks to be asked again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_any_order_and_each_has_its_buffer_back() {
        let Ok(mut ring) = FileRing::new(4) else {
            // A host without rings has nothing to show.
            return;
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [[1; 512], [2; 512], [3; 512]].concat()).unwrap();
        let open = Arc::new(
            File::options()
                .read(true)
                .write(true)
                .open(file.path())
                .unwrap(),
        );
        for (number, offset) in [(0, 0), (1, 512), (2, 1500)] {
            assert!(ring.free_number().is_some());
            let work = FileWork::Read(offset);
            ring.start(number, open.clone(), work, vec![0; 512])
                .unwrap();
        }
        ring.start(0, open.clone(), FileWork::Flush, Vec::new())
            .unwrap_err();
        ring.start(3, open.clone(), FileWork::Write(1536), vec![4; 512])
            .unwrap();
        assert_eq!(ring.free_number(), None);
        let mut seen = Vec::new();
        while let Some(done) = ring.wait().unwrap() {
            seen.push((done.number, done.result.unwrap(), done.buffer[0]));
        }
        seen.sort_unstable();
        assert_eq!(seen[0..2], [(0, 512, 1), (1, 512, 2)]);
        assert_eq!((seen[2].0, seen[2].2, seen[3]), (2, 3, (3, 512, 4)));
        let reader = Arc::new(File::open(file.path()).unwrap());
        ring.start(1, reader, FileWork::Write(0), vec![9; 512])
            .unwrap();
        ring.start(2, open, FileWork::Flush, Vec::new()).unwrap();
        for _ in 0..2 {
            let done = ring.wait().unwrap().unwrap();
            let errno = done.result.err().and_then(|error| error.raw_os_error());
            assert_eq!(errno, (done.number == 1).then_some(libc::EBADF));
        }
        assert!(ring.wait().unwrap().is_none());
    }
}
