#![forbid(unsafe_code)]
//! One pager for many clients, which are processes of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use metrics_exporter_prometheus::PrometheusBuilder;
use pando_pager::{
    ClientEvent, ClientId, ClientRegion, ClientSpec, PAGE_BYTES, PageCount, PageIndex, PageRange,
    SharedOptions, SharedPager,
};
use rustix::time::ClockId;
use serde::Serialize;

use super::client::{Client, Touched, clock};
use crate::fault::load::Load;
use crate::fault::touch::Subject;

/// Where the pager's threads run, and their clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Place {
    /// One thread; it and the clients where the scheduler likes.
    OneFree,
    /// One thread on the first CPU, and the clients there too.
    OneSame,
    /// One thread on the last CPU, the clients on the first.
    OneOther,
    /// A thread for each CPU, pinned; the clients where the scheduler likes.
    EachFree,
    /// A thread for each CPU, pinned; each client on the CPU of its thread.
    EachTogether,
}

impl Place {
    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OneFree => "one thread, scheduler's choice",
            Self::OneSame => "one thread, all on one CPU",
            Self::OneOther => "one thread, clients on the other CPU",
            Self::EachFree => "a thread for each CPU, clients anywhere",
            Self::EachTogether => "a thread for each CPU, clients with theirs",
        }
    }

    /// The CPU of each thread, among those of this process.
    fn threads(self, cpus: &[usize]) -> Vec<Option<usize>> {
        let (first, last) = (cpus.first().copied(), cpus.last().copied());
        match self {
            Self::OneFree => vec![None],
            Self::OneSame => vec![first],
            Self::OneOther => vec![last],
            Self::EachFree | Self::EachTogether => cpus.iter().copied().map(Some).collect(),
        }
    }

    /// The CPU of a client.
    fn client(self, number: usize, cpus: &[usize]) -> Option<usize> {
        match self {
            Self::OneFree | Self::EachFree => None,
            Self::OneSame | Self::OneOther => cpus.first().copied(),
            Self::EachTogether => cpus.get(number % cpus.len().max(1)).copied(),
        }
    }
}

/// How the pager works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Setup {
    pub(super) place: Place,
    /// How long a thread looks for the next fault before it sleeps, in microseconds.
    pub(super) spin_us: u64,
    pub(super) metrics: bool,
}

/// What one round took.
#[derive(Debug)]
pub(super) struct Round {
    /// First touch to last touch of all clients.
    pub(super) wall: Duration,
    pub(super) touches: Vec<Duration>,
    /// Processor time of the pager and of the clients.
    pub(super) processor: Duration,
    /// Faults that the pager had.
    pub(super) faults: u64,
}

/// Client processes, made once.
#[derive(Debug)]
pub(super) struct Clients {
    all: Vec<Client>,
    /// CPUs of this process.
    cpus: Vec<usize>,
}

impl Clients {
    /// Starts `count` of them.
    pub(super) fn start(count: u32, cpus: Vec<usize>) -> Result<Self> {
        let all = (0..count).map(|_| Client::start()).collect::<Result<_>>()?;
        Ok(Self { all, cpus })
    }

    /// CPUs of this process.
    pub(super) fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// Clients of a new pager touch the pages of `load`, all at once.
    pub(super) fn round(
        &self,
        subject: &Subject,
        setup: Setup,
        load: &Load,
        seed: u64,
    ) -> Result<Round> {
        let count = load.clones as usize;
        ensure!(count <= self.all.len(), "{count} clients were not started");
        let threads = setup.place.threads(&self.cpus);
        let shards = threads.len();
        let poisoned = Arc::new(AtomicU64::new(0));
        let count_poisoned = Arc::clone(&poisoned);
        let options = SharedOptions {
            shards: threads,
            spin: Duration::from_micros(setup.spin_us),
            ..SharedOptions::default()
        };
        let listen = Arc::new(move |event: ClientEvent| {
            if matches!(
                event,
                ClientEvent::Poisoned { .. } | ClientEvent::ShardFailed { .. }
            ) {
                count_poisoned.fetch_add(1, Ordering::Relaxed);
            }
        });
        let start = || -> Result<_> {
            let pager = SharedPager::start(options, listen)?;
            let image = pager.add_image(subject.image()?, "bench")?;
            Ok((pager, image))
        };
        let (pager, image) = if setup.metrics {
            // The pager keeps its handles: what it records goes to this recorder ever after.
            let recorder = PrometheusBuilder::new().build_recorder();
            metrics::with_local_recorder(&recorder, start)?
        } else {
            start()?
        };
        let pages = PageRange::new(PageIndex::new(0), PageCount::new(subject.pages()));
        for (number, client) in self.all[..count].iter().enumerate() {
            let (address, uffd) = client.map(subject.pages() * PAGE_BYTES)?;
            let spec = ClientSpec {
                discards: None,
                uffd,
                pidfd: None,
                regions: vec![ClientRegion {
                    image,
                    address,
                    pages,
                }],
                wake: false,
                shard: Some(number % shards),
                record: None,
                ahead: Vec::new(),
                track_writes: false,
            };
            pager.attach(ClientId::new(number as u64), spec)?;
        }
        let before = clock(ClockId::ProcessCPUTime);
        for (number, client) in self.all[..count].iter().enumerate() {
            let visits = load
                .visits(subject.pages(), seed * 1000 + number as u64)
                .concat();
            let visits = visits
                .into_iter()
                .map(u32::try_from)
                .collect::<Result<_, _>>()?;
            client.go(visits, setup.place.client(number, &self.cpus))?;
        }
        let touched = self.all[..count]
            .iter()
            .map(Client::touched)
            .collect::<Result<Vec<Touched>>>()?;
        let own = clock(ClockId::ProcessCPUTime).saturating_sub(before);
        let faults = pager.counts().faults;
        for number in 0..count {
            pager.detach(ClientId::new(number as u64));
        }
        ensure!(
            poisoned.load(Ordering::Relaxed) == 0,
            "the pager could not serve a page, or failed"
        );
        let begun = touched.iter().map(|client| client.begun).min();
        let ended = touched.iter().map(Touched::ended).max();
        let all = touched.iter().flat_map(|client| &client.touches_ns);
        Ok(Round {
            wall: ended
                .zip(begun)
                .map(|(ended, begun)| ended - begun)
                .context("no client")?,
            touches: all.map(|&ns| Duration::from_nanos(ns.into())).collect(),
            processor: own
                + touched
                    .iter()
                    .map(|client| client.processor)
                    .sum::<Duration>(),
            faults,
        })
    }
}
