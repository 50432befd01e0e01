//! The command line: each subcommand is a file that parses nothing and decides little. [`args`]
//! says what can be typed, the rest calls the library and prints.

pub mod args;
pub mod clone;
pub mod demo;
pub mod doctor;
pub mod fail;
pub mod inspect;
pub mod lines;
pub mod memory;
mod out;
pub mod pager;
pub mod progress;
pub mod qemu;
pub mod run;
pub mod table;
pub mod template;
mod unique;
pub mod warm;

use clap::{CommandFactory, Parser};
use out::{note, say};

pub use crate::size;

use crate::report::exit;
use args::{Args, Command};
use fail::Failure;

/// Runs the program and returns its exit code.
pub fn main() -> u8 {
    // Before anything is parsed: QEMU's options have a form of their own.
    if let Some(words) = qemu::words() {
        return qemu::run(&words);
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version come this way too; clap knows where each belongs.
            let _ = error.print();
            return if error.use_stderr() {
                exit::USAGE
            } else {
                exit::OK
            };
        }
    };
    // A clone's process learns from its orders how much to log.
    if !matches!(
        args.command,
        Command::CloneWorker | Command::RootWorker | Command::PagerWorker
    ) {
        crate::observe::log::start(args.verbose);
    }
    match dispatch(args.command, args.verbose) {
        Ok(code) => match out::lost() {
            Some(why) => {
                note!("pando: cannot write the output: {why}");
                code.max(exit::FAILED)
            }
            None => code,
        },
        Err(failure) => {
            note!("pando: {}", failure.text());
            failure.code()
        }
    }
}

fn dispatch(command: Command, verbosity: u8) -> Result<u8, Failure> {
    match command {
        Command::Demo(args) => demo::run(&args, verbosity),
        Command::Doctor(args) => doctor::run(&args),
        Command::Template(args) => template::run(args, verbosity),
        Command::Clone(args) => clone::run(&args, verbosity),
        Command::Run(args) => run::run(&args),
        Command::Pager(args) => pager::run(&args),
        Command::Qemu { words } => Ok(qemu::run(&words)),
        Command::Completions { shell } => {
            // Into memory first: clap panics where a reader goes away.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "pando", &mut script);
            say!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(exit::OK)
        }
        Command::CloneWorker => Ok(crate::clone::worker::run()),
        Command::RootWorker => Ok(crate::root::worker::run()),
        Command::PagerWorker => Ok(crate::pager_process::worker::run()),
    }
}
