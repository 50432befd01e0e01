#![forbid(unsafe_code)]
//! The balloon on the command line, and what becomes of memory that clones discard.

use std::str::FromStr;

use clap::{Args as ClapArgs, ValueEnum};

use super::split;
use crate::config::file::DeviceTable;
use crate::size::Size;

/// `--balloon`
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct BalloonArgs {
    /// A balloon: memory that the guest gives away when it is asked to, statistics of its memory, and with
    /// free-page-reporting pages that it says are free. With deflate-on-oom it takes memory back before it ends
    /// programs for want of it. Clones discard what they give away only with pando clone --discard zero
    #[arg(
        long,
        value_name = "free-page-reporting,deflate-on-oom",
        num_args = 0..=1,
        default_missing_value = "",
        require_equals = true
    )]
    pub balloon: Option<BalloonArg>,
}

/// What a balloon offers the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonArg(pub DeviceTable);

impl FromStr for BalloonArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut oom, mut reporting, mut name) = (false, false, None);
        for word in split(text).into_iter().filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                None if word == "deflate-on-oom" => oom = true,
                None if word == "free-page-reporting" => reporting = true,
                Some(("id", id)) => name = Some(id.to_owned()),
                _ => {
                    return Err(format!(
                        "{word:?} is none of free-page-reporting, deflate-on-oom, id=ID"
                    ));
                }
            }
        }
        Ok(Self(DeviceTable::Balloon {
            id: name,
            slot: None,
            deflate_on_oom: oom,
            free_page_reporting: reporting,
        }))
    }
}

/// What becomes of memory that a clone's guest gives away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum DiscardArg {
    /// Nothing: each attempt is refused and counted, as with QEMU.
    #[default]
    Off,
    /// It goes back to the host and reads as zero.
    Zero,
}

/// What `pando clone` says of memory that guests give away.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct CloneBalloonArgs {
    /// What becomes of guest memory that a balloon or free page reporting discards: off refuses and counts each
    /// attempt, for the memory is the template's; zero gives it back to the host and never brings the template's
    /// bytes there again
    #[arg(long, value_enum, value_name = "HOW", default_value_t = DiscardArg::Off)]
    pub discard: DiscardArg,
    /// Ask each clone's guest to give away so much of its memory (the template has a --balloon)
    #[arg(long, value_name = "SIZE")]
    pub inflate: Option<Size>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_plain_or_has_what_is_said() {
        let balloon = |text: &str| text.parse::<BalloonArg>().map(|balloon| balloon.0);
        let table = |oom, reporting| DeviceTable::Balloon {
            id: None,
            slot: None,
            deflate_on_oom: oom,
            free_page_reporting: reporting,
        };
        assert_eq!(balloon(""), Ok(table(false, false)));
        assert_eq!(balloon("free-page-reporting"), Ok(table(false, true)));
        assert_eq!(
            balloon("deflate-on-oom,free-page-reporting"),
            Ok(table(true, true))
        );
        let error = balloon("free-page-hint").unwrap_err();
        assert!(error.contains("\"free-page-hint\" is none of"), "{error}");
    }
}
