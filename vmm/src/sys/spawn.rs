// UNSAFETY: clone3(2) with CLONE_INTO_CGROUP, which neither the C library nor std has a call for. The
// child shares nothing with this process and makes nothing but async-signal-safe calls, on memory that
// was made ready before, until execv(3) or _exit(2): whatever locks other threads hold do not matter.
#![expect(unsafe_code, reason = "clone3(2) into a cgroup, then execv(3)")]
//! Processes that begin in a cgroup. Moving one there later takes milliseconds (the kernel waits for
//! all CPUs), and leaves what it took before with the cgroup that it came from.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use rustix::process::Pid;

use super::fork::Forked;

/// Exit code of a process whose program could not be executed; what a shell uses for it.
pub const NOT_EXECUTED: i32 = 126;

/// `struct clone_args` of `linux/sched.h`, as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_PARENT: u64 = 0x8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Whose child the new process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parent {
    /// This process.
    This,
    /// The parent of this process, which is told of the end of either.
    Ours,
}

/// Duplicates this process into a cgroup.
///
/// # Safety
/// Where this process has several threads the child may make async-signal-safe calls only.
pub(super) unsafe fn clone_into(cgroup: BorrowedFd<'_>, parent: Parent) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    let (flags, exit_signal) = match parent {
        Parent::This => (0, libc::SIGCHLD),
        // A sibling ends with the signal that this process ends with.
        Parent::Ours => (CLONE_PARENT, 0),
    };
    let args = CloneArgs {
        flags: CLONE_PIDFD | CLONE_INTO_CGROUP | flags,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(exit_signal.unsigned_abs()),
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        ..CloneArgs::default()
    };
    // SAFETY: `args` has the layout of `struct clone_args` (asserted above) and lives through the call,
    // as does `pidfd`, which the kernel writes. Without CLONE_VM and CLONE_FILES the child has copies of
    // all memory, this stack included, and of all descriptors. The caller keeps what remains.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(Forked::Child),
        pid if pid > 0 => {
            // SAFETY: CLONE_PIDFD made this descriptor for us; nobody else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| io::Error::other("clone3(2) gave no process"))?;
            Ok(Forked::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Starts `program` in the cgroup whose directory is open as `cgroup`, with these descriptors for
/// standard input and output. A program that cannot be executed ends with [`NOT_EXECUTED`].
pub fn spawn_into(
    cgroup: BorrowedFd<'_>,
    program: &Path,
    argument: &str,
    input: BorrowedFd<'_>,
    output: BorrowedFd<'_>,
) -> io::Result<(Pid, OwnedFd)> {
    let string = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::other);
    let (path, argument) = (string(program.as_os_str())?, string(argument.as_ref())?);
    let arguments = [path.as_ptr(), argument.as_ptr(), ptr::null()];
    let (input, output) = (input.as_raw_fd(), output.as_raw_fd());
    // SAFETY: the child makes the calls below and no others: dup2, execv and _exit, all
    // async-signal-safe.
    match unsafe { clone_into(cgroup, Parent::This) }? {
        Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Forked::Child => {
            // SAFETY: the strings and the array end with zero and outlive the calls, in this
            // process's own copy of them. dup2 leaves a descriptor open on exec unless it is the
            // same one, which a descriptor other than standard input or output is not.
            unsafe {
                if libc::dup2(input, libc::STDIN_FILENO) >= 0
                    && libc::dup2(output, libc::STDOUT_FILENO) >= 0
                {
                    libc::execv(path.as_ptr(), arguments.as_ptr());
                }
                libc::_exit(NOT_EXECUTED)
            }
        }
    }
}
