#![forbid(unsafe_code)]
//! What a subcommand ends with when it fails: a message and an exit code.

use std::error::Error;

use crate::clone::instantiate::CloneError;
use crate::host;
use crate::launch::LaunchError;
use crate::machine;
use crate::observe::metrics::MetricsError;
use crate::report::{chain, exit};
use crate::template::TemplateError;
use crate::template::build::BuildError;

/// A failed subcommand.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    /// A failure with an exit code of its own.
    pub fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    /// The command line asks for something that cannot be.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(exit::USAGE, text)
    }

    /// Any error, with its causes.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let code = if host::is_lacking(error) {
            exit::HOST
        } else {
            exit::FAILED
        };
        Self::new(code, chain(error))
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// What to print.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl From<TemplateError> for Failure {
    fn from(error: TemplateError) -> Self {
        Self::new(error.exit_code(), chain(&error))
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Template(error) => error.into(),
            other => Self::of(&other),
        }
    }
}

impl From<CloneError> for Failure {
    fn from(error: CloneError) -> Self {
        match error {
            CloneError::Template(error) => error.into(),
            other => Self::of(&other),
        }
    }
}

impl From<LaunchError> for Failure {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::MemoryLost { .. }
            | LaunchError::Failed(machine::Failure::MemoryError { .. }) => {
                Self::new(exit::MEMORY, chain(&error))
            }
            other => Self::of(&other),
        }
    }
}

impl From<MetricsError> for Failure {
    fn from(error: MetricsError) -> Self {
        Self::of(&error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::of(error.as_ref())
    }
}
