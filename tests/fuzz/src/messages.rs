#![forbid(unsafe_code)]
//! Messages between the processes of Pando, and orders of other VMMs. The first byte says whom they
//! come from; they go through a socket, as they would, and then to what proves them.

use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use pando_pager::{ImageId, PageCount};
use pando_vmm::clone::Engine;
use pando_vmm::clone::consoles::ConsolePlan;
use pando_vmm::clone::control::{
    Channel, ClientMemory, FromWorker, PagerConfig, RawRegion, RawRun, Received, Serial, ToWorker,
    WorkerConfig,
};
use pando_vmm::clone::record::Arriving;
use pando_vmm::clone::vsock::VsockPlan;
use pando_vmm::observe::relay::{Change, Delta, Series, replay};
use pando_vmm::observe::stats::{Durations, PagerStats};
use pando_vmm::pager_process::protocol::{
    ClientNews, ClientOrder, FromPager, PagerStart, RawAttach, RawForget, RawImage, ToPager,
    forgotten_runs, prove_regions,
};
use pando_vmm::root::faults::{self, RawRangeFaults};
use pando_vmm::root::protocol::{FromRoot, RangeFaults, RootConfig, ToRoot};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::parts;

/// Pages of each of the images that there are.
const IMAGE_PAGES: u64 = 1000;
const IMAGES: u32 = 2;

/// Takes a message.
pub fn run(data: &[u8]) {
    let Some((kind, message)) = parts::kind(data, 7) else {
        return;
    };
    match kind {
        0 => to_pager(message),
        1 => from_pager(message),
        2 => _ = received::<ToWorker>(message),
        3 => from_worker(message),
        4 => _ = received::<ToRoot>(message),
        5 => _ = received::<FromRoot>(message),
        _ => {
            if let Ok(order) = serde_json::from_slice(message) {
                obey(&order);
            }
        }
    }
}

/// What comes out of a socket for a message of these bytes.
fn received<T: DeserializeOwned>(message: &[u8]) -> Option<T> {
    let (ours, theirs) = Channel::pair().expect("a socket can be made");
    send(&theirs, message, SendFlags::DONTWAIT).ok()?;
    match ours.receive_now::<T>() {
        Ok(Received::Message(message, _)) => Some(message),
        Ok(Received::Nothing | Received::Closed) | Err(_) => None,
    }
}

fn to_pager(message: &[u8]) {
    if let Some(ToPager::Client(order)) = received(message) {
        obey(&order);
    }
}

/// What a pager process proves before it does anything.
fn obey(order: &ClientOrder) {
    match order {
        ClientOrder::Attach(attach) => regions(&attach.regions),
        ClientOrder::Forget(forget) => _ = forgotten_runs(&forget.runs),
        ClientOrder::Detach { .. } => (),
    }
}

fn regions(raw: &[RawRegion]) {
    let pages_of = |image: ImageId| (image.number() < IMAGES).then(|| PageCount::new(IMAGE_PAGES));
    for region in prove_regions(raw, pages_of).unwrap_or_default() {
        let end = region.pages.start().get() + region.pages.count().get();
        assert!(end <= IMAGE_PAGES, "{region:?} lies in its image");
    }
}

fn from_pager(message: &[u8]) {
    match received(message) {
        Some(FromPager::Metrics(delta)) => add_up(&delta),
        Some(FromPager::HoleFaults(report)) => hole_faults(&report),
        Some(FromPager::Client(news)) => _ = news.client(),
        _ => (),
    }
}

fn from_worker(message: &[u8]) {
    match received(message) {
        Some(FromWorker::Metrics(delta)) => add_up(&delta),
        Some(FromWorker::HoleFaults(report)) => hole_faults(&report),
        Some(FromWorker::Memory(memory)) => regions(&memory.regions),
        Some(FromWorker::Touched(piece)) => {
            let mut arriving = Arriving::default();
            arriving.add(piece);
            let _ = arriving.finish(1);
        }
        _ => (),
    }
}

fn hole_faults(report: &[RawRangeFaults]) {
    let _ = faults::prove(report, |image| {
        (image.number() < IMAGES).then(|| (image.number(), PageCount::new(IMAGE_PAGES)))
    });
}

/// Into an exporter of its own: none is left of what one message said. Sums are of two.
fn add_up(delta: &Delta) {
    let mut stats = PagerStats::default();
    stats.add(delta);
    stats.add(delta);
    let _ = stats
        .fault_total
        .values()
        .map(Durations::percentiles)
        .count();
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || replay(delta, |_, _| 0.0));
    let _ = recorder.handle().render();
}

/// A message as it is on the socket.
fn sent<T: Serialize>(message: &T) -> Vec<u8> {
    let Ok((ours, theirs)) = Channel::pair() else {
        return Vec::new();
    };
    let mut bytes = vec![0; 1 << 17];
    let length = ours
        .send_now(message, &[])
        .ok()
        .and_then(|_| recv(&theirs, &mut bytes[..], RecvFlags::DONTWAIT).ok());
    bytes.truncate(length.map_or(0, |(_, length)| length));
    bytes
}

/// Messages of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let orders = [attach(), forget(), ClientOrder::Detach { client: 1 }];
    let mut seeds: Vec<Vec<u8>> = orders
        .iter()
        .map(|order| parts::of(6, &serde_json::to_vec(order).unwrap_or_default()))
        .collect();
    let orders = orders.map(ToPager::Client);
    seeds.extend(orders.iter().map(|order| parts::of(0, &sent(order))));
    seeds.push(parts::of(0, &sent(&ToPager::Start(start()))));
    seeds.push(parts::of(0, &sent(&ToPager::Image(image()))));
    let from_pager = [
        FromPager::Ready,
        FromPager::Client(ClientNews::Gone { client: 1 }),
        FromPager::Metrics(delta()),
        FromPager::HoleFaults(report()),
    ];
    seeds.extend(from_pager.iter().map(|news| parts::of(1, &sent(news))));
    seeds.push(parts::of(2, &sent(&ToWorker::Start(Box::new(worker())))));
    let from_worker = [
        FromWorker::Memory(ClientMemory {
            regions: vec![region()],
            cpu: Some(0),
            track_writes: true,
            discards: true,
        }),
        FromWorker::Metrics(delta()),
        FromWorker::HoleFaults(report()),
        FromWorker::Warm,
    ];
    seeds.extend(from_worker.iter().map(|news| parts::of(3, &sent(news))));
    seeds.push(parts::of(4, &sent(&ToRoot::Start(root()))));
    let faults = vec![RangeFaults {
        backend: 0,
        unit: 1,
        faults: 2,
    }];
    seeds.push(parts::of(4, &sent(&ToRoot::HoleFaults(faults))));
    seeds.push(parts::of(5, &sent(&FromRoot::Forked { id: 1, pid: 2 })));
    seeds
}

fn region() -> RawRegion {
    RawRegion {
        image: 0,
        address: 1 << 21,
        first_page: 0,
        pages: 10,
    }
}

fn attach() -> ClientOrder {
    ClientOrder::Attach(RawAttach {
        client: 1,
        regions: vec![
            region(),
            RawRegion {
                address: 1 << 22,
                first_page: 10,
                ..region()
            },
        ],
        wake: true,
        cpu: Some(1),
        track_writes: false,
        discards: true,
    })
}

fn forget() -> ClientOrder {
    ClientOrder::Forget(RawForget {
        client: 1,
        runs: vec![RawRun {
            image: 0,
            first_page: 1,
            pages: 2,
        }],
    })
}

fn start() -> PagerStart {
    PagerStart {
        config: PagerConfig::default(),
        supervisor_pid: 1,
        verbosity: 0,
        counts_faults: true,
    }
}

fn image() -> RawImage {
    RawImage {
        template: "t".into(),
        backend: "b".into(),
        path: "p".into(),
    }
}

fn delta() -> Delta {
    let series = |name: &str| Series {
        name: name.into(),
        labels: vec![("stage".into(), "total".into())],
    };
    vec![
        (
            series("pando_pager_pages_installed_total"),
            Change::Counter(3),
        ),
        (
            series("pando_pager_fault_seconds"),
            Change::Histogram(vec![(1000, 2)]),
        ),
        (series("pages_total"), Change::Counter(3)),
        (series("inflight"), Change::Gauge(2.0)),
        (series("seconds"), Change::Histogram(vec![(1000, 2)])),
    ]
}

fn report() -> Vec<RawRangeFaults> {
    vec![RawRangeFaults {
        image: 0,
        unit: 1,
        faults: 2,
    }]
}

fn worker() -> WorkerConfig {
    WorkerConfig {
        clone: 1,
        template: "t".into(),
        engine: Engine::Root,
        serial: Serial::Unix("s".into()),
        vsock: VsockPlan {
            first_cid: Some(3),
            dir: Some("d".into()),
        }
        .orders(1),
        consoles: ConsolePlan {
            dir: Some("d".into()),
        }
        .orders(),
        pager: PagerConfig::default(),
        host_check_is_due: true,
        supervisor_pid: 1,
        verbosity: 0,
        record: None,
        nets: vec![],
        documents: vec![],
    }
}

fn root() -> RootConfig {
    RootConfig {
        template: "t".into(),
        budget_bytes: 1,
        pager: PagerConfig {
            fault_deadline: Duration::from_secs(1),
            ..PagerConfig::default()
        },
        host_check_is_due: true,
        supervisor_pid: 1,
        verbosity: 0,
    }
}

/// Names in orders.
pub fn words() -> Vec<String> {
    let words = [
        "attach",
        "forget",
        "detach",
        "client",
        "regions",
        "image",
        "address",
        "first_page",
        "pages",
        "runs",
        "wake",
        "cpu",
        "track_writes",
        "4096",
        "18446744073709551615",
        "4294967295",
    ];
    words.map(|word| format!("\"{word}\":")).to_vec()
}
