#![forbid(unsafe_code)]
//! What the guest of a clone is asked to do while the clock runs. Pure.

use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Outcome, Pattern, Visit};
use serde::Serialize;

/// Pages that a clone writes.
pub(crate) const PAGES: u64 = 2048;
/// Pages with data in the template; random ones are among these.
pub(crate) const DATA_PAGES: u64 = 8192;
/// What the template's pages are written with.
pub(crate) const TEMPLATE_SALT: u64 = 0x0a5b;
/// What clones write their pages with.
const CLONE_SALT: u64 = 0xc10e;

/// A way to use a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Answer one command.
    FirstOutput,
    /// Write [`PAGES`] pages one after the other, then answer.
    Sequential,
    /// Write [`PAGES`] of [`DATA_PAGES`] pages in random order, then answer.
    Random,
}

impl Workload {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::FirstOutput, Self::Sequential, Self::Random];

    /// What a table calls it.
    pub(crate) fn title(self) -> String {
        match self {
            Self::FirstOutput => "start to the first output".to_owned(),
            Self::Sequential => format!("start + {PAGES} pages written one after the other"),
            Self::Random => {
                format!("start + {PAGES} pages written in random order, of {DATA_PAGES}")
            }
        }
    }

    /// The command, and what the guest must answer. Clones with the same `seed` visit the same
    /// pages in the same order.
    pub(crate) fn command(self, seed: u64) -> (Command, Outcome) {
        let first_page = LAYOUT.first_data_page;
        let write = |range_pages, pattern| {
            let visit = Visit {
                first_page,
                range_pages,
                count: PAGES,
                pattern,
            };
            let command = Command::Write {
                visit,
                salt: CLONE_SALT,
            };
            (command, Outcome::Written { count: PAGES })
        };
        match self {
            Self::FirstOutput => (Command::Echo(vec![seed]), Outcome::Echo(vec![seed])),
            Self::Sequential => write(PAGES, Pattern::Sequential),
            Self::Random => write(DATA_PAGES, Pattern::Random { seed }),
        }
    }
}

/// What gives the template its pages with data.
pub(crate) fn fill() -> Command {
    Command::Write {
        visit: Visit::all(LAYOUT.first_data_page, DATA_PAGES),
        salt: TEMPLATE_SALT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_vmm::payload::model::DataPages;

    #[test]
    fn the_guest_obeys_every_command() {
        let mut pages = DataPages::new((64 << 20) / 4096);
        assert_eq!(
            pages.obey(&fill()),
            Some(Outcome::Written { count: DATA_PAGES })
        );
        for workload in Workload::ALL {
            let (command, answer) = workload.command(7);
            assert_eq!(pages.obey(&command), Some(answer), "{workload:?}");
        }
    }
}
