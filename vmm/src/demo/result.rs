#![forbid(unsafe_code)]
//! What the demonstration found, in a form for programs; the command line draws its table from it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::clone::Engine;
use crate::observe::stats::{PagerStats, Percentiles};

/// What the demonstration found.
#[derive(Debug, Clone, Serialize)]
pub struct DemoResult {
    /// How many clones were asked for.
    pub clones: usize,
    /// How many answered everything rightly.
    pub verified: usize,
    /// What went wrong with the others.
    pub failures: Vec<CloneFailure>,
    /// Where their memory came from.
    pub engine: Engine,
    /// How pages were read: `uring_read`, `uring_poll`, `pread`, or `none` without a pager.
    pub io: String,
    /// How many clones were starting at once.
    pub parallel: usize,
    /// The template.
    pub template: TemplateFacts,
    /// Stages of a start in order; `total` is from the request to the guest's first output.
    pub start: Vec<(String, Percentiles)>,
    /// Time from the first clone's request until every clone was verified, in milliseconds.
    pub all_verified_ms: f64,
    /// What the pagers did.
    pub pager: PagerFacts,
    /// What clones took when all of them were alive.
    pub memory: MemoryFacts,
    /// Where metrics were served.
    pub metrics: SocketAddr,
}

/// A clone that was not right.
#[derive(Debug, Clone, Serialize)]
pub struct CloneFailure {
    /// Its number.
    pub clone: usize,
    /// The exit code that goes with it.
    pub code: u8,
    /// What was wrong.
    pub message: String,
}

/// The template of the demonstration.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateFacts {
    /// Its directory; gone afterwards unless it was asked for.
    pub dir: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Pages with data.
    pub data_pages: u64,
    /// Time to make it, in milliseconds.
    pub create_ms: f64,
    /// Digests of the RAM files when it was made.
    pub digest_before: Vec<String>,
    /// Digests of the RAM files after the last clone.
    pub digest_after: Vec<String>,
    /// Whether they are the same.
    pub unchanged: bool,
}

/// What the pagers of all clones did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PagerFacts {
    /// From fault to woken vCPU by where the page came from.
    pub fault_us: BTreeMap<String, Percentiles>,
    /// Pages installed by where they came from.
    pub installed_pages: BTreeMap<String, u64>,
    /// All counters by name.
    pub counters: BTreeMap<String, u64>,
}

impl From<&PagerStats> for PagerFacts {
    fn from(stats: &PagerStats) -> Self {
        Self {
            fault_us: stats
                .fault_total
                .iter()
                .map(|(source, durations)| (source.clone(), durations.percentiles()))
                .collect(),
            installed_pages: stats.installed_pages.clone(),
            counters: stats.counters.clone(),
        }
    }
}

/// What clones took when all of them were alive, in bytes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct MemoryFacts {
    /// Median private memory of a clone's process.
    pub private_bytes_p50: u64,
    /// Median resident memory of a clone's process.
    pub resident_bytes_p50: u64,
    /// Median proportional share of a clone's process.
    pub proportional_bytes_p50: u64,
    /// What available memory of the host fell by, for each clone; kernel memory is in it.
    pub available_fell_bytes: u64,
}
