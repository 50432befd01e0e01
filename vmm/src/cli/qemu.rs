#![forbid(unsafe_code)]
//! `pando qemu`: QEMU's options, messages and exit codes.

use super::out::{note, say};
use crate::observe::log::timestamp;
use crate::qemu::run::{self, Command, FAILED};
use crate::qemu::{program_name, run_name};

/// The options, when this program was started as QEMU or as `pando qemu`.
pub fn words() -> Option<Vec<String>> {
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    words.next();
    if run_name().is_some() {
        return Some(words.collect());
    }
    (words.next().as_deref() == Some("qemu")).then(|| words.collect())
}

/// The time in front of a message, where it is wanted.
fn stamp(wanted: bool) -> String {
    if wanted {
        timestamp() + " "
    } else {
        String::new()
    }
}

/// Runs the machine that the options describe; the exit code.
pub fn run(words: &[String]) -> u8 {
    let program = program_name();
    let shown = match run_name() {
        Some(name) => name,
        None => format!("{program} qemu"),
    };
    let mut stamped = false;
    let mut warn = |line: &str| note!("{program}: {line}");
    let result = run::read(&shown, words, &mut warn).and_then(|command| match command {
        Command::Text(text) => {
            say!("{}", text.trim_end());
            Ok(crate::report::exit::OK)
        }
        Command::Machine(wanted) => {
            stamped = wanted.program.timestamps;
            let prefix = program.clone();
            let tell = Box::new(move |line: &str| note!("{}{prefix}: {line}", stamp(stamped)));
            run::run(*wanted, words, tell)
        }
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            let mut lines = error.lines().into_iter();
            if let Some(line) = lines.next() {
                note!("{}{program}: {line}", stamp(stamped));
            }
            for hint in lines {
                note!("{hint}");
            }
            FAILED
        }
    }
}
