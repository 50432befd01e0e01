#![forbid(unsafe_code)]
//! Template files through pread(2): where io_uring is refused.
//!
//! What is in the page cache is read on the spot (RWF_NOWAIT); the rest goes to a few threads, so
//! that a slow disk delays neither zero pages nor deadlines.

use std::io;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded};
use rustix::io::{Errno, ReadWriteFlags, pread, preadv2};

use super::{PageRead, PageSource, ReadDone, ReadPort, Started};

/// How long the end of a pager waits for its reading threads.
const JOIN_LIMIT: Duration = Duration::from_secs(2);

/// Reads with a bounded pool of threads; `signal` becomes readable when one of them is done.
#[derive(Debug)]
pub(crate) struct PreadSource {
    jobs: Option<Sender<PageRead>>,
    results: Receiver<ReadDone>,
    threads: Vec<JoinHandle<()>>,
}

impl PreadSource {
    /// `threads` readers, at least one, that take at most `reads` reads in flight.
    pub(crate) fn new(threads: usize, reads: usize, signal: &Arc<OwnedFd>) -> io::Result<Self> {
        let (jobs, job_queue) = bounded::<PageRead>(reads.max(1));
        let (result_queue, results) = bounded(reads.max(1));
        let mut source = Self {
            jobs: Some(jobs),
            results,
            threads: Vec::new(),
        };
        for number in 0..threads.max(1) {
            let (jobs, results) = (job_queue.clone(), result_queue.clone());
            let signal = Arc::clone(signal);
            let thread = std::thread::Builder::new()
                .name(format!("pando-read-{number}"))
                .spawn(move || work(&jobs, &results, &signal))?;
            source.threads.push(thread);
        }
        Ok(source)
    }
}

/// One reader: until nobody can send jobs any more.
fn work(jobs: &Receiver<PageRead>, results: &Sender<ReadDone>, signal: &OwnedFd) {
    for mut read in jobs {
        let bytes = read.bytes.min(read.lease.len());
        let result = pread(
            &read.file,
            &mut read.lease.bytes_mut()[..bytes],
            read.offset.get(),
        );
        if results.send(done(read, result)).is_err() {
            return;
        }
        // Fails only when the counter is full, and then the pager is signalled already.
        let _full = rustix::io::write(signal, &1u64.to_ne_bytes());
    }
}

fn done(read: PageRead, result: Result<usize, Errno>) -> ReadDone {
    ReadDone {
        slot: read.slot,
        lease: read.lease,
        result: result.map_err(Errno::raw_os_error),
    }
}

impl PageSource for PreadSource {
    fn start(&mut self, mut read: PageRead, _port: &mut ReadPort<'_>) -> Started {
        let bytes = read.bytes.min(read.lease.len());
        let mut buffers = [IoSliceMut::new(&mut read.lease.bytes_mut()[..bytes])];
        let now = preadv2(
            &read.file,
            &mut buffers,
            read.offset.get(),
            ReadWriteFlags::NOWAIT,
        );
        // Less than asked for: the rest is not cached, or there is no rest. A thread tells.
        if now == Ok(bytes) {
            return Started::Done(done(read, now));
        }
        match &self.jobs {
            Some(jobs) => match jobs.try_send(read) {
                Ok(()) => Started::Pending,
                Err(error) => Started::Busy(error.into_inner()),
            },
            None => Started::Busy(read),
        }
    }

    fn finish(&mut self, done: ReadDone) -> Option<ReadDone> {
        Some(done)
    }

    fn tick(&mut self, _now: Instant, done: &mut Vec<ReadDone>) {
        loop {
            match self.results.try_recv() {
                Ok(read) => done.push(read),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn next_due(&self) -> Option<Instant> {
        None
    }
}

impl Drop for PreadSource {
    fn drop(&mut self) {
        self.jobs = None;
        let started = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            if started.elapsed() > JOIN_LIMIT {
                // It sits in a read that the file system does not end; it owns its buffer, and
                // ends by itself when the read does.
                tracing::warn!("a reading thread does not come back from its file system");
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
