#![forbid(unsafe_code)]
//! `pando pager`: the pager by itself.

use std::io;
use std::os::unix::net::UnixStream;

use super::args::{PagerCommand, PagerCommandArgs, PagerServeArgs};
use super::clone::fault_deadline;
use super::fail::Failure;
use super::out::note;
use crate::clone::END_SIGNALS;
use crate::clone::control::PagerConfig;
use crate::host::{raise_descriptor_limit, require_paging};
use crate::observe::metrics;
use crate::pager_process::serve::{ServeError, Server};
use crate::report::{chain, exit};

/// Runs what was asked for.
pub fn run(args: &PagerCommandArgs) -> Result<u8, Failure> {
    match &args.command {
        PagerCommand::Serve(args) => serve(args),
    }
}

fn serve(args: &PagerServeArgs) -> Result<u8, Failure> {
    let config = PagerConfig {
        io: args.io.into(),
        fault_deadline: fault_deadline(args.fault_deadline)?,
        keep_together: !args.no_pin,
        ..PagerConfig::default()
    };
    require_paging(config.io).map_err(|error| Failure::of(&error))?;
    raise_descriptor_limit();
    if let Some(address) = args.metrics {
        let address = metrics::serve(address)?;
        note!("metrics: http://{address}/metrics");
    }
    let signals = end_signals().map_err(|error| Failure::of(&error))?;
    let mut server = Server::bind(&args.socket, &args.images, &config)?;
    for (number, (what, pages)) in server.images().iter().enumerate() {
        note!("image {number}: {what}, {pages} pages");
    }
    note!("serving at {} ({})", server.path().display(), server.io());
    server.run(&signals)?;
    Ok(exit::OK)
}

/// Readable once one of [`END_SIGNALS`] came.
fn end_signals() -> io::Result<UnixStream> {
    let (signals, end) = UnixStream::pair()?;
    for signal in END_SIGNALS {
        signal_hook::low_level::pipe::register(signal, end.try_clone()?)?;
    }
    Ok(signals)
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Template(error) => error.into(),
            other => Self::new(Self::of(&other).code(), chain(&other)),
        }
    }
}
