#![forbid(unsafe_code)]
//! The command line, as words.

mod many;
mod soak;

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use pando_vmm::cli::args::IoArg;
pub(crate) use pando_vmm::cli::args::PagerPlaceArg;
use pando_vmm::clone::Engine;

pub(crate) use many::{DensityArgs, PagerArgs};
pub(crate) use soak::{ReportArgs, Scenario, SoakArgs};

/// Measures what Pando promises, each figure beside its baseline in the same run.
#[derive(Debug, Parser)]
#[command(name = "pando-bench", version, about)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// One question each.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What the kernel alone asks for a clone: fork, KVM VM, ten pages, with nothing of Pando.
    Floor(FloorArgs),
    /// What a clone takes: to its first output, to touch memory, and many at once.
    Clone(CloneArgs),
    /// What a page that is touched takes: the pager alone, without KVM.
    Fault(FaultArgs),
    /// How many clones are alive at once, and what one more of them takes.
    Density(DensityArgs),
    /// How one pager serves many clones, and where its thread is best placed.
    Pager(PagerArgs),
    /// Clones under stress: everything they answer is compared. Ends with an error if anything is wrong.
    Soak(SoakArgs),
    /// Everything that is promised, judged in one run.
    Report(ReportArgs),
    /// Is a client of `pager`.
    #[command(hide = true)]
    PagerClient,
}

/// Options of `pando-bench floor`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct FloorArgs {
    /// Clones started one after the other.
    #[arg(long, default_value = "200")]
    pub(crate) count: NonZeroU32,
    /// Clones started together, all alive at once.
    #[arg(long, default_value = "500")]
    pub(crate) parallel: NonZeroU32,
    /// How often both are done; the rounds alternate.
    #[arg(long, default_value = "3")]
    pub(crate) rounds: NonZeroU32,
    /// Guest memory of the root, for example 128M.
    #[arg(long, default_value = "128M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// Leave the root in 4 KiB pages instead of collapsing it to huge ones.
    #[arg(long)]
    pub(crate) small_pages: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `pando-bench clone`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct CloneArgs {
    /// RAM of the template, for example 128M.
    #[arg(long, default_value = "128M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// How often everything is done; variants take turns in each round.
    #[arg(long, default_value = "10")]
    pub(crate) rounds: NonZeroU32,
    /// Clones of each variant in a round, one at a time.
    #[arg(long, default_value = "5")]
    pub(crate) starts: NonZeroU32,
    /// Engines to compare, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "kernel,copy,root")]
    pub(crate) engines: Vec<Engine>,
    /// Ways to read the template, with commas between them; one variant of engine copy for each.
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    pub(crate) io: Vec<IoArg>,
    /// Where pagers run, with commas between them; one variant of engine copy for each.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "own,shared")]
    pub(crate) pager: Vec<PagerPlaceArg>,
    /// Measure engine copy also without comparing checksums.
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Drop the template's RAM from the page cache before each start.
    #[arg(long)]
    pub(crate) cold: bool,
    /// Clones that are alive at once; 0 for none.
    #[arg(long, default_value = "100")]
    pub(crate) count: u32,
    /// How many of them may be starting at once; as many as there are CPUs if not given.
    #[arg(long)]
    pub(crate) parallel: Option<NonZeroU32>,
    /// How often that is done; variants take turns.
    #[arg(long, default_value = "2")]
    pub(crate) waves: u32,
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

/// Options of `pando-bench fault`.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct FaultArgs {
    /// Size of the image, half of it data and half a hole, for example 64M.
    #[arg(long, default_value = "64M", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// Pages touched in a round; at most half of the image.
    #[arg(long, default_value = "4096")]
    pub(crate) pages: NonZeroU64,
    /// How often everything is done; variants take turns in each round.
    #[arg(long, default_value = "10")]
    pub(crate) rounds: NonZeroU32,
    /// Numbers of threads that touch one memory, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "1,2,8,32")]
    pub(crate) threads: Vec<NonZeroU32>,
    /// How long a spinning pager looks for the next fault before it sleeps, in microseconds.
    #[arg(long, default_value = "50")]
    pub(crate) spin_us: u64,
    /// Where the image is written, and removed again; the folder for temporary files if not given.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads a size such as `128M`: bytes, or with a suffix of K, M or G in powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size: write bytes, or a number with K, M or G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_suffix() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("64K"), Ok(65536));
        assert_eq!(parse_bytes("128M"), Ok(128 << 20));
        assert_eq!(parse_bytes("5g"), Ok(5 << 30));
        for bad in ["", "M", "12X", "-1", "1.5G", "99999999999G"] {
            let error = parse_bytes(bad).unwrap_err();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
