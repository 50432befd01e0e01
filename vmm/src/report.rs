#![forbid(unsafe_code)]
//! How errors reach a person: the whole chain, and what the process exits with.

use std::error::Error;
use std::fmt::Write;

/// Exit codes of `pando`.
pub mod exit {
    /// All went well.
    pub const OK: u8 = 0;
    /// Something failed; the message says what.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// This host cannot do it; `pando doctor` says why.
    pub const HOST: u8 = 3;
    /// The template is damaged, changed, of a newer format, or needs another host.
    pub const TEMPLATE: u8 = 4;
    /// Guest memory could not be read from the template.
    pub const MEMORY: u8 = 5;

    /// What a process that ended with this code wanted to say.
    pub const fn meaning(code: u8) -> &'static str {
        match code {
            OK => "all went well",
            USAGE => "the command line is wrong",
            HOST => "this host cannot do it",
            TEMPLATE => "the template cannot be used",
            MEMORY => "guest memory could not be read",
            _ => "something failed",
        }
    }
}

/// An error and its causes, one below the other.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, "\n  because: {error}");
        cause = error.source();
    }
    text
}

/// An error and its causes in one line.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_each_cause_once() {
        let error = anyhow::anyhow!("EIO")
            .context("cannot read ram0.mem")
            .context("clone failed");
        assert_eq!(
            chain(error.as_ref()),
            "clone failed\n  because: cannot read ram0.mem\n  because: EIO"
        );
        assert_eq!(
            one_line(error.as_ref()),
            "clone failed: cannot read ram0.mem: EIO"
        );
    }
}
