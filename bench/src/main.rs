//! The `pando-bench` command: measures what Pando promises, each figure beside its baseline in the
//! same run, with the marks at which the clock starts and stops in the output.

mod cli;
mod floor;
mod host;
mod report;
mod stats;
mod sys;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    match cli::Args::parse().command {
        cli::Command::Floor(args) => floor::run(&args),
    }
}
