#![forbid(unsafe_code)]
//! Whoever is at the other end of a relay: a connection, or this process's standard input and output.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read};

use crate::device::legacy::console::{RawTerminal, TerminalKind, open_stdout, terminal_kind};

/// The other end.
#[derive(Debug)]
pub struct Client {
    input: Option<OwnedFd>,
    output: OwnedFd,
    is_socket: bool,
    /// Given back when this is dropped.
    _raw: Option<RawTerminal>,
}

impl Client {
    /// A connection, or another descriptor that is read and written: it is gone when its input ends.
    pub fn socket(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self {
            input: Some(fd.try_clone()?),
            output: fd,
            is_socket: true,
            _raw: None,
        })
    }

    /// A file, which is written only; `None` for nothing at all.
    pub fn file(file: Option<File>) -> io::Result<Self> {
        let file = match file {
            Some(file) => file,
            None => File::options().write(true).open("/dev/null")?,
        };
        Ok(Self {
            input: None,
            output: file.into(),
            is_socket: false,
            _raw: None,
        })
    }

    /// Standard input and output, raw where that is a terminal. Their flags are shared with others and
    /// stay as they are.
    pub fn stdio() -> io::Result<Self> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        let kind = terminal_kind(&input);
        Ok(Self {
            _raw: match kind {
                TerminalKind::Foreground => Some(RawTerminal::new(&input)?),
                TerminalKind::Other | TerminalKind::Background => None,
            },
            // Reading from a terminal in the background would stop the process.
            input: (kind != TerminalKind::Background).then_some(input),
            output: open_stdout()?.0,
            is_socket: false,
        })
    }

    /// What is read, if it has not ended.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    /// What is written.
    pub fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Whether one who sends no more is gone.
    pub fn is_socket(&self) -> bool {
        self.is_socket
    }

    /// Whether one who sends no more still reads; asked when a read has failed, and true once.
    pub fn outlives_input(&mut self) -> bool {
        self.input = None;
        !self.is_socket
    }

    /// At most so many bytes of what is there; an error at the end.
    pub fn read(&mut self, most_bytes: usize) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; most_bytes];
        let Some(input) = &self.input else {
            return Ok(Vec::new());
        };
        match read(input, &mut buffer) {
            Ok(0) => Err(Errno::PIPE),
            Ok(count) => {
                buffer.truncate(count);
                Ok(buffer)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}
