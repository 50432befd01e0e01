// UNSAFETY: `fork` is unsafe where other threads may hold locks; here it is refused unless this
// process has one thread. The child ends by `_exit`, so nothing of the parent's is run twice.
#![expect(unsafe_code, reason = "fork and _exit have no safe wrapper")]
//! Forked children.

use std::fs;
use std::io;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, WaitOptions, waitpid};

/// A forked child; to be waited for.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
}

impl Child {
    /// Waits until the child has ended; an end other than its own is an error.
    pub(crate) fn wait(self) -> Result<()> {
        let pid = self.pid.as_raw_nonzero();
        let ended = loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                ended => break ended.with_context(|| format!("cannot wait for process {pid}"))?,
            }
        };
        let status = ended.map(|(_, status)| status);
        ensure!(
            status.is_some_and(|status| status.exit_status() == Some(0)),
            "process {pid} ended with {status:?}"
        );
        Ok(())
    }
}

/// Evidence that this process had one thread; who holds it starts none.
#[derive(Debug)]
pub(crate) struct OneThread(());

/// Refuses when this process has more than one thread.
pub(crate) fn require_one_thread() -> Result<OneThread> {
    let threads = fs::read_dir("/proc/self/task")
        .context("cannot read /proc/self/task")?
        .count();
    ensure!(
        threads == 1,
        "this process has {threads} threads; it forks, so it may have one only"
    );
    Ok(OneThread(()))
}

/// Forks; the child runs `body` and ends, with status 0 if that went well.
pub(crate) fn fork(_: &OneThread, body: impl FnOnce() -> Result<()>) -> Result<Child> {
    // SAFETY: the process has one thread, so no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context("cannot fork"),
        0 => {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: ends the process at once, without destructors or exit handlers.
            unsafe { libc::_exit(i32::from(!matches!(ended, Ok(Ok(()))))) }
        }
        pid => Ok(Child {
            pid: Pid::from_raw(pid).context("fork gave no process")?,
        }),
    }
}
