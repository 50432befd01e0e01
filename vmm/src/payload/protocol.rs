#![forbid(unsafe_code)]
//! What is said to the embedded guest over COM1, and what it answers.
//!
//! A command is one line: a letter, then hex numbers without prefix, each after a space. The
//! answer is one line: `ok`, the letter and hex numbers, or `err`, the letter and a reason. Where
//! a command takes time the last number of its answer is that time, in ticks of the guest's time
//! stamp counter. The guest echoes nothing and takes one command at a time: a line sent before
//! the answer to the one before it waits in the serial port.
//!
//! | command | answer | |
//! |---|---|---|
//! | `w FIRST RANGE N PATTERN PARAMETER SALT` | `N` ticks | write a word into each of N pages |
//! | `v FIRST RANGE N PATTERN PARAMETER SALT` | `N` wrong, first wrong page, ticks | verify them |
//! | `r FIRST RANGE N PATTERN PARAMETER` | `N` sum, ticks | read their first words |
//! | `c FIRST PAGES` | checksum, ticks | of every byte |
//! | `z FIRST PAGES` | pages, first page, ticks | pages that are not all zero |
//! | `i` | generation, id, id, APIC id, tsc | identity |
//! | `e ...` | the same | echo |
//! | `s TURNS` | turns, ticks | spin |
//! | `o PORT BYTE`, `n PORT` | nothing, byte | port output, input |
//! | `h`, `p`, `x` | nothing | halt, power off, reset |
//!
//! Patterns: 0 sequential, 1 strided (parameter: pages), 2 random (parameter: seed).

use std::fmt;
use std::fmt::Write as _;

use thiserror::Error;

pub use super::reply::{Outcome, Reply};

/// The serial port that the guest talks on.
pub const COM1_PORT: u16 = 0x3f8;
/// What the guest sends when it is ready for commands.
pub const READY_LINE: &str = "pando guest ready\n";
/// The port and the byte by which the guest asks to be powered off: the sleep control register
/// that the machine's ACPI tables name, S5 (type 5) with the enable bit (ACPI 6.5, 4.8.3.7).
pub const POWER_OFF: (u16, u8) = (0x600, 5 << 2 | 1 << 5);
/// The port and the byte by which the guest asks to be reset: pulse the reset line of the keyboard
/// controller.
pub const RESET: (u16, u8) = (0x64, 0xfe);

/// The letters of the commands.
pub(super) mod letter {
    pub(in super::super) const CHECKSUM: u8 = b'c';
    pub(in super::super) const ECHO: u8 = b'e';
    pub(in super::super) const HALT: u8 = b'h';
    pub(in super::super) const IDENTITY: u8 = b'i';
    pub(in super::super) const IN: u8 = b'n';
    pub(in super::super) const OUT: u8 = b'o';
    pub(in super::super) const POWER_OFF: u8 = b'p';
    pub(in super::super) const RESET: u8 = b'x';
    pub(in super::super) const SCAN: u8 = b'z';
    pub(in super::super) const SPIN: u8 = b's';
    pub(in super::super) const TOUCH: u8 = b'r';
    pub(in super::super) const VERIFY: u8 = b'v';
    pub(in super::super) const WRITE: u8 = b'w';
}

/// The numbers of the patterns.
pub(super) mod pattern {
    pub(in super::super) const SEQUENTIAL: i32 = 0;
    pub(in super::super) const STRIDED: i32 = 1;
    pub(in super::super) const RANDOM: i32 = 2;
}

/// In which order pages of a range are visited. No pattern visits a page twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// Every `stride_pages`-th; behind the end, again from one page further.
    Strided {
        /// Distance of two visits, in pages; at least one, at most the range.
        stride_pages: u64,
    },
    /// In an order that looks random and depends on `seed` alone.
    Random {
        /// Any number.
        seed: u64,
    },
}

/// Which pages a command visits, in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// First page number of the range (guest address / 4096).
    pub first_page: u64,
    /// Pages of the range.
    pub range_pages: u64,
    /// How many of them are visited; at least one, at most all.
    pub count: u64,
    /// In which order.
    pub pattern: Pattern,
}

impl Visit {
    /// The whole range, page after page.
    pub const fn all(first_page: u64, range_pages: u64) -> Self {
        Self {
            first_page,
            range_pages,
            count: range_pages,
            pattern: Pattern::Sequential,
        }
    }

    fn words(&self) -> [u64; 5] {
        let (number, parameter) = match self.pattern {
            Pattern::Sequential => (pattern::SEQUENTIAL, 0),
            Pattern::Strided { stride_pages } => (pattern::STRIDED, stride_pages),
            Pattern::Random { seed } => (pattern::RANDOM, seed),
        };
        let number = u64::from(number.unsigned_abs());
        [
            self.first_page,
            self.range_pages,
            self.count,
            number,
            parameter,
        ]
    }
}

/// Something to ask of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Read the first word of each page.
    Touch(Visit),
    /// Compare the word of each page with what [`Command::Write`] gives it.
    Verify {
        /// Which pages.
        visit: Visit,
        /// The salt they were written with.
        salt: u64,
    },
    /// Give each page one word that depends on the page and the salt.
    Write {
        /// Which pages.
        visit: Visit,
        /// Any number.
        salt: u64,
    },
    /// Checksum over all bytes of a range.
    Checksum {
        /// First page number.
        first_page: u64,
        /// How many pages.
        pages: u64,
    },
    /// Count the pages of a range that are not all zero.
    Scan {
        /// First page number.
        first_page: u64,
        /// How many pages.
        pages: u64,
    },
    /// Who are you?
    Identity,
    /// Say this (at most eight numbers).
    Echo(Vec<u64>),
    /// Be busy.
    Spin {
        /// Turns of an empty loop.
        turns: u64,
    },
    /// Write a byte to a port.
    Out {
        /// The port.
        port: u16,
        /// The byte.
        value: u8,
    },
    /// Read a byte from a port.
    In {
        /// The port.
        port: u16,
    },
    /// Answer, then halt for ever.
    Halt,
    /// Answer, then power the machine off.
    PowerOff,
    /// Answer, then reset the machine.
    Reset,
}

impl Command {
    /// The line to send.
    pub fn encode(&self) -> Vec<u8> {
        let (letter, words): (u8, Vec<u64>) = match self {
            Self::Touch(visit) => (letter::TOUCH, visit.words().into()),
            Self::Verify { visit, salt } => (
                letter::VERIFY,
                visit.words().into_iter().chain([*salt]).collect(),
            ),
            Self::Write { visit, salt } => (
                letter::WRITE,
                visit.words().into_iter().chain([*salt]).collect(),
            ),
            Self::Checksum { first_page, pages } => (letter::CHECKSUM, vec![*first_page, *pages]),
            Self::Scan { first_page, pages } => (letter::SCAN, vec![*first_page, *pages]),
            Self::Identity => (letter::IDENTITY, vec![]),
            Self::Echo(words) => (letter::ECHO, words.clone()),
            Self::Spin { turns } => (letter::SPIN, vec![*turns]),
            Self::Out { port, value } => (letter::OUT, vec![u64::from(*port), u64::from(*value)]),
            Self::In { port } => (letter::IN, vec![u64::from(*port)]),
            Self::Halt => (letter::HALT, vec![]),
            Self::PowerOff => (letter::POWER_OFF, vec![]),
            Self::Reset => (letter::RESET, vec![]),
        };
        let mut line = String::from(char::from(letter));
        for word in words {
            write!(line, " {word:x}").expect("a string takes all text");
        }
        line.push('\n');
        line.into_bytes()
    }
}

/// Why the guest refused a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// There is no such command.
    Unknown,
    /// The parameters are no hex numbers, or not as many as the command takes.
    Parameters,
    /// A parameter is outside of what the command takes, or pages are not RAM free for data.
    Range,
    /// The machine should have ended and did not.
    Alive,
    /// The processor raised an exception.
    Fault {
        /// Its vector.
        vector: u64,
        /// Its error code, zero if it has none.
        error_code: u64,
        /// Address of the instruction.
        instruction: u64,
        /// The last faulting address (CR2).
        address: u64,
    },
}

impl Reason {
    /// How [`Reason::Fault`] begins on the wire.
    pub(super) const FAULT: &str = "fault";

    /// The reason on the wire.
    pub(super) const fn as_str(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Parameters => "parameters",
            Self::Range => "range",
            Self::Alive => "alive",
            Self::Fault { .. } => Self::FAULT,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => write!(f, "the guest knows no such command"),
            Self::Parameters => write!(f, "the command has the wrong parameters"),
            Self::Range => write!(
                f,
                "a parameter is out of range or names pages not free for data"
            ),
            Self::Alive => write!(f, "the machine went on although it was asked to end"),
            Self::Fault {
                vector,
                error_code,
                instruction,
                address,
            } => write!(
                f,
                "the guest took exception {vector} (error code {error_code:#x}) at \
                 {instruction:#x}, address {address:#x}"
            ),
        }
    }
}

/// A line that is no answer of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the guest answered {line:?}, which is no reply line")]
pub struct ReplyError {
    /// The line.
    pub line: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_short_lines_of_hex() {
        let visit = Visit {
            first_page: 0x200,
            range_pages: 0x7e00,
            count: 0x800,
            pattern: Pattern::Random { seed: 0xabc },
        };
        for (command, line) in [
            (
                Command::Write { visit, salt: 7 },
                "w 200 7e00 800 2 abc 7\n",
            ),
            (
                Command::Verify { visit, salt: 0 },
                "v 200 7e00 800 2 abc 0\n",
            ),
            (Command::Touch(Visit::all(0x200, 16)), "r 200 10 10 0 0\n"),
            (
                Command::Checksum {
                    first_page: 512,
                    pages: 1,
                },
                "c 200 1\n",
            ),
            (Command::Echo(vec![]), "e\n"),
            (Command::Echo(vec![1, u64::MAX]), "e 1 ffffffffffffffff\n"),
            (
                Command::Out {
                    port: 0x3f8,
                    value: 10,
                },
                "o 3f8 a\n",
            ),
            (Command::PowerOff, "p\n"),
        ] {
            assert_eq!(String::from_utf8(command.encode()).unwrap(), line);
        }
    }

    #[test]
    fn replies_are_read() {
        let reply = |line| Reply::parse(line).unwrap();
        assert_eq!(
            reply("ok v 10 2 201 3e8\n"),
            Reply {
                outcome: Outcome::Verified {
                    count: 16,
                    mismatches: 2,
                    first_mismatch: Some(0x201)
                },
                ticks: Some(1000)
            }
        );
        assert_eq!(
            reply("ok z 0 0 1").outcome,
            Outcome::Scanned {
                nonzero: 0,
                first_nonzero: None
            }
        );
        let reason = Reason::Fault {
            vector: 14,
            error_code: 2,
            instruction: 0x10_0480,
            address: 0x4000_0000,
        };
        assert_eq!(
            reason.to_string(),
            "the guest took exception 14 (error code 0x2) at 0x100480, address 0x40000000"
        );
        assert_eq!(
            reply("err w fault e 2 100480 40000000").outcome,
            Outcome::Refused {
                command: 'w',
                reason
            }
        );
    }

    #[test]
    fn lines_that_are_no_replies_are_refused_and_quoted() {
        for line in [
            "",
            "ok",
            "ok  \n",
            "ok w",
            "ok w 1",
            "ok w 1 2 3",
            "ok w 1 g",
            "ok ww 1 2",
            "no w 1 2",
            "ok q",
            "err w",
            "err w nonsense",
            "err w range 1",
            "err w fault 1 2 3",
            "ok e 11111111111111111",
            "pando guest ready",
        ] {
            let error = Reply::parse(line).unwrap_err().to_string();
            assert!(error.contains(&format!("{line:?}")), "{error}");
        }
    }
}
