//! The `pando-bench` command: measures what Pando promises, each figure beside its baseline in the
//! same run, with the marks at which the clock starts and stops in the output.

mod cli;
mod clone;
mod density;
mod fault;
mod floor;
mod footprint;
mod grove;
mod host;
mod limited;
mod page_cache;
mod pager;
mod program;
mod report;
mod seed;
mod soak;
mod stats;
mod sys;
mod targets;
mod verdict;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    match cli::Args::parse().command {
        cli::Command::Floor(args) => floor::run(&args),
        cli::Command::Clone(args) => clone::run(&args),
        cli::Command::Fault(args) => fault::run(&args),
        cli::Command::Density(args) => density::run(&args),
        cli::Command::Soak(args) => soak::run(&args),
        cli::Command::Pager(args) => pager::run(&args),
        cli::Command::PagerClient => pager::client::serve(),
        cli::Command::Report(args) => verdict::run(&args),
    }
}
