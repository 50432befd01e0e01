#![forbid(unsafe_code)]
//! What is said to a pager process and by it. Raw: what comes in is proven before it is used.

use std::time::Duration;

use pando_pager::{
    ClientRegion, ImageId, ImageRun, PageCount, PageIndex, PageRange, SpecError, check_regions,
};
use serde::{Deserialize, Serialize};

use crate::clone::control::{PagerConfig, RawRegion, RawRun};
use crate::observe::relay::Delta;
use crate::root::faults::RawRangeFaults;

/// How often a pager process says something, if only that it lives.
pub const BEAT: Duration = Duration::from_secs(1);
/// Most images of one pager process.
pub const MAX_IMAGES: usize = 256;
/// Most runs of one order to forget.
pub const MAX_FORGOTTEN_RUNS: usize = 4096;

/// To a pager process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToPager {
    /// The first message: how to work.
    Start(PagerStart),
    /// An image to serve; images are counted from 0 as they come. Beside it: the RAM file, open for
    /// reading only, and its index.
    Image(RawImage),
    /// What a client wants.
    Client(ClientOrder),
    /// Say what was recorded last, then end.
    Stop,
}

/// What a client wants, or who speaks for it. Other VMMs send these as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ClientOrder {
    /// Serve it. Beside it: its userfaultfd, then its pidfd.
    Attach(RawAttach),
    /// Bring these pages again when they are touched the next time.
    Forget(RawForget),
    /// Serve it no longer.
    Detach {
        /// Who.
        client: u64,
    },
}

/// How a pager process works.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PagerStart {
    /// How pages are read; placement decides whether shards are kept on their CPUs.
    pub config: PagerConfig,
    /// The process that must be its parent, lest it outlive it unseen.
    pub supervisor_pid: u32,
    /// How much it logs, as `observe::log::start` takes it.
    pub verbosity: u8,
    /// Whether it says [`FromPager::HoleFaults`]: its clients are forks of a root.
    pub counts_faults: bool,
}

/// An image of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawImage {
    /// The template's name in metrics.
    pub template: String,
    /// Id of the memory backend, by which the index knows it.
    pub backend: String,
    /// What messages call its file.
    pub path: String,
}

/// A client to be served; not proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawAttach {
    /// What whoever asks calls it; free to choose, each once at a time.
    pub client: u64,
    /// What lies where in its address space.
    pub regions: Vec<RawRegion>,
    /// Wake who waits there: another pager may have taken their messages.
    #[serde(default)]
    pub wake: bool,
    /// The CPU that it is kept on, if it is.
    #[serde(default)]
    pub cpu: Option<u32>,
    /// Install pages write-protected: its userfaultfd has UFFD_FEATURE_WP_ASYNC, and its memory is
    /// registered for write protection too.
    #[serde(default)]
    pub track_writes: bool,
    /// A third descriptor is the map of the pages that it discards for good: a file in memory, sealed
    /// against growing and shrinking, with a bit for each page of all images, each image's from a whole word of
    /// 64 on.
    #[serde(default)]
    pub discards: bool,
}

/// Pages of a client to be absent again; not proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawForget {
    /// Whose.
    pub client: u64,
    /// Which.
    pub runs: Vec<RawRun>,
}

/// From a pager process to its supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromPager {
    /// It has its shards and waits for clients.
    Ready,
    /// Something about a client.
    Client(ClientNews),
    /// What was recorded since the last time; empty where that is nothing, to show that it lives.
    Metrics(Delta),
    /// Faults in holes of a root since the last time, of all its clients; not proven.
    HoleFaults(Vec<RawRangeFaults>),
    /// The last message: it cannot go on.
    Failed {
        /// Exit code of the program for it.
        code: u8,
        /// The chain of causes.
        message: String,
    },
    /// The last message after [`ToPager::Stop`].
    Stopped,
}

/// Something about a client. Other VMMs get these as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ClientNews {
    /// It is served.
    Attached {
        /// Who.
        client: u64,
        /// How its pages are read (`pando_pager::IoPath`).
        io: String,
    },
    /// What was ordered for it cannot be; nothing has changed.
    Refused {
        /// Who.
        client: u64,
        /// What was ordered.
        order: Ordered,
        /// Exit code of a program that ends for it.
        code: u8,
        /// Why, the chain of causes.
        why: String,
    },
    /// The pages are absent.
    Forgotten {
        /// Whose.
        client: u64,
    },
    /// A page cannot be had; said once, before whoever waits for it is woken. End the client: it may
    /// not be woken at all (Linux before 6.6).
    Poisoned {
        /// Whose.
        client: u64,
        /// Which page of which image, and why.
        page: String,
    },
    /// Its process or its memory is gone, and it is forgotten.
    Gone {
        /// Who.
        client: u64,
    },
}

/// What was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ordered {
    /// To serve a client.
    Attach,
    /// To make pages absent.
    Forget,
    /// To serve it no longer.
    Detach,
}

/// What another VMM is told before its connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LastWords {
    /// No more of it is taken.
    Closing {
        /// Why.
        why: String,
    },
}

impl ClientNews {
    /// Whom it is about.
    pub fn client(&self) -> u64 {
        match self {
            Self::Attached { client, .. }
            | Self::Refused { client, .. }
            | Self::Forgotten { client }
            | Self::Poisoned { client, .. }
            | Self::Gone { client } => *client,
        }
    }
}

/// Proves what a client says of its memory. `pages_of` says how many pages an image has.
pub fn prove_regions(
    raw: &[RawRegion],
    pages_of: impl Fn(ImageId) -> Option<PageCount>,
) -> Result<Vec<ClientRegion>, SpecError> {
    let mut regions: Vec<ClientRegion> = raw
        .iter()
        .map(|region| ClientRegion {
            image: ImageId::new(region.image),
            address: region.address,
            pages: range(region.first_page, region.pages),
        })
        .collect();
    check_regions(&mut regions, pages_of)?;
    Ok(regions)
}

/// What is to be forgotten; `None` for more runs than [`MAX_FORGOTTEN_RUNS`]. Whether the pages exist
/// is the pager's to prove.
pub fn forgotten_runs(raw: &[RawRun]) -> Option<Vec<ImageRun>> {
    let run = |run: &RawRun| ImageRun {
        image: ImageId::new(run.image),
        pages: range(run.first_page, run.pages),
    };
    (raw.len() <= MAX_FORGOTTEN_RUNS).then(|| raw.iter().map(run).collect())
}

/// Numbers that are too large become the largest there are, which no image has.
fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex::new(first), PageCount::new(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_proven_lies_in_its_image(
            image in 0u32..3, address: u64, first_page in prop_oneof![0u64..20, any::<u64>()],
            pages in prop_oneof![0u64..20, any::<u64>()],
        ) {
            let raw = RawRegion { image, address, first_page, pages };
            let pages_of = |id: ImageId| (id.number() < 2).then(|| PageCount::new(10));
            if let Ok(proven) = prove_regions(&[raw], pages_of) {
                prop_assert!(image < 2 && pages > 0 && first_page + pages <= 10);
                prop_assert_eq!(proven[0].pages.count().get(), pages);
                prop_assert!(address.is_multiple_of(4096));
                prop_assert!(address.checked_add(pages * 4096).is_some());
            }
        }
    }

    #[test]
    fn an_order_reads_as_documented() {
        let text = r#"{"attach":{"client":7,"regions":[{"image":0,"address":4096,"first_page":0,"pages":2}]}}"#;
        let order: ClientOrder = serde_json::from_str(text).unwrap();
        let ClientOrder::Attach(attach) = &order else {
            panic!("{order:?}");
        };
        assert_eq!((attach.client, attach.wake, attach.cpu), (7, false, None));
        serde_json::from_str::<ClientOrder>(&text.replace("client", "clien")).unwrap_err();
        let news = serde_json::to_string(&ClientNews::Gone { client: 7 }).unwrap();
        assert_eq!(news, r#"{"gone":{"client":7}}"#);
    }
}
