#![forbid(unsafe_code)]
//! `-daemonize`: the program starts itself once more, in a session of its own, and ends when that
//! one is ready, or has failed.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::process::{Command, Stdio};

use super::error::OptionError;
use super::line::wanted::ProgramOptions;
use super::link::reason;
use crate::report::exit;

/// Tells the second program that its standard output is the way to the first.
const MARK: &str = "PANDO_QEMU_BACKGROUND";

/// Which of the two this is.
#[derive(Debug)]
pub enum Background {
    /// Neither: nobody asked.
    No,
    /// The first: it ends with this exit code.
    Parent(u8),
    /// The second.
    Child(Child),
}

/// The program that stays.
#[derive(Debug)]
pub struct Child {
    parent: File,
}

/// Goes to the background if that was asked for. `words` is the argument vector of `pando qemu`.
pub fn begin(program: &ProgramOptions, words: &[String]) -> Result<Background, OptionError> {
    if !program.daemonize {
        return Ok(Background::No);
    }
    let failed = |error: std::io::Error| {
        OptionError::new(format!("cannot go to the background: {}", reason(&error)))
    };
    if env::var_os(MARK).is_some() {
        // The pipe to the parent, which nobody else may write to by mistake.
        let parent = OpenOptions::new()
            .write(true)
            .open("/proc/self/fd/1")
            .map_err(failed)?;
        let null = File::open("/dev/null").map_err(failed)?;
        rustix::stdio::dup2_stdout(&null).map_err(|errno| failed(errno.into()))?;
        rustix::process::setsid().map_err(|errno| failed(errno.into()))?;
        return Ok(Background::Child(Child { parent }));
    }
    let (mut ready, theirs): (PipeReader, PipeWriter) = pipe().map_err(failed)?;
    let name = env::args_os().next().unwrap_or_default();
    let mut command = Command::new(env::current_exe().map_err(failed)?);
    std::os::unix::process::CommandExt::arg0(&mut command, name);
    let starts_as_qemu = super::run_name().is_some();
    if !starts_as_qemu {
        command.arg("qemu");
    }
    let mut child = command
        .args(words)
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(theirs)
        .spawn()
        .map_err(failed)?;
    // The command holds this process's copy of the pipe's other end.
    drop(command);
    let mut answer = Vec::new();
    ready.read_to_end(&mut answer).map_err(failed)?;
    if answer == b"ready" {
        return Ok(Background::Parent(exit::OK));
    }
    let code = child.wait().map_err(failed)?.code().unwrap_or(1);
    Ok(Background::Parent(
        u8::try_from(code).unwrap_or(exit::FAILED),
    ))
}

impl Child {
    /// Says that everything is ready; standard error is let go of.
    pub fn ready(mut self) -> Result<(), OptionError> {
        let failed = |error: std::io::Error| {
            OptionError::new(format!("cannot go to the background: {error}"))
        };
        let null = OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .map_err(failed)?;
        rustix::stdio::dup2_stderr(&null).map_err(|errno| failed(errno.into()))?;
        self.parent.write_all(b"ready").map_err(failed)
    }
}
