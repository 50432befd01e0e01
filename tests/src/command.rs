#![forbid(unsafe_code)]
//! Runs `pando` the way a user does, and finds what it leaves.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::rig::built_program;

/// Longest that anything here may take before it counts as hung.
pub const HANG: Duration = Duration::from_secs(60);

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails unless the exit code is this one.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == Some(code),
            "exit code {:?} instead of {code}; it said:\n{}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// Fails unless standard error has all these texts.
    pub fn expect_error(self, texts: &[&str]) -> Result<Self> {
        for text in texts {
            ensure!(
                self.stderr.contains(text),
                "no {text:?} in:\n{}",
                self.stderr
            );
        }
        ensure!(
            !self.stderr.contains("panicked"),
            "a panic:\n{}",
            self.stderr
        );
        Ok(self)
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("no JSON:\n{}{}", self.stdout, self.stderr))
    }
}

/// The `pando` program with these arguments.
pub fn pando<S: AsRef<OsStr>>(args: &[S]) -> Result<Command> {
    let mut command = Command::new(built_program("pando")?);
    command.args(args).stdin(Stdio::null());
    Ok(command)
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Result<Finished> {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    Running { child }.finish()
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
}

impl Running {
    /// Starts a command, its output kept for [`Self::finish`].
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self { child })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        signal_pid(self.pid(), signal)
    }

    /// Its child processes.
    pub fn children(&self) -> Vec<u32> {
        let pid = self.pid();
        fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect()
    }

    /// Those of its child processes that are clones, started as programs of their own.
    pub fn clones(&self) -> Vec<u32> {
        let is_clone = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
                line.split(|byte| *byte == 0)
                    .any(|word| word == b"clone-worker")
            })
        };
        self.children().into_iter().filter(is_clone).collect()
    }

    /// Reads standard error up to a line that has `text`, and returns that line.
    pub fn wait_stderr(&mut self, text: &str) -> Result<String> {
        let stderr = self
            .child
            .stderr
            .as_mut()
            .context("standard error was taken")?;
        let mut seen = String::new();
        // One byte at a time, so that nothing behind the line is lost to a buffer.
        let mut reader = BufReader::with_capacity(1, stderr);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                bail!("it ended without {text:?}; it said:\n{seen}");
            }
            if line.contains(text) {
                return Ok(line.trim_end().to_owned());
            }
            seen.push_str(&line);
        }
    }

    /// Waits for its end without reading anything, and returns its exit code.
    pub fn wait(&mut self) -> Result<Option<i32>> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(
                start.elapsed() < HANG,
                "it still runs after {} s",
                HANG.as_secs()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<Finished> {
        let mut stdout = self
            .child
            .stdout
            .take()
            .context("standard output was taken")?;
        let mut stderr = self
            .child
            .stderr
            .take()
            .context("standard error was taken")?;
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).map(|_| text)
        });
        let out = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let code = self.wait()?;
        let join = |thread: std::thread::JoinHandle<std::io::Result<String>>| -> Result<String> {
            Ok(thread
                .join()
                .map_err(|_| anyhow::anyhow!("a reader panicked"))??)
        };
        Ok(Finished {
            code,
            stdout: join(out)?,
            stderr: join(reader)?,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal to a process.
pub fn signal_pid(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .context("no pid")?;
    rustix::process::kill_process(pid, signal)?;
    Ok(())
}

/// Whether any thread of a process is left that is no zombie. The first thread of a killed process
/// can be one while others still hold its files.
pub fn is_alive(pid: u32) -> bool {
    let is_zombie = |stat: String| {
        let state = stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .to_owned();
        state.starts_with('Z') || state.starts_with('X')
    };
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| {
        threads.flatten().any(|thread| {
            fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| !is_zombie(stat))
        })
    })
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !condition() {
        ensure!(
            start.elapsed() < HANG,
            "{what}: not after {} s",
            HANG.as_secs()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Makes a template of the built-in guest with 64 MiB in `parent` and returns its directory.
pub fn make_template(parent: &Path) -> Result<PathBuf> {
    let dir = parent.join("t");
    finish(pando(&["template", "create"])?.arg(&dir).args([
        "--kernel",
        "embedded",
        "--memory",
        "64M",
        "--ready",
        "serial:pando guest ready",
    ]))?
    .expect_code(0)?;
    Ok(dir)
}

/// All names in a directory, sorted.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Makes a template of the built-in guest at `out`, with what `more` says of it.
pub fn create_template(out: &Path, more: &[&str]) -> Result<Finished> {
    let mut command = pando(&["template", "create"])?;
    command.arg(out);
    command.args(["--kernel", "embedded", "--memory", "64M"]);
    command.args(["--ready", "serial:pando guest ready"]);
    finish(command.args(more))
}
