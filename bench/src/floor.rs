#![forbid(unsafe_code)]
//! `pando-bench floor`: what the kernel alone asks for a clone, with nothing of Pando in it.
//!
//! A root process holds filled guest memory. Each clone is a fork of it that makes a KVM VM with
//! one slot, the irqchip and one vCPU, and runs a guest that writes ten pages and one port.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::cli::FloorArgs;
use crate::host::{Host, anonymous_huge_bytes, memory_each_bytes, settled_memory_bytes};
use crate::report::{Report, TextTable, size, time};
use crate::stats::{Measured, Runner, Summary, Variant};
use crate::sys::guest::{self, TinyVm};
use crate::sys::memory::GuestMemory;
use crate::sys::process::{Child, OneThread, fork, require_one_thread};

/// Pages that each clone writes, one after the other, all in one 2 MiB range.
pub(crate) const PAGES_WRITTEN: u32 = 10;
/// The first of them, in bytes: behind the tables and the code.
const FIRST_WRITTEN: u32 = 2 << 20;
/// Guest memory has the tables, the code and the written pages.
const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// What the root is filled with; anything but zero.
const FILL: u8 = 0xa5;
/// How memory is measured.
pub(crate) const MEMORY_MARK: &str = "memory: MemAvailable with all clones of a wave alive, below \
                                      the mean of before and after; kernel included";

/// Clones that say nothing for this long are given up.
const SILENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Floor {
    memory_bytes: u64,
    pages_written: u32,
    root_huge_page_bytes: u64,
    /// Start of a clone: one after the other, then the share of each in a wave.
    start: Vec<Measured>,
    /// Where the time goes when clones are started one after the other.
    stages: Stages,
    waves: Vec<Wave>,
}

/// Clones that were started together.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Wave {
    clones: u32,
    /// From before the first fork to the last clone's port write.
    pub(crate) wall_ns: u64,
    /// See [`memory_each_bytes`].
    pub(crate) memory_per_clone_bytes: f64,
}

/// Clones that came to be alive at once, step by step.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Grown {
    /// Memory available before the first.
    pub(crate) before_bytes: u64,
    /// One for each number of clones.
    pub(crate) steps: Vec<Step>,
    /// Memory available when all are gone.
    pub(crate) after_bytes: u64,
}

/// One number of clones alive at once.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Step {
    /// How many are alive.
    pub(crate) alive: u32,
    /// How many of them this step started.
    pub(crate) started: u32,
    /// From before the first of these to the last one's mark.
    pub(crate) wall_ns: u64,
    /// Memory available then.
    pub(crate) available_bytes: u64,
}

/// Times of one clone's stages, over all clones.
#[derive(Debug, Serialize)]
struct Stages {
    fork: Summary,
    vm: Summary,
    run: Summary,
}

/// What a clone reports: the monotonic clock, in nanoseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Marks {
    /// Its first instruction after the fork.
    forked: u64,
    /// The VM is ready to run.
    made: u64,
    /// The guest's port write has arrived.
    done: u64,
    /// Why the clone failed, if it did.
    error: Option<String>,
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &FloorArgs) -> Result<()> {
    ensure!(
        args.memory >= MIN_MEMORY_BYTES && args.memory.is_multiple_of(4096),
        "guest memory of {} bytes: give whole pages and at least {MIN_MEMORY_BYTES}",
        args.memory
    );
    let host = Host::probe()?;
    let root = Root::new(args.memory, !args.small_pages)?;
    let mut clones = Vec::new();
    let mut waves = Vec::new();
    let mut variants = [
        Variant::new("one after the other", || {
            let started = (0..args.count.get())
                .map(|_| root.start_one())
                .collect::<Result<Vec<_>>>()?;
            let totals = started.iter().map(Started::total).collect();
            clones.extend(started);
            Ok(totals)
        }),
        Variant::new(format!("{} together, each", args.parallel), || {
            let wave = root.start_wave(args.parallel.get())?;
            waves.push(wave);
            Ok(vec![Duration::from_nanos(wave.wall_ns) / wave.clones])
        }),
    ];
    let runner = Runner {
        rounds: args.rounds.get(),
        warm_up_rounds: 0,
    };
    let start = runner.run(&mut variants)?;
    drop(variants);
    let stage = |of: fn(&Started) -> u64| {
        let samples: Vec<_> = clones.iter().map(of).map(Duration::from_nanos).collect();
        Summary::of(&samples)
    };
    let floor = Floor {
        memory_bytes: args.memory,
        pages_written: PAGES_WRITTEN,
        root_huge_page_bytes: root.huge_page_bytes,
        start,
        stages: Stages {
            fork: stage(|clone| clone.marks.forked - clone.begun)?,
            vm: stage(|clone| clone.marks.made - clone.marks.forked)?,
            run: stage(|clone| clone.marks.done - clone.marks.made)?,
        },
        waves,
    };
    report(host, floor).print(args.json)
}

fn report(host: Host, floor: Floor) -> Report<Floor> {
    let mut start = TextTable::of_summaries("start of a clone");
    for measured in &floor.start {
        start.summary(&measured.name, &measured.summary);
    }
    let mut stages = TextTable::of_summaries("one after the other: where the time goes");
    stages.summary("fork", &floor.stages.fork);
    stages.summary("VM, slot, irqchip, vCPU", &floor.stages.vm);
    stages.summary("run to the port write", &floor.stages.run);
    let mut waves = TextTable::new("together", &["wave", "clones", "wall", "memory each"]);
    for (number, wave) in floor.waves.iter().enumerate() {
        waves.row(vec![
            (number + 1).to_string(),
            wave.clones.to_string(),
            time(wave.wall_ns),
            size(wave.memory_per_clone_bytes),
        ]);
    }
    let marks = vec![
        format!(
            "root: one process with {} of filled memory, {} of it in huge pages",
            size(floor.memory_bytes as f64),
            size(floor.root_huge_page_bytes as f64)
        ),
        "clock starts: in the root, before the fork (together: before the first fork)".to_owned(),
        format!(
            "clock stops: in the clone, when KVM hands over the guest's port write, after \
             {PAGES_WRITTEN} page writes (together: of the last clone)"
        ),
        "not on the clock: filling the root, ending a clone, reaping it".to_owned(),
        MEMORY_MARK.to_owned(),
    ];
    let mut report = Report::new("floor", host, floor);
    report.marks = marks;
    report.tables = vec![start, stages, waves];
    report
}

/// The root process: this one.
#[derive(Debug)]
pub(crate) struct Root {
    memory: GuestMemory,
    huge_page_bytes: u64,
    one_thread: OneThread,
}

/// A clone that has run and ended.
#[derive(Debug, Clone)]
pub(crate) struct Started {
    begun: u64,
    marks: Marks,
}

impl Started {
    /// From before the fork to the guest's port write.
    pub(crate) fn total(&self) -> Duration {
        Duration::from_nanos(self.marks.done - self.begun)
    }
}

impl Root {
    /// Fills `bytes` of memory; in huge pages, if the kernel has them to give.
    pub(crate) fn new(bytes: u64, huge_pages: bool) -> Result<Self> {
        let one_thread = require_one_thread()?;
        let mut memory = GuestMemory::new(bytes)?;
        memory.as_mut_slice().fill(FILL);
        guest::load(
            &mut memory,
            &guest::write_pages(FIRST_WRITTEN, PAGES_WRITTEN),
        );
        if huge_pages {
            // Small pages are a finding, not a failure: the report says how much was collapsed.
            if let Err(error) = memory.collapse() {
                eprintln!("the root stays in small pages: {error}");
            }
        }
        let huge_page_bytes = anonymous_huge_bytes()?;
        Ok(Self {
            memory,
            huge_page_bytes,
            one_thread,
        })
    }

    /// Starts one clone and waits until it is gone.
    pub(crate) fn start_one(&self) -> Result<Started> {
        let pipes = Pipes::new()?;
        let begun = now();
        let child = self.fork(&pipes)?;
        let marks = pipes.collect(1)?;
        pipes.release(1)?;
        child.wait()?;
        let marks = marks.into_iter().next().context("no clone reported")?;
        Ok(Started { begun, marks })
    }

    /// Starts `clones` clones, all alive at once, and waits until they are gone.
    pub(crate) fn start_wave(&self, clones: u32) -> Result<Wave> {
        let grown = self.grow(&[clones])?;
        let step = grown.steps.first().context("nothing was started")?;
        Ok(Wave {
            clones,
            wall_ns: step.wall_ns,
            memory_per_clone_bytes: memory_each_bytes(
                grown.before_bytes,
                step.available_bytes,
                grown.after_bytes,
                clones,
            ),
        })
    }

    /// Starts clones until as many are alive as each of `counts` says, in rising order, all those of
    /// a step at once; measures at each, and waits until all are gone.
    pub(crate) fn grow(&self, counts: &[u32]) -> Result<Grown> {
        let pipes = Pipes::new()?;
        let before_bytes = settled_memory_bytes()?;
        let mut children = Vec::new();
        let mut steps = Vec::new();
        let mut alive = 0;
        for &count in counts {
            let more = count.saturating_sub(alive);
            let begun = now();
            for _ in 0..more {
                children.push(self.fork(&pipes)?);
            }
            let marks = pipes.collect(more)?;
            let done = marks.iter().map(|marks| marks.done).max().unwrap_or(begun);
            alive += more;
            steps.push(Step {
                alive,
                started: more,
                wall_ns: done - begun,
                available_bytes: settled_memory_bytes()?,
            });
        }
        pipes.release(alive)?;
        for child in children {
            child.wait()?;
        }
        Ok(Grown {
            before_bytes,
            steps,
            after_bytes: settled_memory_bytes()?,
        })
    }

    fn fork(&self, pipes: &Pipes) -> Result<Child> {
        fork(&self.one_thread, || {
            let forked = now();
            let mut marks = Marks {
                forked,
                made: forked,
                done: forked,
                error: None,
            };
            // The VM lives until the root has looked at all clones.
            let vm = self.run_clone(&mut marks);
            marks.error = vm.as_ref().err().map(|error| format!("{error:#}"));
            pipes.report_and_wait(&marks)
        })
    }

    fn run_clone(&self, marks: &mut Marks) -> Result<TinyVm<'_>> {
        let mut vm = TinyVm::new(&self.memory)?;
        marks.made = now();
        vm.run_to_port_write()?;
        marks.done = now();
        Ok(vm)
    }
}

/// The two pipes between the root and the clones that are alive together.
#[derive(Debug)]
struct Pipes {
    /// Clones report here, one line each, too short to be mixed with others'.
    marks: (File, File),
    /// A clone ends when it has read one byte from here.
    release: (File, File),
}

impl Pipes {
    fn new() -> Result<Self> {
        let pipe = || -> Result<(File, File)> {
            let (reader, writer) = rustix::pipe::pipe().context("cannot make a pipe")?;
            Ok((reader.into(), writer.into()))
        };
        Ok(Self {
            marks: pipe()?,
            release: pipe()?,
        })
    }

    /// In a clone: reports, and waits for the root to release it.
    fn report_and_wait(&self, marks: &Marks) -> Result<()> {
        // A root that dies takes its clones with it.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        let mut line = serde_json::to_vec(marks)?;
        line.push(b'\n');
        (&self.marks.1).write_all(&line)?;
        (&self.release.0).read_exact(&mut [0])?;
        Ok(())
    }

    /// In the root: what `clones` clones report. One that failed is an error.
    fn collect(&self, clones: u32) -> Result<Vec<Marks>> {
        let reader = &self.marks.0;
        let mut collected = Vec::new();
        let mut lines = LineBuffer::default();
        while collected.len() < clones as usize {
            let mut ready = [PollFd::new(reader, PollFlags::IN)];
            ensure!(
                poll(&mut ready, Some(&SILENCE)).context("cannot poll a pipe")? > 0,
                "{} of {clones} clones reported, then none for {} s",
                collected.len(),
                SILENCE.tv_sec
            );
            for line in lines.read_from(reader)? {
                let marks: Marks = serde_json::from_slice(&line).context("a clone's report")?;
                if let Some(error) = marks.error {
                    bail!("a clone failed: {error}");
                }
                collected.push(marks);
            }
        }
        Ok(collected)
    }

    /// In the root: lets `clones` clones end.
    fn release(&self, clones: u32) -> Result<()> {
        let bytes = vec![0; clones as usize];
        (&self.release.1)
            .write_all(&bytes)
            .context("cannot release the clones")
    }
}

/// Splits what a pipe gives into lines.
#[derive(Debug, Default)]
struct LineBuffer(Vec<u8>);

impl LineBuffer {
    /// Reads once; returns the lines that are now complete.
    fn read_from(&mut self, mut reader: &File) -> Result<Vec<Vec<u8>>> {
        let mut chunk = [0; 4096];
        let length = reader.read(&mut chunk).context("cannot read a pipe")?;
        self.0.extend_from_slice(&chunk[..length]);
        let mut lines = Vec::new();
        while let Some(end) = self.0.iter().position(|&byte| byte == b'\n') {
            lines.push(self.0.drain(..=end).collect());
        }
        Ok(lines)
    }
}

/// The monotonic clock in nanoseconds; the same in all processes.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // The clock starts at zero when the machine does: neither field is ever negative.
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
