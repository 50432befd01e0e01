#![forbid(unsafe_code)]
//! The answers of the embedded guest, read.

use super::protocol::{Reason, ReplyError, letter};

/// What a command came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Pages were read.
    Touched {
        /// How many.
        count: u64,
        /// Sum of their first words.
        sum: u64,
    },
    /// Pages were compared.
    Verified {
        /// How many.
        count: u64,
        /// How many had another word.
        mismatches: u64,
        /// Number of the first such page.
        first_mismatch: Option<u64>,
    },
    /// Pages were written.
    Written {
        /// How many.
        count: u64,
    },
    /// A range was summed up.
    Checksum {
        /// See [`Checksum`](super::model::Checksum).
        sum: u64,
    },
    /// A range was searched for bytes other than zero.
    Scanned {
        /// Pages that have any.
        nonzero: u64,
        /// Number of the first such page.
        first_nonzero: Option<u64>,
    },
    /// Who the guest is.
    Identity {
        /// The first word at [`identity_address`](super::layout::Layout::identity_address).
        generation: u64,
        /// The two words behind it.
        id: [u64; 2],
        /// Initial APIC id of the processor.
        apic_id: u64,
        /// Time stamp counter.
        tsc: u64,
    },
    /// The numbers that were sent.
    Echo(Vec<u64>),
    /// The loop was run.
    Spun {
        /// How many turns.
        turns: u64,
    },
    /// The byte was written to the port.
    Out,
    /// A byte was read from the port.
    In {
        /// The byte.
        value: u64,
    },
    /// The guest halts now.
    Halting,
    /// The guest asks to be powered off now.
    PoweringOff,
    /// The guest asks to be reset now.
    Resetting,
    /// The guest refused.
    Refused {
        /// The command's letter; `?` if the line had none.
        command: char,
        /// Why.
        reason: Reason,
    },
}

impl Outcome {
    /// The refusal of a range.
    pub(super) fn out_of_range(command: char) -> Self {
        Self::Refused {
            command,
            reason: Reason::Range,
        }
    }
}

/// One line of answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What the command came to.
    pub outcome: Outcome,
    /// Ticks of the guest's time stamp counter that its work took, where it is measured.
    pub ticks: Option<u64>,
}

impl Reply {
    /// Reads one line, with or without its end.
    pub fn parse(line: &str) -> Result<Self, ReplyError> {
        let error = || ReplyError {
            line: line.to_owned(),
        };
        let mut words = line.split_ascii_whitespace();
        let verdict = words.next().ok_or_else(error)?;
        let command = words.next().ok_or_else(error)?;
        let [command] = *command.as_bytes() else {
            return Err(error());
        };
        if verdict == "err" {
            let reason = words.next().ok_or_else(error)?;
            let numbers = numbers(words).ok_or_else(error)?;
            let reason = parse_reason(reason, &numbers).ok_or_else(error)?;
            let command = char::from(command);
            return Ok(Self {
                outcome: Outcome::Refused { command, reason },
                ticks: None,
            });
        }
        if verdict != "ok" {
            return Err(error());
        }
        let numbers = numbers(words).ok_or_else(error)?;
        parse_done(command, &numbers).ok_or_else(error)
    }
}

fn numbers<'a>(words: impl Iterator<Item = &'a str>) -> Option<Vec<u64>> {
    words
        .map(|word| u64::from_str_radix(word, 16).ok())
        .collect()
}

fn parse_reason(reason: &str, numbers: &[u64]) -> Option<Reason> {
    match *numbers {
        [] => [
            Reason::Unknown,
            Reason::Parameters,
            Reason::Range,
            Reason::Alive,
        ]
        .into_iter()
        .find(|known| known.as_str() == reason),
        [vector, error_code, instruction, address] if reason == Reason::FAULT => {
            Some(Reason::Fault {
                vector,
                error_code,
                instruction,
                address,
            })
        }
        _ => None,
    }
}

fn parse_done(command: u8, numbers: &[u64]) -> Option<Reply> {
    // Page zero is never a data page: the guest says it for "none".
    let page = |number: u64| (number != 0).then_some(number);
    let (outcome, ticks) = match (command, numbers) {
        (letter::TOUCH, &[count, sum, ticks]) => (Outcome::Touched { count, sum }, Some(ticks)),
        (letter::VERIFY, &[count, mismatches, first, ticks]) => {
            let first_mismatch = page(first);
            (
                Outcome::Verified {
                    count,
                    mismatches,
                    first_mismatch,
                },
                Some(ticks),
            )
        }
        (letter::WRITE, &[count, ticks]) => (Outcome::Written { count }, Some(ticks)),
        (letter::CHECKSUM, &[sum, ticks]) => (Outcome::Checksum { sum }, Some(ticks)),
        (letter::SCAN, &[nonzero, first, ticks]) => {
            let first_nonzero = page(first);
            (
                Outcome::Scanned {
                    nonzero,
                    first_nonzero,
                },
                Some(ticks),
            )
        }
        (letter::IDENTITY, &[generation, low, high, apic_id, tsc]) => (
            Outcome::Identity {
                generation,
                id: [low, high],
                apic_id,
                tsc,
            },
            None,
        ),
        (letter::ECHO, words) => (Outcome::Echo(words.to_vec()), None),
        (letter::SPIN, &[turns, ticks]) => (Outcome::Spun { turns }, Some(ticks)),
        (letter::OUT, &[]) => (Outcome::Out, None),
        (letter::IN, &[value]) => (Outcome::In { value }, None),
        (letter::HALT, &[]) => (Outcome::Halting, None),
        (letter::POWER_OFF, &[]) => (Outcome::PoweringOff, None),
        (letter::RESET, &[]) => (Outcome::Resetting, None),
        _ => return None,
    };
    Some(Reply { outcome, ticks })
}
