#![forbid(unsafe_code)]
//! One round: memory is made, touched and thrown away.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use metrics_exporter_prometheus::PrometheusBuilder;
use pando_pager::image::BackendIndex;
use pando_pager::{Counts, Image, IoMode, PAGE_BYTES, Pager, PagerOptions, Verify};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tempfile::TempDir;

use super::load::Load;
use crate::page_cache;
use crate::sys::touch::Memory;

/// Where the pager thread runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Placement {
    /// On the CPU where pages are touched.
    Same,
    /// On another one.
    Other,
    /// Where the scheduler likes, as do the threads that touch pages.
    Free,
}

/// Who brings the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Engine {
    /// A private mapping of the file.
    Kernel,
    /// A pager.
    Copy(PagerSetup),
}

/// How the pager works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct PagerSetup {
    /// Where its thread runs.
    pub(crate) placement: Placement,
    /// Whether it reads with pread instead of what it chooses itself.
    pub(crate) pread: bool,
    /// Whether checksums are compared.
    pub(crate) verify: bool,
    /// How long it looks for the next fault before it sleeps, in microseconds.
    pub(crate) spin_us: u64,
    /// Whether its metrics are recorded.
    pub(crate) metrics: bool,
}

impl PagerSetup {
    /// What users get, but for the placement.
    pub(crate) fn on(placement: Placement) -> Self {
        Self {
            placement,
            pread: false,
            verify: true,
            spin_us: 0,
            metrics: false,
        }
    }
}

/// How pages are touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Access {
    /// Read.
    Read,
    /// Written.
    Write,
}

/// What a round took.
#[derive(Debug)]
pub(crate) struct Round {
    /// Until the last thread was done.
    pub(crate) wall: Duration,
    /// Processor time of this process meanwhile, the pager's thread included.
    pub(crate) processor: Duration,
    /// Each touch.
    pub(crate) touches: Vec<Duration>,
    /// What the pager did; all zero without one.
    pub(crate) counts: Counts,
}

/// The image: data in its lower half, a hole in the upper.
#[derive(Debug)]
pub(crate) struct Subject {
    folder: TempDir,
    index: BackendIndex,
    pages: u64,
    /// CPUs of this process, two at most.
    cpus: Vec<usize>,
}

impl Subject {
    /// Writes the image.
    pub(crate) fn make(bytes: u64, folder: Option<&Path>) -> Result<Self> {
        let folder = match folder {
            Some(folder) => TempDir::with_prefix_in("pando-bench-", folder),
            None => TempDir::with_prefix("pando-bench-"),
        }
        .context("cannot make a folder for the image")?;
        let path = folder.path().join("image.mem");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        let pages = bytes / PAGE_BYTES;
        for page in 0..pages / 2 {
            // Each page differs, so that none could be served for another unseen.
            let text = (page | 1 << 63).to_le_bytes().repeat(512);
            file.write_all_at(&text, page * PAGE_BYTES)
                .context("cannot write the image")?;
        }
        file.set_len(bytes).context("cannot size the image")?;
        file.sync_all().context("cannot write the image")?;
        let index = BackendIndex::scan(&file, bytes, &mut |_, _| ())?;
        let allowed = sched_getaffinity(None).context("cannot tell this process's CPUs")?;
        let cpus = (0..CpuSet::MAX_CPU)
            .filter(|&cpu| allowed.is_set(cpu))
            .take(2)
            .collect();
        Ok(Self {
            folder,
            index,
            pages,
            cpus,
        })
    }

    /// Whether this machine has a second CPU for the pager.
    pub(crate) fn has_other_cpu(&self) -> bool {
        self.cpus.len() > 1
    }

    /// Pages of the image.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// CPUs of this process, two at most.
    pub(crate) fn cpus(&self) -> &[usize] {
        &self.cpus
    }

    /// Drops the image from the page cache.
    pub(crate) fn make_cold(&self) -> Result<()> {
        page_cache::drop_file(&self.path())
    }

    /// The image, to be served.
    pub(crate) fn image(&self) -> Result<Image> {
        Ok(Image::open(&self.path(), "ram0", self.index.clone())?)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image.mem")
    }

    /// One round of `load`.
    pub(crate) fn round(
        &self,
        engine: Engine,
        access: Access,
        load: &Load,
        seed: u64,
    ) -> Result<Round> {
        let visits = load.visits(self.pages, seed);
        match engine {
            Engine::Kernel => {
                let memories = (0..load.clones)
                    .map(|_| Memory::private(&File::open(self.path())?))
                    .collect::<Result<Vec<_>>>()?;
                let cpu = self.cpus.first().copied().filter(|_| load.threads == 1);
                let before = processor_time();
                let (wall, touches) = touch(&memories, &visits, access, cpu)?;
                Ok(Round {
                    wall,
                    processor: processor_time().saturating_sub(before),
                    touches,
                    counts: Counts::default(),
                })
            }
            Engine::Copy(setup) => self.served_round(setup, access, load, &visits),
        }
    }

    fn served_round(
        &self,
        setup: PagerSetup,
        access: Access,
        load: &Load,
        visits: &[Vec<u64>],
    ) -> Result<Round> {
        let (pager_cpu, toucher_cpu) = match (setup.placement, &self.cpus[..]) {
            (Placement::Same, [first, ..]) => (Some(*first), Some(*first)),
            (Placement::Other, [first, second, ..]) => (Some(*second), Some(*first)),
            _ => (None, None),
        };
        let options = PagerOptions {
            template: "bench".to_owned(),
            io: if setup.pread {
                IoMode::Pread
            } else {
                IoMode::Auto
            },
            verify: if setup.verify {
                Verify::OnRead
            } else {
                Verify::Off
            },
            cpu: pager_cpu,
            spin: Duration::from_micros(setup.spin_us),
            ..PagerOptions::default()
        };
        let mut pager = if setup.metrics {
            // The pager keeps its handles: what it records goes to this recorder ever after.
            let recorder = PrometheusBuilder::new().build_recorder();
            metrics::with_local_recorder(&recorder, || Pager::new(options))?
        } else {
            Pager::new(options)?
        };
        let memories = (0..load.clones)
            .map(|_| Ok(Memory::served(pager.attach(self.image()?)?)))
            .collect::<Result<Vec<_>>>()?;
        let pager = pager.serve()?;
        let before = processor_time();
        let (wall, touches) = touch(&memories, visits, access, toucher_cpu)?;
        let processor = processor_time().saturating_sub(before);
        let counts = pager.stop()?;
        Ok(Round {
            wall,
            processor,
            touches,
            counts,
        })
    }
}

/// What this process has used of its processors so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(time.tv_sec.unsigned_abs(), nanoseconds)
}

/// Has a thread for each entry of `visits` touch its pages, in each memory.
fn touch(
    memories: &[Memory],
    visits: &[Vec<u64>],
    access: Access,
    cpu: Option<usize>,
) -> Result<(Duration, Vec<Duration>)> {
    let all: Vec<(&Memory, &[u64])> = memories
        .iter()
        .flat_map(|memory| visits.iter().map(move |pages| (memory, &pages[..])))
        .collect();
    let barrier = Barrier::new(all.len());
    let threads = thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter()
            .map(|&(memory, pages)| scope.spawn(|| touch_all(memory, pages, access, cpu, &barrier)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let begun = threads.iter().map(|(begun, _)| *begun).min();
    let ended = threads
        .iter()
        .map(|(begun, touches)| *begun + touches.iter().sum::<Duration>())
        .max();
    let wall = begun
        .zip(ended)
        .map_or(Duration::ZERO, |(begun, ended)| ended - begun);
    let touches = threads.into_iter().flat_map(|(_, touches)| touches);
    Ok((wall, touches.collect()))
}

/// When the thread began, and each touch; the clock is read once a touch.
fn touch_all(
    memory: &Memory,
    pages: &[u64],
    access: Access,
    cpu: Option<usize>,
    barrier: &Barrier,
) -> Result<(Instant, Vec<Duration>)> {
    // Written once, so that the room for the figures does not fault while it is measured.
    let mut touches = vec![Duration::MAX; pages.len()];
    touches.clear();
    let pinned = cpu.map_or(Ok(()), |cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)
    });
    barrier.wait();
    pinned.context("cannot pin a thread to its CPU")?;
    let begun = Instant::now();
    let mut last = begun;
    for &page in pages {
        match access {
            Access::Read => {
                black_box(memory.read(page)?);
            }
            Access::Write => memory.write(page, 1)?,
        }
        let now = Instant::now();
        touches.push(now - last);
        last = now;
    }
    Ok((begun, touches))
}

#[cfg(test)]
mod tests {
    use super::super::load::{Content, Order};
    use super::*;

    #[test]
    fn every_engine_brings_every_page() {
        let subject = Subject::make(1 << 20, None).unwrap();
        let load = Load {
            clones: 2,
            threads: 3,
            ..Load::one(Content::Data, Order::Random, 100)
        };
        let paged = Engine::Copy(PagerSetup {
            metrics: true,
            pread: true,
            ..PagerSetup::on(Placement::Same)
        });
        for (engine, faults) in [(Engine::Kernel, 0), (paged, 200)] {
            for access in [Access::Read, Access::Write] {
                let round = subject.round(engine, access, &load, 1).unwrap();
                assert_eq!(round.touches.len(), 200);
                assert!(round.wall >= *round.touches.iter().max().unwrap());
                assert!(round.counts.faults >= faults / 8, "{:?}", round.counts);
                assert!(round.counts.faults <= faults * 2, "{:?}", round.counts);
            }
        }
    }
}
