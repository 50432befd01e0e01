#![forbid(unsafe_code)]
//! What can be typed about where pagers run.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};

use super::IoArg;
use crate::clone::control::PagerPlace;

/// Where the pages of clones are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PagerPlaceArg {
    /// A thread in each clone's process.
    Own,
    /// One process for all clones.
    Shared,
}

impl PagerPlaceArg {
    /// What was asked for, or what suits as many clones.
    pub fn place(asked: Option<Self>, clones: u32) -> PagerPlace {
        match asked {
            Some(Self::Own) => PagerPlace::Own,
            Some(Self::Shared) => PagerPlace::Shared,
            None if clones > 1 => PagerPlace::Shared,
            None => PagerPlace::Own,
        }
    }
}

/// `pando pager`
#[derive(Debug, ClapArgs)]
pub struct PagerCommandArgs {
    /// What the pager does.
    #[command(subcommand)]
    pub command: PagerCommand,
}

/// The subcommands of `pando pager`.
#[derive(Debug, Subcommand)]
pub enum PagerCommand {
    /// Serve memory files to VMMs that connect and hand their userfaultfds over (docs/pager.md has the
    /// protocol)
    Serve(PagerServeArgs),
}

/// `pando pager serve`
#[derive(Debug, ClapArgs)]
pub struct PagerServeArgs {
    /// Listen at this Unix socket (SEQPACKET); only this user may connect
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// A file of guest RAM, byte for byte, or a template; images are counted from 0 in this order
    #[arg(long = "image", value_name = "FILE", required = true, num_args = 1..)]
    pub images: Vec<PathBuf>,
    /// How template pages are read
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Give a page up that could not be read within this many seconds
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub fault_deadline: f64,
    /// Let the scheduler place the threads of the pager, instead of keeping each on a CPU of its own
    #[arg(long)]
    pub no_pin: bool,
    /// Serve Prometheus metrics at http://ADDR/metrics; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
}
