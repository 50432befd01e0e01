#![forbid(unsafe_code)]
//! The proof that clones can be told apart, on the command line.

use clap::Args as ClapArgs;

/// `pando clone --check-unique`
#[derive(Debug, Clone, ClapArgs)]
pub struct UniqueArgs {
    /// Start two clones, ask each for its generation ID, random numbers, MAC, ids and clock, compare, and
    /// end them; exit code 1 where something is equal that must differ, or a clock is not the host's.
    /// Needs a guest with a root shell that reads commands from its COM1 (ttyS0)
    #[arg(long, conflicts_with_all = ["count", "serial", "json"])]
    pub check_unique: bool,
    /// With --check-unique: what the guest's shell wants in front of a command
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        requires = "check_unique"
    )]
    pub shell_prefix: String,
    /// With --check-unique: how far a clock may be from the host's
    #[arg(
        long,
        value_name = "MILLISECONDS",
        default_value_t = 100,
        requires = "check_unique"
    )]
    pub clock_tolerance: u64,
}
