#![forbid(unsafe_code)]
//! Runs any shell scenario in the nested rig, for looking into things by hand.
//!
//! ```text
//! rig --kernel 6.1 --script FILE [--program HOST=GUEST]... [--file HOST=GUEST]... [--memory MIB] [--limit SECONDS]
//! rig --fetch            only downloads and unpacks the kernels
//! ```

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use pando_tests::rig::packages::Kernel;
use pando_tests::rig::{L1, Series, built_program};

/// Boots L1 (Debian's kernel with KVM, in QEMU) and runs a shell script in it.
///
/// In L1 are /rig/vmlinuz and /rig/initrd (the guest to boot: prints PANDO-READY on ttyS0, then takes
/// commands), /bin/say (runs a command in such a guest: `say SOCKET COMMAND`), /bin/pando when it is
/// built, and the functions of tests/rig/l1-lib.sh. /tmp and /dev/shm are memory.
#[derive(Debug, Parser)]
struct Args {
    /// Kernel of L1 and of the guest: 6.1 or 6.12
    #[arg(long, default_value = "6.12")]
    kernel: Series,
    /// Shell script to run in L1
    #[arg(long, required_unless_present = "fetch")]
    script: Option<PathBuf>,
    /// Program to add, with its shared libraries: path here = path in L1
    #[arg(long, value_name = "HOST=GUEST", value_parser = pair)]
    program: Vec<(PathBuf, String)>,
    /// File to add: path here = path in L1
    #[arg(long, value_name = "HOST=GUEST", value_parser = pair)]
    file: Vec<(PathBuf, String)>,
    /// Memory of L1 in MiB
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Seconds after which the run is ended
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Accelerator of the emulator, as its -accel takes it
    #[arg(long)]
    accelerator: Option<String>,
    /// Processor of the emulator, as its -cpu takes it
    #[arg(long)]
    cpu: Option<String>,
    /// Number of processors of L1
    #[arg(long)]
    cpus: Option<u32>,
    /// Only download and unpack the kernels
    #[arg(long)]
    fetch: bool,
}

fn pair(text: &str) -> Result<(PathBuf, String), String> {
    text.split_once('=')
        .map(|(host, guest)| (PathBuf::from(host), guest.to_owned()))
        .ok_or_else(|| format!("'{text}' has no '=': write HOST=GUEST"))
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.fetch {
        for series in Series::ALL {
            println!("Linux {series}: {}", Kernel::find(series)?.image.display());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let script = args.script.context("no script")?;
    let scenario = std::fs::read_to_string(&script)
        .with_context(|| format!("cannot read {}", script.display()))?;
    let name = format!("by-hand-{}", args.kernel);
    let mut l1 = L1::new(&name, args.kernel)
        .memory_mib(args.memory)
        .limit(Duration::from_secs(args.limit))
        .echo();
    if let Some(accelerator) = &args.accelerator {
        l1 = l1.accelerator(accelerator);
    }
    if let Some(cpu) = &args.cpu {
        l1 = l1.cpu(cpu);
    }
    if let Some(cpus) = args.cpus {
        l1 = l1.cpus(cpus);
    }
    for tool in ["pando", "say"] {
        if let Ok(path) = built_program(tool) {
            l1 = l1.program(&path, &format!("/bin/{tool}"));
        }
    }
    for (from, to) in &args.program {
        l1 = l1.program(from, to);
    }
    for (from, to) in &args.file {
        l1 = l1.file(from, to);
    }
    let report = l1.run(&scenario)?;
    println!("{report}");
    Ok(if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
