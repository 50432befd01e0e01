//! The `pando-bench` command: measures what Pando promises, each figure beside its baseline in the
//! same run, with the marks at which the clock starts and stops in the output.

mod cli;
mod clone;
mod fault;
mod floor;
mod host;
mod page_cache;
mod report;
mod stats;
mod sys;
mod targets;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    match cli::Args::parse().command {
        cli::Command::Floor(args) => floor::run(&args),
        cli::Command::Clone(args) => clone::run(&args),
        cli::Command::Fault(args) => fault::run(&args),
    }
}
