#![forbid(unsafe_code)]
//! The machine that a benchmark ran on: figures mean nothing without it.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::report::size;
use crate::sys::guest::{self, TinyVm};
use crate::sys::memory::GuestMemory;

/// Turns of the loop that tells hardware from emulation.
const LOOP_TURNS: u32 = 20_000;
/// How often both are run.
const LOOP_TRIES: u32 = 5;
/// A turn of a one-instruction loop takes about as long in a guest as out of it; where KVM emulates
/// it, several hundred times as long.
const EMULATION_FROM: f64 = 20.0;

/// Available memory that rises by less than this in [`SETTLE_STEP`] has settled.
const SETTLED_BYTES: u64 = 1 << 20;
const SETTLE_STEP: Duration = Duration::from_millis(200);
/// After so many steps it is taken as it is: something else frees memory all the time.
const SETTLE_STEPS: u32 = 25;

/// Facts about the machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Host {
    /// Model name of the processor.
    pub(crate) cpu: String,
    /// Processors that this process may use.
    pub(crate) cpus: usize,
    /// Kernel release.
    pub(crate) kernel: String,
    /// All memory.
    pub(crate) memory_bytes: u64,
    /// Memory available when the benchmark began.
    pub(crate) memory_available_bytes: u64,
    /// Load average of one minute when the benchmark began.
    pub(crate) load: f64,
    /// Whether the machine is itself virtual.
    pub(crate) virtual_machine: bool,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub(crate) huge_pages: String,
    /// How KVM runs a guest.
    pub(crate) kvm: Kvm,
}

/// How KVM runs a guest.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Kvm {
    /// Whether KVM emulates ordinary guest instructions.
    pub(crate) emulating: bool,
    /// What one instruction of a short loop takes in a guest.
    pub(crate) ns_per_instruction: f64,
    /// What it takes here.
    pub(crate) ns_per_instruction_here: f64,
}

impl Host {
    /// Looks at the machine; runs a guest for some milliseconds.
    pub(crate) fn probe() -> Result<Self> {
        let cpuinfo = read("/proc/cpuinfo")?;
        let cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or("unknown", |(_, name)| name.trim());
        let virtual_machine = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"));
        let load = read("/proc/loadavg")?;
        Ok(Self {
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            memory_bytes: memory_bytes("MemTotal")?,
            memory_available_bytes: memory_bytes("MemAvailable")?,
            load: load
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
                .with_context(|| format!("/proc/loadavg says {load:?}"))?,
            virtual_machine,
            huge_pages: fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                .map_or_else(|_| "none".to_owned(), |text| selected(&text)),
            kvm: Kvm::probe()?,
        })
    }
}

impl Kvm {
    fn probe() -> Result<Self> {
        let mut memory = GuestMemory::new(guest::MIN_MEMORY_BYTES)?;
        guest::load(&mut memory, &guest::count_down(LOOP_TURNS));
        let mut vm = TinyVm::new(&memory)?;
        // The first run faults the guest's memory in; the others have the loop and one exit.
        vm.run_to_port_write()?;
        let (mut ns_per_instruction, mut ns_per_instruction_here) = (f64::MAX, f64::MAX);
        // The quickest of some: on a busy host either loop may be interrupted for long.
        for _ in 0..LOOP_TRIES {
            let begun = Instant::now();
            vm.run_to_port_write()?;
            ns_per_instruction = ns_per_turn(begun).min(ns_per_instruction);
            let begun = Instant::now();
            guest::count_down_here(LOOP_TURNS);
            ns_per_instruction_here = ns_per_turn(begun).min(ns_per_instruction_here);
        }
        Ok(Self {
            emulating: ns_per_instruction >= EMULATION_FROM * ns_per_instruction_here,
            ns_per_instruction,
            ns_per_instruction_here,
        })
    }
}

fn ns_per_turn(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(LOOP_TURNS)
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {} CPUs{}, Linux {}",
            self.cpu,
            self.cpus,
            if self.virtual_machine {
                " (virtual)"
            } else {
                ""
            },
            self.kernel
        )?;
        writeln!(
            f,
            "{} memory, {} available, load {:.2}, huge pages {}",
            size(self.memory_bytes as f64),
            size(self.memory_available_bytes as f64),
            self.load,
            self.huge_pages
        )?;
        write!(
            f,
            "KVM {}: {:.1} ns an instruction of a short loop, {:.1} ns here",
            if self.kvm.emulating {
                "emulates guest code"
            } else {
                "runs guest code in hardware"
            },
            self.kvm.ns_per_instruction,
            self.kvm.ns_per_instruction_here
        )
    }
}

/// A line of `/proc/meminfo`, in bytes.
pub(crate) fn memory_bytes(name: &str) -> Result<u64> {
    kib_line("/proc/meminfo", name)
}

/// `MemAvailable` once it has stopped rising: the kernel frees what ended processes and VMs held a
/// while after they are gone.
pub(crate) fn settled_memory_bytes() -> Result<u64> {
    let mut last = memory_bytes("MemAvailable")?;
    for _ in 0..SETTLE_STEPS {
        std::thread::sleep(SETTLE_STEP);
        let now = memory_bytes("MemAvailable")?;
        if now < last + SETTLED_BYTES {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

/// What each of `clones` clones takes: available memory while they are alive, below the mean of
/// before and after, so that what others take or free meanwhile weighs less.
pub(crate) fn memory_each_bytes(before: u64, alive: u64, after: u64, clones: u32) -> f64 {
    ((before as f64 + after as f64) / 2.0 - alive as f64) / f64::from(clones)
}

/// How much of this process is anonymous memory in huge pages.
pub(crate) fn anonymous_huge_bytes() -> Result<u64> {
    kib_line("/proc/self/smaps_rollup", "AnonHugePages")
}

fn kib_line(path: &str, name: &str) -> Result<u64> {
    read(path)?
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .with_context(|| format!("{path} has no {name}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// The word in brackets: `always [madvise] never` has `madvise`.
fn selected(text: &str) -> String {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or_else(|| text.trim().to_owned(), |(word, _)| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_described() {
        let host = Host::probe().unwrap();
        assert!(host.cpus > 0 && host.memory_bytes > host.memory_available_bytes);
        assert!(host.kvm.ns_per_instruction > 0.0 && host.kvm.ns_per_instruction_here > 0.0);
        let text = host.to_string();
        assert!(
            text.contains(&host.kernel) && text.contains("KVM"),
            "{text}"
        );
    }

    #[test]
    fn the_selected_word_is_found() {
        assert_eq!(selected("always [madvise] never\n"), "madvise");
        assert_eq!(selected("odd\n"), "odd");
    }
}
