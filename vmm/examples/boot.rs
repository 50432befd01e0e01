#![forbid(unsafe_code)]
//! Boots a kernel with its serial console on standard input and output.
//!
//! ```text
//! cargo run -p pando-vmm --example boot -- --kernel vmlinuz --initrd initrd.img \
//!     --append "console=ttyS0" --memory 256 --cpus 2
//! ```
//!
//! A guest that asks for a reset is booted again; `--save-restore SECONDS` pauses it once after
//! that time, saves it, builds a new machine from the saved state on the same RAM, and goes on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use pando_vmm::arch::x86_64::boot::{BootSource, KernelImage};
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::{
    HostCheck, Machine, MachineError, MachineState, Outcome, Paused, Running,
};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::spec::{BackendSpec, CpuCount, MachineSpec};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Boot a kernel on the serial console.
#[derive(Debug, Parser)]
struct Args {
    /// A bzImage or an ELF kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// An initial RAM disk.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "console=ttyS0")]
    append: String,
    /// RAM in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Where COM1 goes: null, stdio, file:PATH, pty, unix:PATH.
    #[arg(long, default_value = "stdio")]
    serial: String,
    /// After so many seconds save the machine and go on in a new one.
    #[arg(long, value_name = "SECONDS")]
    save_restore: Option<f64>,
    /// Pretend that the saved machine was frozen for so long.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 0,
        requires = "save_restore"
    )]
    frozen_for: u64,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    loop {
        let outcome = boot_once(&args)?;
        eprintln!("boot: {outcome}");
        match outcome {
            Outcome::Reset => {}
            Outcome::PowerOff | Outcome::Stopped => return Ok(ExitCode::SUCCESS),
            Outcome::Failed(_) => return Ok(ExitCode::FAILURE),
        }
    }
}

fn boot_once(args: &Args) -> anyhow::Result<Outcome> {
    let bytes = args
        .memory
        .checked_mul(1 << 20)
        .context("too much memory")?;
    let backend = BackendSpec::new("ram", bytes)?;
    let spec = MachineSpec::new(CpuCount::new(args.cpus)?, vec![backend])?;
    let ram = GuestRam::new(spec.layout(), vec![RamBacking::anonymous(bytes)?])?;
    let source = BootSource {
        kernel: KernelImage::File(args.kernel.clone()),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
    };
    let machine = Machine::boot(&spec, ram, &source, target(args)?)?;
    report("booted", &machine);
    let machine = run(machine)?;
    let Some(seconds) = args.save_restore else {
        return Ok(machine.wait());
    };
    thread::sleep(Duration::from_secs_f64(seconds));
    match machine.pause() {
        Ok(machine) => Ok(run(rebuild(args, &spec, machine)?)?.wait()),
        Err(MachineError::Ended(outcome)) => Ok(outcome),
        Err(error) => Err(error.into()),
    }
}

/// A new machine that goes on where `machine` is paused, its state encoded and decoded on the way.
fn rebuild(
    args: &Args,
    spec: &MachineSpec,
    machine: Machine<Paused>,
) -> anyhow::Result<Machine<Paused>> {
    let begun = Instant::now();
    let state = postcard::to_stdvec(&machine.save()?)?;
    let ram = machine.into_ram()?;
    eprintln!(
        "boot: saved {} bytes of state in {:?}",
        state.len(),
        begun.elapsed()
    );
    let mut state: MachineState = postcard::from_bytes(&state)?;
    if let Some(realtime_ns) = &mut state.vm.realtime_ns {
        *realtime_ns = realtime_ns.saturating_sub(args.frozen_for.saturating_mul(1_000_000_000));
    }
    let machine = Machine::restore(spec, ram, &state, target(args)?, HostCheck::Due)?;
    report("restored", &machine);
    Ok(machine)
}

/// Resumes a machine that SIGINT and SIGTERM stop.
fn run(machine: Machine<Paused>) -> anyhow::Result<Machine<Running>> {
    let handle = machine.handle();
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            handle.stop("a signal");
        }
    });
    Ok(machine.resume()?)
}

fn target(args: &Args) -> anyhow::Result<SerialTarget> {
    Ok(args.serial.parse()?)
}

fn report(what: &str, machine: &Machine<Paused>) {
    let stages: Vec<String> = machine
        .stages()
        .iter()
        .map(|(name, took)| format!("{name} {took:.1?}"))
        .collect();
    eprintln!(
        "boot: {what} in {:.1?}: {}",
        machine.stages().total(),
        stages.join(", ")
    );
}
