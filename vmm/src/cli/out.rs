#![forbid(unsafe_code)]
//! Printing to readers that may go away: a closed pipe ends the output, not the program.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::OnceLock;

/// Prints a line to standard output, as `println!` does, but never panics.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::out::line(&mut std::io::stdout(), format_args!($($text)*)) };
}

/// Prints a line to standard error, as `eprintln!` does, but never panics.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::out::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

pub(super) use {note, say};

/// Why output was lost, if it was for another reason than a reader that went away.
static LOST: OnceLock<String> = OnceLock::new();

/// Writes a line. A reader that went away wanted no more; any other error is kept for the end.
pub(super) fn line(out: &mut impl Write, text: Arguments<'_>) {
    if let Err(error) = write_line(out, text)
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        let _ = LOST.set(error.to_string());
    }
}

/// Why output was lost, for the end of the program.
pub(super) fn lost() -> Option<&'static str> {
    LOST.get().map(String::as_str)
}

fn write_line(out: &mut impl Write, text: Arguments<'_>) -> io::Result<()> {
    out.write_fmt(text)?;
    out.write_all(b"\n")?;
    out.flush()
}
