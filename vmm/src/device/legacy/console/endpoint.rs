#![forbid(unsafe_code)]
//! Opens what a [`SerialTarget`] names.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open as open_fd};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::error::ConsoleError;
use super::output::Sink;
use super::target::SerialTarget;
use crate::device::socket::Socket;

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// Nowhere, and the output needs no thread to wait for it.
    Nothing,
    /// Nowhere; output may have to wait.
    None,
    /// One descriptor, until its end.
    Descriptor(Arc<OwnedFd>),
    /// Standard input, perhaps a terminal.
    Stdin(Arc<OwnedFd>),
    /// Whoever connects.
    Clients(Socket),
}

/// An open endpoint.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) source: Source,
    pub(super) pty_path: Option<PathBuf>,
    /// Keeps the terminal alive while no program has it open.
    _terminal: Option<OwnedFd>,
}

impl Endpoint {
    fn new(source: Source) -> Self {
        Self {
            source,
            pty_path: None,
            _terminal: None,
        }
    }
}

/// Opens both directions.
pub(super) fn open(target: SerialTarget) -> Result<(Endpoint, Sink), ConsoleError> {
    match target {
        SerialTarget::Null => Ok((Endpoint::new(Source::Nothing), Sink::Discard)),
        SerialTarget::Later => Ok((Endpoint::new(Source::Nothing), Sink::Absent)),
        SerialTarget::Stdio => stdio(),
        SerialTarget::File(path) => file(&path),
        SerialTarget::Pty => pty().map_err(ConsoleError::Pty),
        SerialTarget::Unix(path) => {
            let socket = Socket::listen(&path)?;
            Ok((Endpoint::new(Source::Clients(socket)), Sink::Absent))
        }
        SerialTarget::Fd(fd) => descriptor(fd).map_err(ConsoleError::Descriptor),
    }
}

fn sink(fd: Arc<OwnedFd>, blocking: bool) -> Sink {
    Sink::Open {
        fd,
        blocking,
        next_may_come: false,
    }
}

fn stdio() -> Result<(Endpoint, Sink), ConsoleError> {
    let input = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(ConsoleError::Stdio)?;
    let (output, blocking) = open_stdout().map_err(ConsoleError::Stdio)?;
    Ok((
        Endpoint::new(Source::Stdin(Arc::new(input))),
        sink(Arc::new(output), blocking),
    ))
}

/// Standard output, and whether writing to it may block. Its own flags are shared with the shell
/// and stay as they are; a pipe or terminal is opened once more, non-blocking.
pub fn open_stdout() -> io::Result<(OwnedFd, bool)> {
    let stdout = io::stdout();
    let kind = FileType::from_raw_mode(fstat(&stdout)?.st_mode);
    if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(fd) = open_fd("/proc/self/fd/1", flags, Mode::empty()) {
            return Ok((fd, false));
        }
    }
    Ok((stdout.as_fd().try_clone_to_owned()?, true))
}

fn file(path: &Path) -> Result<(Endpoint, Sink), ConsoleError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        // A FIFO without a reader is refused rather than waited for.
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(|source| ConsoleError::File {
            path: path.to_owned(),
            source,
        })?;
    let source = match file.metadata() {
        Ok(metadata) if metadata.is_file() => Source::Nothing,
        _ => Source::None,
    };
    Ok((Endpoint::new(source), sink(Arc::new(file.into()), false)))
}

fn pty() -> io::Result<(Endpoint, Sink)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open_fd(&name, flags, Mode::empty())?;
    let mut settings = tcgetattr(&terminal)?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)?;
    set_nonblocking(&master)?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(name.into_bytes()));
    let master = Arc::new(master);
    let endpoint = Endpoint {
        source: Source::Descriptor(Arc::clone(&master)),
        pty_path: Some(path),
        _terminal: Some(terminal),
    };
    Ok((endpoint, sink(master, false)))
}

fn descriptor(fd: OwnedFd) -> io::Result<(Endpoint, Sink)> {
    set_nonblocking(&fd)?;
    let access = fcntl_getfl(&fd)? & OFlags::RWMODE;
    let fd = Arc::new(fd);
    let source = if access == OFlags::WRONLY {
        Source::None
    } else {
        Source::Descriptor(Arc::clone(&fd))
    };
    let sink = if access == OFlags::RDONLY {
        Sink::Discard
    } else {
        sink(fd, false)
    };
    Ok((Endpoint::new(source), sink))
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}
