// UNSAFETY: a raw clone(2) duplicates this process without the C library's knowledge. Only a
// process that has shown to have one thread may do so: no lock can be held by a thread that the
// copy lacks, and the C library's own state (allocator, streams) is consistent whenever its one
// thread is outside of it.
#![expect(
    unsafe_code,
    reason = "raw clone(2): libc's fork has no CLONE_PARENT and no pidfd"
)]
//! Forks whose parent is the parent of the process that makes them.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::Pid;

use super::spawn::{Parent, clone_into};

/// Evidence that this process has one thread. Who holds it starts none.
#[derive(Debug)]
pub struct OneThread(());

impl OneThread {
    /// Looks; an error when there are more.
    pub fn prove() -> io::Result<Self> {
        let threads = fs::read_dir("/proc/self/task")?.count();
        if threads == 1 {
            Ok(Self(()))
        } else {
            Err(io::Error::other(format!(
                "this process has {threads} threads and may fork with one only"
            )))
        }
    }
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Forked {
    /// The new one: a copy of the other at the moment of the call.
    Child,
    /// The one that was there before.
    Parent {
        /// Process number of the new one.
        pid: Pid,
        /// Refers to it whatever becomes of the number.
        pidfd: OwnedFd,
    },
}

/// Forks a sibling: a copy of this process whose parent is this process's parent, which is told of
/// its end (SIGCHLD) and takes its exit status. See clone(2), `CLONE_PARENT` and `CLONE_PIDFD`. With
/// `cgroup`, the directory of one, it begins there.
pub fn fork_sibling(_: &OneThread, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    if let Some(cgroup) = cgroup {
        // SAFETY: the process has one thread (see the top of the file).
        return unsafe { clone_into(cgroup, Parent::Ours) };
    }
    let flags = libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: RawFd = -1;
    let null = ptr::null_mut::<libc::c_void>();
    // SAFETY: without CLONE_VM the child has a copy of everything, this stack included, so a null
    // stack is right. `pidfd` outlives the call, which writes it in the parent. The process has
    // one thread (see the top of the file).
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone,
            i64::from(flags),
            null,
            &raw mut pidfd,
            null,
            null,
        )
    };
    match result {
        0 => Ok(Forked::Child),
        pid if pid > 0 => {
            // SAFETY: CLONE_PIDFD made this descriptor for us; nobody else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| io::Error::other("clone(2) gave no process"))?;
            Ok(Forked::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_refused() {
        // A test runs on a thread of its own beside the main one.
        let error = OneThread::prove().unwrap_err().to_string();
        assert!(error.contains("may fork with one only"), "{error}");
    }
}
