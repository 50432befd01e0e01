//! Every family that is declared moves, and the numbers agree with `Counts`.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::collections::{BTreeMap, HashSet};
use std::thread;
use std::time::Duration;

use common::sys::memory::{read_word, try_read_page};
use common::{Template, options};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::working_set::{Plan, PlannedRun};
use pando_pager::{Budget, IoMode, PageIndex, PageRange, PagerOptions};

/// Sum of a family's samples, label by label.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let parsed = lines.filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    parsed.collect()
}

/// Walks, joins, waits, fails and verifies until everything that can be counted was.
fn eventful(template: &Template) -> pando_pager::Counts {
    let plan = FaultPlan {
        delayed_per_mille: 300,
        delay: Duration::from_millis(3),
        fail_pages: [PageIndex::new(900)].into(),
        fail_calls: [3].into(),
        ..FaultPlan::default()
    };
    let image = template.image();
    std::os::unix::fs::FileExt::write_all_at(&template.writable(), b"?", 801 * 4096).unwrap();
    let options = PagerOptions {
        template: "busy".to_owned(),
        budget: Budget {
            read_chunks: 4,
            waiting_faults: 65,
            ..Budget::default()
        },
        ..options(IoMode::Auto)
    };
    let pager = pando_pager::Pager::new(options).unwrap();
    let mut pager =
        pager.with_source(|inner| Box::new(pando_pager::source::faulty::Faulty::new(inner, plan)));
    let memory = pager.attach(image).unwrap();
    let known = PlannedRun {
        backend: 0,
        pages: PageRange::single(PageIndex::new(1000)),
        rank: 0,
    };
    pager.install_ahead(&Plan {
        private: vec![known],
        ..Plan::default()
    });
    let pager = pager.serve().unwrap();
    thread::scope(|scope| {
        for number in 0..16 {
            let memory = &memory;
            scope.spawn(move || {
                // The same walk for two threads each; then zero pages; then scattered ones.
                let start = number / 2 * 64;
                (start..start + 64).for_each(|page| _ = read_word(memory, page));
                (1024..1300).for_each(|page| _ = read_word(memory, page));
                (512 + number..768)
                    .step_by(16)
                    .for_each(|page| _ = read_word(memory, page));
            });
        }
    });
    try_read_page(&memory, 900).unwrap_err();
    try_read_page(&memory, 800).unwrap_err();
    pager.stop().unwrap()
}

#[test]
fn every_family_is_declared_and_moves() {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(
            Matcher::Full("pando_pager_fault_seconds".to_owned()),
            pando_pager::metrics::FAULT_BUCKETS_SECONDS,
        )
        .unwrap();
    let recorder = builder.install_recorder().unwrap();
    pando_pager::metrics::describe();
    pando_pager::metrics::register("busy");
    let registered = samples(&recorder.render());
    assert!(
        registered.values().all(|&value| value == 0.0),
        "{registered:?}"
    );
    let template = Template::new(2048, |page| page < 1024);
    let counts = eventful(&template);
    let text = recorder.render();
    let samples = samples(&text);
    assert!(
        samples.keys().eq(registered.keys()),
        "a series was not registered\n{text}"
    );
    for series in samples.keys() {
        assert!(series.contains("{template=\"busy\""), "{series}");
    }
    let sum = |prefix: &str| -> f64 {
        let matching = samples.iter().filter(|(name, _)| name.starts_with(prefix));
        matching.map(|(_, value)| value).sum()
    };
    let declared: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    assert_eq!(declared.len(), 12, "{declared:?}");
    // These return to zero when nothing is in flight and nobody serves.
    let settled = ["pando_pager_inflight_reads", "pando_pager_io_info"];
    for family in &declared {
        assert_eq!(
            sum(family) > 0.0,
            !settled.contains(family),
            "{family}\n{text}"
        );
    }
    let equal = |prefix: &str, count: u64| {
        assert!(
            (sum(prefix) - count as f64).abs() < 0.5,
            "{prefix}: {count}\n{text}"
        );
    };
    equal("pando_pager_faults_total{template=\"busy\"", counts.faults);
    equal(
        "pando_pager_faults_total{template=\"busy\",kind=\"joined\"}",
        counts.faults_joined,
    );
    equal("pando_pager_bytes_read_total", counts.bytes_read);
    equal("pando_pager_retries_total", counts.retries);
    equal("pando_pager_poisoned_pages_total", 2);
    equal(
        "pando_template_verify_failures_total",
        counts.verify_failures,
    );
    let installed = counts.pages_zero + counts.pages_cache + counts.pages_disk;
    equal("pando_pager_pages_installed_total", installed);
    let ahead = counts.prefetch_useful + counts.prefetch_late + counts.prefetch_wasted;
    equal("pando_pager_prefetch_pages_total", ahead);
    equal(
        "pando_pager_limit_hits_total",
        counts.waits_for_buffer + counts.waits_for_queue,
    );
    for source in ["zero", "cache", "disk"] {
        for stage in ["queue", "read", "install", "total"] {
            let series = format!(
                "pando_pager_fault_seconds_count{{template=\"busy\",source=\"{source}\",stage=\"{stage}\"}}"
            );
            let moved = samples.get(&series).is_some_and(|&count| count > 0.0);
            assert_eq!(
                moved,
                !(source == "zero" && stage == "read"),
                "{series}\n{text}"
            );
        }
    }
}
