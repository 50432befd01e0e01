#![forbid(unsafe_code)]
//! What L1 says on its serial console, as a typed report.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// One check of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The name that the scenario gave it.
    pub name: String,
    /// What went wrong; nothing when it passed.
    pub failure: Option<String>,
}

/// A line of the console that means something to the rig.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// `CHECK <name> ok` or `CHECK <name> FAIL <detail>`.
    Check(Check),
    /// `RIG done`.
    Done,
    /// Anything else.
    Other,
}

impl Line {
    /// Reads one line, with or without the carriage return that a terminal adds.
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        if line == "RIG done" {
            return Line::Done;
        }
        let Some((name, rest)) = line
            .strip_prefix("CHECK ")
            .and_then(|rest| rest.split_once(' '))
        else {
            return Line::Other;
        };
        let failure = match rest.split_once(' ').unwrap_or((rest, "")) {
            ("ok", _) => None,
            ("FAIL", detail) => Some(detail.to_owned()),
            // Torn apart by something else on the console: not a pass.
            _ => Some(format!("unreadable report '{rest}'")),
        };
        Line::Check(Check {
            name: name.to_owned(),
            failure,
        })
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The scenario got to its end.
    Done,
    /// The time limit, in seconds, came first.
    TimedOut(u64),
    /// Its console said nothing for so many seconds.
    Silent(u64),
    /// L1 ended before its scenario did.
    Died(String),
}

/// What came out of a run.
#[derive(Debug)]
pub struct Report {
    /// Every check, in the order of the console.
    pub checks: Vec<Check>,
    /// How the run ended.
    pub ended: Ended,
    /// The whole console.
    pub log: PathBuf,
    /// The last lines of it, for a failure's message.
    pub tail: Vec<String>,
}

impl Report {
    /// Whether the scenario got to its end, checked something, and all of it passed.
    pub fn passed(&self) -> bool {
        self.ended == Ended::Done
            && !self.checks.is_empty()
            && self.checks.iter().all(|check| check.failure.is_none())
    }

    /// Writes the names of the checks that ran to `target/checks`, where `tests/run` compares them
    /// with those that are expected to run.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&self, name: &str) -> Result<()> {
        let folder = super::work_folder()?.join("../checks");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(format!("rig-{name}.checks"));
        let names: String = self
            .checks
            .iter()
            .map(|check| format!("rig {name}/{}\n", check.name))
            .collect();
        fs::write(&path, names).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self
            .checks
            .iter()
            .filter(|check| check.failure.is_some())
            .count();
        for check in &self.checks {
            match &check.failure {
                None => writeln!(f, "  ok    {}", check.name)?,
                Some(detail) => writeln!(f, "  FAIL  {}: {detail}", check.name)?,
            }
        }
        match &self.ended {
            Ended::Done => writeln!(f, "the scenario got to its end")?,
            Ended::TimedOut(seconds) => writeln!(f, "the limit of {seconds} s came first")?,
            Ended::Silent(seconds) => {
                writeln!(f, "the console said nothing for {seconds} s")?;
            }
            Ended::Died(how) => writeln!(f, "L1 ended before its scenario did ({how})")?,
        }
        if !self.passed() {
            writeln!(f, "the end of the console:")?;
            for line in &self.tail {
                writeln!(f, "  | {line}")?;
            }
        }
        write!(
            f,
            "{} checks, {failed} failed; console: {}",
            self.checks.len(),
            self.log.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, failure: Option<&str>) -> Line {
        Line::Check(Check {
            name: name.to_owned(),
            failure: failure.map(str::to_owned),
        })
    }

    #[test]
    fn lines_are_read() {
        assert_eq!(Line::parse("RIG done\r"), Line::Done);
        assert_eq!(Line::parse("CHECK boots ok\r\n"), check("boots", None));
        assert_eq!(
            Line::parse("CHECK boots FAIL exit 1: no"),
            check("boots", Some("exit 1: no"))
        );
        assert_eq!(Line::parse("[  1.0] CHECK me"), Line::Other);
    }

    #[test]
    fn a_torn_line_is_no_pass() {
        assert_eq!(
            Line::parse("CHECK boots o[ 1.0] k"),
            check("boots", Some("unreadable report 'o[ 1.0] k'"))
        );
    }

    #[test]
    fn a_run_that_checked_nothing_did_not_pass() {
        let report = Report {
            checks: Vec::new(),
            ended: Ended::Done,
            log: PathBuf::new(),
            tail: Vec::new(),
        };
        assert!(!report.passed());
    }
}
