#![forbid(unsafe_code)]
//! Options of `pando-bench soak` and `pando-bench report`, as words.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use pando_vmm::clone::Engine;
use serde::Serialize;

use super::{PagerPlaceArg, parse_bytes};

/// What is done to clones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// All of the others.
    All,
    /// Each writes its own pattern over a quarter of memory and verifies everything, round after
    /// round, while others start and end: no byte crosses.
    Isolation,
    /// Clones are killed at random moments: nothing is left, nobody else notices.
    KillClones,
    /// The root process is killed while clones start: those that run go on, new ones come.
    KillRoot,
    /// The pager process is killed again and again while clones fault: all finish, all bytes right.
    KillPager,
    /// The template is truncated, overwritten or replaced while it is served: a clone answers rightly
    /// or ends by its own error.
    Template,
    /// One clone runs into the limit of memory of its cgroup: it fails, the others go on.
    Memory,
    /// Descriptors, then processes, run out half way through a batch: some fail, the others go on.
    Limits,
    /// Clones of a recorded template take far fewer faults than the first ones.
    SecondGeneration,
    /// Idle clones give clean memory back until each is within its budget; everything reads as before.
    GiveBack,
}

/// Options of `pando-bench soak`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct SoakArgs {
    /// What is done to clones; several one after the other.
    #[arg(required = true, value_enum)]
    pub(crate) scenarios: Vec<Scenario>,
    /// Engines that it is done to, with commas between them; those that it can be done to if not given.
    #[arg(long, value_delimiter = ',')]
    pub(crate) engines: Vec<Engine>,
    /// Clones alive at once; a full size for each scenario if not given.
    #[arg(long)]
    pub(crate) clones: Option<NonZeroU32>,
    /// Rounds, or kills; a full number for each scenario if not given.
    #[arg(long)]
    pub(crate) rounds: Option<NonZeroU32>,
    /// Small sizes where none are given: some seconds each.
    #[arg(long)]
    pub(crate) small: bool,
    /// RAM of the template, for example 128M; at least 64M.
    #[arg(long, default_value = "128M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// What is random is the same with the same seed; the clock's if not given. It is printed.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Time between two kills of the pager process, in milliseconds.
    #[arg(long, default_value = "300")]
    pub(crate) every_ms: NonZeroU32,
    /// Where pagers run.
    #[arg(long, value_enum, default_value = "shared")]
    pub(crate) pager: PagerPlaceArg,
    /// Give each clone a cgroup of its own.
    #[arg(long)]
    pub(crate) cgroups: bool,
    /// Memory that is not available again is wrong, too. Only where nothing else runs: others on the
    /// host take and free memory as well.
    #[arg(long)]
    pub(crate) judge_memory: bool,
    /// The `pando` program; the one beside this program if not given.
    #[arg(long)]
    pub(crate) pando: Option<PathBuf>,
    /// Where templates are made, and removed again; the folder for temporary files if not given.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `pando-bench report`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct ReportArgs {
    /// Fewer rounds and clones: about two minutes on two CPUs instead of ten.
    #[arg(long)]
    pub(crate) quick: bool,
    /// The `pando` program; the one beside this program if not given.
    #[arg(long)]
    pub(crate) pando: Option<PathBuf>,
    /// Where templates and images are made, and removed again; the folder for temporary files if not
    /// given.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}
