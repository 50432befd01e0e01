// UNSAFETY: one entry with the address of a buffer on the stack, whose request is over before the
// function returns.
#![expect(unsafe_code, reason = "a submission entry with a buffer address")]
//! Rings as this kernel makes them, and what they can wait for.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

use super::UffdWait;
use crate::fault::MESSAGE_BYTES;
use crate::sys::userfaultfd::{self as uffd_sys, Tracking};
use crate::token::{ClientSlot, Token};

/// Entries of a ring's two queues.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries {
    /// To be submitted at once.
    pub(super) submissions: u32,
    /// Completions that fit; the kernel keeps more than that, but slowly.
    pub(super) completions: u32,
}

/// A ring of the best kind that this kernel makes; errors only when it makes none that can be
/// waited on with a time limit.
/// The flag says whether it defers its work to the waiting thread (kernels from 6.1).
pub(super) fn build(entries: Entries) -> io::Result<(IoUring, bool)> {
    let completions = entries.completions.max(2 * entries.submissions);
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(completions)
        .build(entries.submissions);
    let is_deferred = deferred.is_ok();
    let ring = deferred
        .or_else(|_| {
            let mut builder = IoUring::builder();
            builder.setup_coop_taskrun().setup_taskrun_flag();
            builder.setup_cqsize(completions);
            builder.build(entries.submissions)
        })
        .or_else(|_| IoUring::new(entries.submissions))?;
    if !ring.params().is_feature_ext_arg() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    Ok((ring, is_deferred))
}

/// Whether a READ of a userfaultfd without messages stays pending, as it must; else it would
/// occupy a worker thread or fail at once. Seen on a throw-away userfaultfd, not deduced.
///
/// The userfaultfd is non-blocking: a kernel that can wait for it natively arms a poll and tries
/// again when that fires, one that cannot says EAGAIN at once.
pub(crate) fn probe() -> io::Result<UffdWait> {
    let (mut ring, _) = build(Entries {
        submissions: 4,
        completions: 8,
    })?;
    let uffd = uffd_sys::open(Tracking::Off)?.uffd;
    let token = Token::Uffd(ClientSlot::new(0)).encode();
    let mut buffer = [0u8; MESSAGE_BYTES];
    let length = u32::try_from(buffer.len()).unwrap_or(0);
    let read = opcode::Read::new(Fd(uffd.as_raw_fd()), buffer.as_mut_ptr(), length)
        .build()
        .user_data(token);
    // SAFETY: `buffer` and `uffd` outlive the request: nothing is ever read from this userfaultfd,
    // as no memory is registered with it, and the request is cancelled below.
    unsafe { ring.submission().push(&read) }.map_err(|_| io::Error::other("ring is full"))?;
    ring.submit()?;
    if ring.completion().next().is_some() {
        return Ok(UffdWait::Poll);
    }
    let cancel = opcode::AsyncCancel::new(token)
        .build()
        .user_data(Token::Cancel.encode());
    // SAFETY: the entry points to no memory.
    unsafe { ring.submission().push(&cancel) }.map_err(|_| io::Error::other("ring is full"))?;
    ring.submit_and_wait(2)?;
    Ok(UffdWait::Read)
}
