#![forbid(unsafe_code)]
//! Options of the benchmarks with many clones, as words.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;

use clap::Args as ClapArgs;
use pando_vmm::clone::Engine;

use super::{PagerPlaceArg, parse_bytes};

/// Options of `pando-bench density`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct DensityArgs {
    /// Numbers of clones alive at once, with commas between them; measured at each on the way up.
    #[arg(long, value_delimiter = ',', default_value = "100,500,1000,2000")]
    pub(crate) counts: Vec<NonZeroU32>,
    /// Engines to compare, with commas between them; the floor is always beside them.
    #[arg(long, value_delimiter = ',', default_value = "kernel,root")]
    pub(crate) engines: Vec<Engine>,
    /// RAM of the template, for example 128M.
    #[arg(long, default_value = "128M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// Pages that each clone writes and verifies; the floor's clones write ten.
    #[arg(long, default_value = "10")]
    pub(crate) pages: NonZeroU64,
    /// How often everything is done; engines take turns.
    #[arg(long, default_value = "1")]
    pub(crate) rounds: NonZeroU32,
    /// How many clones may be starting at once; twice as many as there are CPUs if not given.
    #[arg(long)]
    pub(crate) parallel: Option<NonZeroU32>,
    /// Where pagers run.
    #[arg(long, value_enum, default_value = "shared")]
    pub(crate) pager: PagerPlaceArg,
    /// Give each clone a cgroup of its own.
    #[arg(long)]
    pub(crate) cgroups: bool,
    /// The `pando` program; the one beside this program if not given.
    #[arg(long)]
    pub(crate) pando: Option<PathBuf>,
    /// Where the template is made, and removed again; the folder for temporary files if not given.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `pando-bench pager`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct PagerArgs {
    /// Size of the image, half of it data and half a hole, for example 64M.
    #[arg(long, default_value = "64M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// Numbers of clones that one pager serves at once, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100")]
    pub(crate) clones: Vec<NonZeroU32>,
    /// Pages that each clone touches in a round; at most half of the image.
    #[arg(long, default_value = "256")]
    pub(crate) pages: NonZeroU64,
    /// How often everything is done; variants take turns in each round.
    #[arg(long, default_value = "10")]
    pub(crate) rounds: NonZeroU32,
    /// Pairs of short rounds, metrics on and off, in alternating order.
    #[arg(long, default_value = "100")]
    pub(crate) pairs: NonZeroU32,
    /// How long a pager looks for the next fault before it sleeps, in microseconds, with commas between.
    #[arg(long, value_delimiter = ',', default_value = "50")]
    pub(crate) spin_us: Vec<u64>,
    /// Leave out what drops the image from the page cache.
    #[arg(long)]
    pub(crate) no_cold: bool,
    /// Where the image is written, and removed again; the folder for temporary files if not given.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}
