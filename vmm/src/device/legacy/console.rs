#![forbid(unsafe_code)]
//! Where COM1 goes: a file, this process's terminal, a pseudo-terminal, a socket.
//!
//! Output goes out on the thread of the vCPU that wrote it, as long as the other end takes it at
//! once. What it does not take waits in a bounded queue, which a thread of the console drains; the
//! same thread feeds input to the UART, as fast as the guest reads it. A guest can so neither block
//! on its console nor make it grow.

mod endpoint;
mod error;
mod escape;
mod feed;
mod output;
mod target;
mod terminal;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub use endpoint::open_stdout;
pub use error::ConsoleError;
pub(super) use output::ConsoleWaker;
pub use output::{BACKLOG_BYTES, ConsoleOutput};
pub use target::{ParseTargetError, SerialTarget};
pub use terminal::{Kind as TerminalKind, RawTerminal, SavedTerminal, kind as terminal_kind};

use self::endpoint::{Endpoint, Source};
use self::feed::Feed;
use super::serial::Serial;

/// The open end of a serial port. Dropping it ends its thread, lets queued output go out for a
/// moment, gives the terminal back and removes the socket.
#[derive(Debug)]
pub struct Console {
    output: ConsoleOutput,
    endpoint: Endpoint,
    /// Attached, without a thread of its own yet.
    attached: Option<Feed>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Opens the endpoint, so that what is wrong with it shows before a guest runs. Output is taken
    /// at once; nothing is read before [`Console::attach`].
    pub fn open(target: SerialTarget) -> Result<Self, ConsoleError> {
        let (endpoint, sink) = endpoint::open(target)?;
        if let Some(path) = &endpoint.pty_path {
            tracing::info!(path = %path.display(), "the serial console is a pseudo-terminal");
        }
        Ok(Self {
            output: ConsoleOutput::new(sink)?,
            endpoint,
            attached: None,
            thread: None,
        })
    }

    /// Opens the endpoint of a console that was opened for [`SerialTarget::Later`]; what was
    /// printed meanwhile goes out. [`Console::attach`] comes after.
    pub fn bind(&mut self, target: SerialTarget) -> Result<(), ConsoleError> {
        let (endpoint, sink) = endpoint::open(target)?;
        self.endpoint = endpoint;
        self.output.redirect(sink);
        Ok(())
    }

    /// Where the UART writes to.
    #[must_use]
    pub fn output(&self) -> ConsoleOutput {
        self.output.clone()
    }

    /// Gives `serial` what input waits now, without waiting for more; puts a terminal into raw mode, in which Ctrl-A x calls `on_quit`
    /// and Ctrl-A twice types it once. `on_quit` must not drop the console: it runs on its thread.
    /// [`Console::feed`] comes after.
    ///
    /// Fails when the console feeds a UART already.
    pub fn attach(
        &mut self,
        serial: Arc<Mutex<Serial>>,
        on_quit: Box<dyn Fn() + Send>,
    ) -> Result<(), ConsoleError> {
        if self.thread.is_some() || self.attached.is_some() {
            return Err(ConsoleError::Attached);
        }
        let source = std::mem::replace(&mut self.endpoint.source, Source::Nothing);
        if matches!(source, Source::Nothing) {
            return Ok(());
        }
        let mut feed = Feed::new(source, self.output.clone(), serial, on_quit)?;
        feed.begin();
        self.attached = Some(feed);
        Ok(())
    }

    /// Goes on feeding the UART that the console was attached to, in a thread of its own.
    ///
    /// Fails when no thread can be made.
    pub fn feed(&mut self) -> Result<(), ConsoleError> {
        let Some(feed) = self.attached.take() else {
            return Ok(());
        };
        let thread = std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || feed.run())
            .map_err(ConsoleError::Thread)?;
        self.thread = Some(thread);
        Ok(())
    }

    /// The terminal to open, when the target was [`SerialTarget::Pty`].
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.endpoint.pty_path.as_deref()
    }

    /// Output bytes that were dropped because nobody read them.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.output.dropped_bytes()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.output.stop();
            if thread.join().is_err() {
                tracing::error!("the console's thread panicked");
            }
        }
        self.output.drain();
    }
}

#[cfg(test)]
mod tests;
