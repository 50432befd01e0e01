#![forbid(unsafe_code)]
//! The Prometheus exporter and the families that the VMM itself records (the pager's are its own).

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::memory::ram::RamMemory;

/// Histogram buckets for durations, in seconds: from 1 us, each 1-2-5 step to 10 s.
pub const BUCKETS_SECONDS: [f64; 22] = [
    1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1,
    0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];

/// Who wants to discard guest RAM, as metrics have it.
pub const DISCARD_SOURCES: [&str; 5] = [
    "balloon",
    "free-page-reporting",
    "virtio-mem",
    "release-ram",
    "postcopy",
];

/// Why metrics cannot be served.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The address is taken or not ours.
    #[error("cannot serve metrics on {address}: choose another address for --metrics")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// What the exporter or the system said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Installs the exporter and serves `http://ADDRESS/metrics`; port 0 takes a free one. Returns the
/// address that is served.
pub fn serve(address: SocketAddr) -> Result<SocketAddr, MetricsError> {
    let listen = |source| MetricsError::Listen { address, source };
    // The exporter does not tell which port it got, so a free one is found before.
    let bound = TcpListener::bind(address)
        .and_then(|listener| listener.local_addr())
        .map_err(|error| listen(error.into()))?;
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS_SECONDS)
        .map(|builder| builder.with_http_listener(bound))
        .and_then(PrometheusBuilder::install)
        .map_err(|error: BuildError| listen(error.into()))?;
    describe();
    pando_pager::metrics::describe();
    gauge!("pando_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    register_discards();
    Ok(bound)
}

fn describe() {
    describe_gauge!(
        "pando_build_info",
        "Always 1; the label says which version runs"
    );
    describe_gauge!("pando_clones", "Clones by template and state");
    describe_histogram!(
        "pando_clone_start_seconds",
        Unit::Seconds,
        "Time of one stage of starting a clone; stage total is from the request to the guest's first output"
    );
    describe_gauge!(
        "pando_clone_memory_bytes",
        Unit::Bytes,
        "Memory of all clones of a template by class, as last measured; class kernel is there where it is known"
    );
    describe_gauge!(
        "pando_clone_marginal_bytes",
        Unit::Bytes,
        "What one more clone of a template costs this host, by how available memory fell over the last starts"
    );
    describe_counter!(
        "pando_clone_memory_errors_total",
        "Measurements of a clone's memory that could not be made"
    );
    describe_gauge!(
        "pando_root_memory_bytes",
        Unit::Bytes,
        "Guest memory that the root process of a template holds for all its clones"
    );
    describe_counter!(
        "pando_root_hole_faults_total",
        "Faults of clones in ranges that their root does not hold, as their pagers reported them"
    );
    describe_counter!(
        "pando_root_promoted_ranges_total",
        "Ranges of 2 MiB that a root filled because clones asked for them"
    );
    describe_counter!(
        "pando_clone_failures_total",
        "Clones that ended otherwise than asked"
    );
    describe_counter!(
        "pando_clone_given_back_bytes_total",
        Unit::Bytes,
        "Guest memory that idle clones gave back to the host because it equals the template"
    );
    describe_counter!(
        "pando_clone_give_back_pauses_total",
        "How often a clone's guest was paused to give memory back"
    );
    describe_counter!(
        "pando_clone_lessons_total",
        "Clones that were recorded in passing, by what became of what they touched"
    );
    describe_counter!(
        "pando_clone_probe_pages_total",
        "Pages of the working set that were held back from recorded clones, by whether they asked for them"
    );
    describe_counter!(
        "pando_discard_refused_total",
        "Discards of guest memory that were refused because it is a template's, by who wanted them"
    );
    describe_counter!(
        "pando_pager_restarts_total",
        "Pager processes that were lost, and replaced as often as that is allowed"
    );
}

/// Makes the series of a template's clones and pagers visible before anything has happened: a rate
/// needs a first value. Those of starts come with the first clone.
pub fn register(template: &str) {
    pando_pager::metrics::register(template);
    counter!("pando_clone_failures_total", "template" => template.to_owned()).increment(0);
    pager_restarts(template).increment(0);
    set_root_memory(template, 0);
    count_hole_faults(template, 0);
    count_promoted(template, 0);
    for (class, bytes) in RamMemory::default().classes() {
        set_memory(template, class, bytes);
    }
    for class in ["process_private", "process_shared", "page_tables"] {
        set_memory(template, class, 0);
    }
    for reason in ["error", "places"] {
        unmeasured(template, reason).increment(0);
    }
    for result in ["learned", "empty", "dropped", "refused"] {
        lessons(template, result).increment(0);
    }
    count_given_back(template, 0, 0);
    count_judgement(template, &Judged::default());
}

/// Says how many clones of a template are in a state.
pub fn set_clones(template: &str, state: &'static str, clones: usize) {
    let clones = u32::try_from(clones).unwrap_or(u32::MAX);
    gauge!("pando_clones", "template" => template.to_owned(), "state" => state).set(clones);
}

/// Records one stage of a clone's start.
pub fn record_start(template: &str, engine: &str, stage: &str, duration: Duration) {
    histogram!(
        "pando_clone_start_seconds",
        "template" => template.to_owned(),
        "engine" => engine.to_owned(),
        "stage" => stage.to_owned(),
    )
    .record(duration.as_secs_f64());
}

/// Says how much memory all clones of a template take in a class.
#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub fn set_memory(template: &str, class: &'static str, bytes: u64) {
    gauge!("pando_clone_memory_bytes", "template" => template.to_owned(), "class" => class)
        .set(bytes as f64);
}

/// Says how much guest memory the root process of a template holds for all its clones.
pub fn set_root_memory(template: &str, bytes: u64) {
    gauge!("pando_root_memory_bytes", "template" => template.to_owned()).set(bytes as f64);
}

/// Counts faults of clones in holes of their root.
pub fn count_hole_faults(template: &str, faults: u64) {
    counter!("pando_root_hole_faults_total", "template" => template.to_owned()).increment(faults);
}

/// Counts ranges that a root filled because clones asked for them.
pub fn count_promoted(template: &str, ranges: u64) {
    counter!("pando_root_promoted_ranges_total", "template" => template.to_owned())
        .increment(ranges);
}

/// Says what one more clone costs this host.
pub fn set_marginal(template: &str, bytes: f64) {
    gauge!("pando_clone_marginal_bytes", "template" => template.to_owned()).set(bytes);
}

/// Counts a measurement of a clone's memory that could not be made.
pub fn count_unmeasured(template: &str, reason: &'static str) {
    unmeasured(template, reason).increment(1);
}

fn unmeasured(template: &str, reason: &'static str) -> metrics::Counter {
    counter!("pando_clone_memory_errors_total", "template" => template.to_owned(), "reason" => reason)
}

/// Counts a pager process that was lost.
pub fn count_pager_restart(template: &str) {
    pager_restarts(template).increment(1);
}

fn pager_restarts(template: &str) -> metrics::Counter {
    counter!("pando_pager_restarts_total", "template" => template.to_owned())
}

/// Counts a clone that ended otherwise than asked.
pub fn count_failure(template: &str) {
    counter!("pando_clone_failures_total", "template" => template.to_owned()).increment(1);
}

fn lessons(template: &str, result: &'static str) -> metrics::Counter {
    counter!("pando_clone_lessons_total", "template" => template.to_owned(), "result" => result)
}

/// Makes the series of refused discards visible before there is one.
pub fn register_discards() {
    for source in DISCARD_SOURCES {
        count_discard_refused(source, 0);
    }
}

/// Counts discards of guest RAM that were refused, by who wanted them.
pub fn count_discard_refused(source: &'static str, attempts: u64) {
    counter!("pando_discard_refused_total", "source" => source).increment(attempts);
}

/// Counts a clone that was recorded in passing, by what became of it.
pub fn count_lesson(template: &str, result: &'static str) {
    lessons(template, result).increment(1);
}

/// Counts memory that a clone gave back.
pub fn count_given_back(template: &str, bytes: u64, pauses: u64) {
    counter!("pando_clone_given_back_bytes_total", "template" => template.to_owned())
        .increment(bytes);
    counter!("pando_clone_give_back_pauses_total", "template" => template.to_owned())
        .increment(pauses);
}

/// What bringing pages ahead of a recorded clone was good for, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// Brought and written.
    pub useful: u64,
    /// Brought to be written, and not written.
    pub wasted: u64,
    /// Held back, and asked for.
    pub probes_touched: u64,
    /// Held back, and not asked for.
    pub probes_untouched: u64,
}

/// Counts what bringing pages ahead of a recorded clone was good for.
pub fn count_judgement(template: &str, judged: &Judged) {
    pando_pager::metrics::count_prefetched(template, judged.useful, judged.wasted);
    for (result, pages) in [
        ("touched", judged.probes_touched),
        ("untouched", judged.probes_untouched),
    ] {
        counter!("pando_clone_probe_pages_total", "template" => template.to_owned(), "result" => result)
            .increment(pages);
    }
}
