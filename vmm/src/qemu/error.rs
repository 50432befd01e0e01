#![forbid(unsafe_code)]
//! How QEMU's command line says no: a message behind the option that is at fault, then hints.

use std::fmt;

/// Why a command line, an option of it or a state was refused, in the form in which QEMU says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionError {
    /// The option as it was typed, `-object memory-backend-file,id=ram`, when one is at fault.
    location: Option<String>,
    message: String,
    /// What follows on lines of its own, without the program's name.
    hints: Vec<String>,
}

impl OptionError {
    /// A refusal that names no option.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            location: None,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    /// The same with a line of advice behind it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The same as a fault of the option `typed`. The innermost option stays.
    #[must_use]
    pub fn at(mut self, typed: &str) -> Self {
        self.location.get_or_insert_with(|| typed.to_owned());
        self
    }

    /// What is wrong, without the option.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The lines to print, the first behind the program's name.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.to_string()];
        lines.extend(self.hints.iter().cloned());
        lines
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Some(location) => write!(f, "{location}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for OptionError {}

/// A parameter that is not there.
pub fn missing(name: &str) -> OptionError {
    OptionError::new(format!("Parameter '{name}' is missing"))
}

/// A parameter that nothing knows.
pub fn invalid_parameter(name: &str) -> OptionError {
    OptionError::new(format!("Invalid parameter '{name}'"))
}

/// A parameter whose value is of another kind.
pub fn expects(name: &str, what: &str) -> OptionError {
    OptionError::new(format!("Parameter '{name}' expects {what}"))
}

/// A parameter whose value is none of the few that there are.
pub fn not_accepted(name: &str, value: &str) -> OptionError {
    OptionError::new(format!(
        "Parameter '{name}' does not accept value '{value}'"
    ))
}

/// An id of other characters than ids have.
pub fn no_identifier() -> OptionError {
    expects("id", "an identifier")
        .hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
}
