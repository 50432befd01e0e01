#![forbid(unsafe_code)]
//! Printing to readers that may go away: a closed pipe ends the output, not the program.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Prints a line to standard output, as `println!` does, but never panics.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::out::line(&mut std::io::stdout(), format_args!($($text)*)) };
}

/// Prints a line to standard error, as `eprintln!` does, but never panics.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::out::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

pub(super) use {note, say};

/// Writes a line; whoever would read an error about that is gone.
pub(super) fn line(out: &mut impl Write, text: Arguments<'_>) {
    let _ = write_line(out, text);
}

fn write_line(out: &mut impl Write, text: Arguments<'_>) -> io::Result<()> {
    out.write_fmt(text)?;
    out.write_all(b"\n")?;
    out.flush()
}
