#![forbid(unsafe_code)]
//! Every metric of the pager, declared once. Handles are fetched when a pager is made: a fault
//! allocates nothing and looks nothing up.

use std::time::Duration;

use ::metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use crate::port::IoPath;
use crate::retry::RetryReason;

const FAULTS: &str = "pando_pager_faults_total";
const FAULT_SECONDS: &str = "pando_pager_fault_seconds";
const PAGES_INSTALLED: &str = "pando_pager_pages_installed_total";
const BYTES_READ: &str = "pando_pager_bytes_read_total";
const PREFETCH_PAGES: &str = "pando_pager_prefetch_pages_total";
const AHEAD_PAGES: &str = "pando_pager_ahead_pages_total";
const INFLIGHT_READS: &str = "pando_pager_inflight_reads";
const RETRIES: &str = "pando_pager_retries_total";
const POISONED: &str = "pando_pager_poisoned_pages_total";
const LIMIT_HITS: &str = "pando_pager_limit_hits_total";
const IO_INFO: &str = "pando_pager_io_info";
const VERIFY_FAILURES: &str = "pando_template_verify_failures_total";

/// Upper bounds in seconds that suit `pando_pager_fault_seconds`: from a microsecond to the
/// deadline.
pub const FAULT_BUCKETS_SECONDS: &[f64] = &[
    1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0,
    10.0,
];

/// Describes every family to the recorder that is installed.
pub fn describe() {
    describe_counter!(
        FAULTS,
        "Fault messages, by what they found: data to be read, a zero page, a read under way (joined), a page that was there already (stale)"
    );
    describe_histogram!(
        FAULT_SECONDS,
        Unit::Seconds,
        "Time of a fault from the pager's sight, by stage; total ends when the waiter is woken"
    );
    describe_counter!(
        PAGES_INSTALLED,
        "Pages put in place, by where they came from; pages ahead of a walk included"
    );
    describe_counter!(
        BYTES_READ,
        Unit::Bytes,
        "Bytes read from template files, whether cached or not"
    );
    describe_counter!(
        PREFETCH_PAGES,
        "Pages installed ahead of a walk, or of a clone: useful (the walk went on behind them, or they were written), late (asked for while being read), wasted (the walk was not seen behind them, or they were brought to be written and were not)"
    );
    describe_counter!(
        AHEAD_PAGES,
        "Pages of the recorded working set that were brought before anybody asked"
    );
    describe_gauge!(INFLIGHT_READS, "Template reads that are not done yet");
    describe_counter!(RETRIES, "Tries repeated, by reason");
    describe_counter!(
        POISONED,
        "Pages that could not be had; touching one is an error"
    );
    describe_counter!(
        LIMIT_HITS,
        "How often a limit of the budget made a fault wait"
    );
    describe_gauge!(IO_INFO, "1 per serving pager, by the path its reads take");
    describe_counter!(
        VERIFY_FAILURES,
        "Chunks that are not what the template's index says"
    );
}

/// Creates every series that a pager of `template` can move, so that an exporter shows them at
/// zero from the beginning: a counter that first appears with a value has no rate before. What
/// moved already stays as it is. Install a recorder before.
pub fn register(template: &str) {
    let metrics = Metrics::new(template);
    for path in IoPath::ALL {
        metrics.io_info(path.name()).increment(0.0);
    }
}

/// Counts pages of the working set that were brought ahead of a clone, once it is known: `useful`
/// ones were written, `wasted` ones were brought to be written and were not.
pub fn count_prefetched(template: &str, useful: u64, wasted: u64) {
    for (result, pages) in [("useful", useful), ("wasted", wasted)] {
        counter!(PREFETCH_PAGES, "template" => template.to_owned(), "result" => result)
            .increment(pages);
    }
}

/// Where a page came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// No bytes were needed.
    Zero,
    /// The read was complete when it had been submitted: page cache.
    Cache,
    /// The read completed later.
    Disk,
}

impl Origin {
    const ALL: [Self; 3] = [Self::Zero, Self::Cache, Self::Disk];

    const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Cache => "cache",
            Self::Disk => "disk",
        }
    }
}

/// What a fault message found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    Data,
    Zero,
    Joined,
    Stale,
}

/// Limits that can be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Buffers,
    Queue,
}

/// How long the parts of one fault took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stages {
    pub(crate) queue: Duration,
    pub(crate) read: Option<Duration>,
    pub(crate) install: Duration,
    pub(crate) total: Duration,
}

#[derive(Debug)]
struct PerOrigin {
    queue: Histogram,
    read: Histogram,
    install: Histogram,
    total: Histogram,
    pages: Counter,
}

/// The handles of one pager.
#[derive(Debug)]
pub(crate) struct Metrics {
    faults: [Counter; 4],
    origins: [PerOrigin; 3],
    bytes_read: Counter,
    useful: Counter,
    late: Counter,
    wasted: Counter,
    ahead: Counter,
    inflight: Gauge,
    retries: [Counter; 7],
    poisoned: Counter,
    verify_failures: Counter,
    limits: [Counter; 2],
    template: String,
}

impl Metrics {
    /// Fetches every handle for `template`.
    pub(crate) fn new(template: &str) -> Self {
        let label = || template.to_owned();
        let fault = |kind: &'static str| counter!(FAULTS, "template" => label(), "kind" => kind);
        let prefetch = |result: &'static str| counter!(PREFETCH_PAGES, "template" => label(), "result" => result);
        let stage = |origin: Origin, stage: &'static str| histogram!(FAULT_SECONDS, "template" => label(), "source" => origin.name(), "stage" => stage);
        Self {
            faults: ["data", "zero", "joined", "stale"].map(fault),
            origins: Origin::ALL.map(|origin| PerOrigin {
                queue: stage(origin, "queue"),
                // A zero page is not read: no such series.
                read: if origin == Origin::Zero {
                    Histogram::noop()
                } else {
                    stage(origin, "read")
                },
                install: stage(origin, "install"),
                total: stage(origin, "total"),
                pages: counter!(PAGES_INSTALLED, "template" => label(), "source" => origin.name()),
            }),
            bytes_read: counter!(BYTES_READ, "template" => label()),
            useful: prefetch("useful"),
            late: prefetch("late"),
            wasted: prefetch("wasted"),
            ahead: counter!(AHEAD_PAGES, "template" => label()),
            inflight: gauge!(INFLIGHT_READS, "template" => label()),
            retries: RetryReason::ALL
                .map(|reason| counter!(RETRIES, "template" => label(), "reason" => reason.name())),
            poisoned: counter!(POISONED, "template" => label()),
            verify_failures: counter!(VERIFY_FAILURES, "template" => label()),
            limits: ["buffers", "queue"]
                .map(|limit| counter!(LIMIT_HITS, "template" => label(), "limit" => limit)),
            template: label(),
        }
    }

    pub(crate) fn fault(&self, kind: FaultKind) {
        self.faults[kind as usize].increment(1);
    }

    pub(crate) fn answered(&self, origin: Origin, stages: &Stages) {
        let series = &self.origins[origin as usize];
        series.queue.record(stages.queue);
        if let Some(read) = stages.read {
            series.read.record(read);
        }
        series.install.record(stages.install);
        series.total.record(stages.total);
    }

    pub(crate) fn installed(&self, origin: Origin, pages: u64) {
        self.origins[origin as usize].pages.increment(pages);
    }

    pub(crate) fn ahead(&self, pages: u64) {
        self.ahead.increment(pages);
    }

    pub(crate) fn read_started(&self) {
        self.inflight.increment(1.0);
    }

    pub(crate) fn read_ended(&self, bytes: u64) {
        self.inflight.decrement(1.0);
        self.bytes_read.increment(bytes);
    }

    pub(crate) fn prefetch(&self, useful: u64, late: u64, wasted: u64) {
        for (counter, pages) in [
            (&self.useful, useful),
            (&self.late, late),
            (&self.wasted, wasted),
        ] {
            if pages > 0 {
                counter.increment(pages);
            }
        }
    }

    pub(crate) fn retried(&self, reason: RetryReason, times: u64) {
        self.retries[reason as usize].increment(times);
    }

    pub(crate) fn poisoned(&self) {
        self.poisoned.increment(1);
    }

    pub(crate) fn verify_failed(&self) {
        self.verify_failures.increment(1);
    }

    pub(crate) fn limit_hit(&self, limit: Limit) {
        self.limits[limit as usize].increment(1);
    }

    /// One pager more (or less) whose reads take `path`.
    pub(crate) fn serving(&self, path: &'static str, begins: bool) {
        let info = self.io_info(path);
        if begins {
            info.increment(1.0);
        } else {
            info.decrement(1.0);
        }
    }

    fn io_info(&self, path: &'static str) -> Gauge {
        gauge!(IO_INFO, "template" => self.template.clone(), "path" => path)
    }
}
