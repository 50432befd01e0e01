#![forbid(unsafe_code)]
//! What this host can do for Pando, found out by trying, with a remedy for each lack.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::{memory, paging};
use crate::arch::x86_64::boot::BootSource;
use crate::config;
use crate::console::GuestConsole;
use crate::device::legacy::console::SerialTarget;
use crate::machine::Machine;
use crate::memory::guest::{GuestRam, RamBacking};
use crate::payload::protocol::{Command, READY_LINE};
use crate::spec::{BackendSpec, CpuCount, MIN_RAM_BYTES, MachineSpec};

/// Turns of the loop by which native and emulating KVM are told apart.
const SPIN_TURNS: u64 = 100_000;
/// A loop in the guest that takes this many times longer than one in this process is emulated. A
/// bound on the speed itself would misjudge a slow host, such as one that is emulated as a whole.
const EMULATION_FACTOR: f64 = 50.0;
/// How long the examined guest may take for anything.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// Works, but slower or for fewer clones.
    Warn,
    /// `pando demo` cannot run.
    Fail,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing that was examined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was examined.
    pub what: &'static str,
    /// How grave what was found is.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            grade: Grade::Ok,
            found: found.into(),
            fix: None,
        }
    }

    /// Something is amiss; `fix` says what to do.
    pub fn bad(grade: Grade, what: &'static str, found: impl Into<String>, fix: &str) -> Self {
        Self {
            what,
            grade,
            found: found.into(),
            fix: Some(fix.to_owned()),
        }
    }
}

/// Examines the host.
pub fn examine() -> Vec<Finding> {
    let mut findings = vec![kvm_device()];
    if findings[0].grade != Grade::Fail {
        findings.push(kvm_speed());
    }
    findings.extend(paging::examine());
    findings.extend([locked_memory(), open_files(), huge_pages(), cgroup()]);
    findings.extend(memory::examine());
    findings
}

fn kvm_device() -> Finding {
    const WHAT: &str = "kvm";
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding::ok(WHAT, "/dev/kvm opens"),
        Err(error) => {
            let fix = match error.kind() {
                ErrorKind::NotFound => {
                    "modprobe kvm-intel or kvm-amd; in a VM, have its host allow nested virtualization"
                }
                ErrorKind::PermissionDenied => "sudo usermod -aG kvm $USER, and log in again",
                _ => "see `dmesg | grep -i kvm`",
            };
            Finding::bad(
                Grade::Fail,
                WHAT,
                format!("/dev/kvm does not open: {error}"),
                fix,
            )
        }
    }
}

fn kvm_speed() -> Finding {
    const WHAT: &str = "kvm speed";
    match turns_per_second() {
        Ok(speed) if speed * EMULATION_FACTOR >= turns_per_second_here() => Finding::ok(
            WHAT,
            format!("native: {:.0} million loop turns a second", speed / 1e6),
        ),
        Ok(speed) => Finding::bad(
            Grade::Warn,
            WHAT,
            format!("emulating: {:.1} million loop turns a second", speed / 1e6),
            "use a machine with hardware virtualization; the built-in guest runs here, a Linux guest \
             would take hours to boot",
        ),
        Err(error) => Finding::bad(
            Grade::Fail,
            WHAT,
            format!("the built-in guest does not run: {error:#}"),
            "see the message; `pando run --kernel embedded -vv` shows more",
        ),
    }
}

/// Runs a loop in the built-in guest.
fn turns_per_second() -> anyhow::Result<f64> {
    let backend = BackendSpec::new(config::BACKEND_ID, MIN_RAM_BYTES)?;
    let spec = MachineSpec::new(CpuCount::ONE, vec![backend])?;
    let ram = GuestRam::new(spec.layout(), vec![RamBacking::anonymous(MIN_RAM_BYTES)?])?;
    let boot = BootSource {
        kernel: config::embedded_kernel(),
        initrd: None,
        append: String::new(),
    };
    let (mut console, serial) = GuestConsole::pair()?;
    let machine = Machine::boot(&spec, ram, &boot, SerialTarget::Fd(serial))?.resume()?;
    console.wait_for(READY_LINE, GUEST_TIMEOUT, &mut |_| ())?;
    console.send(&Command::Spin { turns: SPIN_TURNS }.encode())?;
    let start = Instant::now();
    console.line(GUEST_TIMEOUT)?;
    let took = start.elapsed();
    machine.handle().stop("the examination is over");
    machine.wait();
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    Ok(SPIN_TURNS as f64 / took.as_secs_f64())
}

/// Runs a loop of as many turns in this process.
#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn turns_per_second_here() -> f64 {
    let start = Instant::now();
    for turn in 0..SPIN_TURNS {
        std::hint::black_box(turn);
    }
    SPIN_TURNS as f64 / start.elapsed().as_secs_f64().max(1e-9)
}

fn locked_memory() -> Finding {
    const WHAT: &str = "locked memory";
    // Since Linux 5.12 io_uring accounts registered buffers only, a quarter MiB a pager.
    match getrlimit(Resource::Memlock).current {
        Some(bytes) if bytes < 1 << 20 => Finding::bad(
            Grade::Warn,
            WHAT,
            format!("limit is {} KiB", bytes >> 10),
            "ulimit -l 8192, or LimitMEMLOCK=8M in the service: registered buffers need it",
        ),
        Some(bytes) => Finding::ok(WHAT, format!("limit is {} KiB", bytes >> 10)),
        None => Finding::ok(WHAT, "no limit"),
    }
}

fn open_files() -> Finding {
    const WHAT: &str = "open files";
    match getrlimit(Resource::Nofile).maximum {
        Some(files) if files < 8192 => Finding::bad(
            Grade::Warn,
            WHAT,
            format!("at most {files}, for about {} clones", files / 4),
            "raise the hard limit: LimitNOFILE=1048576 in the service, or /etc/security/limits.conf",
        ),
        Some(files) => Finding::ok(WHAT, format!("at most {files}")),
        None => Finding::ok(WHAT, "no limit"),
    }
}

fn huge_pages() -> Finding {
    const WHAT: &str = "huge pages";
    let Ok(modes) = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Finding::bad(
            Grade::Warn,
            WHAT,
            "this kernel has no transparent huge pages",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE; pages shared between clones want them",
        );
    };
    let mode = modes
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("unknown")
        .to_owned();
    if mode == "never" {
        return Finding::bad(
            Grade::Warn,
            WHAT,
            "transparent huge pages are off",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        );
    }
    Finding::ok(WHAT, format!("transparent, mode {mode}"))
}

fn cgroup() -> Finding {
    const WHAT: &str = "cgroup";
    let Ok(membership) = fs::read_to_string("/proc/self/cgroup") else {
        return Finding::ok(WHAT, "this kernel has none: no limit");
    };
    let Some(path) = membership.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Finding::bad(
            Grade::Warn,
            WHAT,
            "version 1 only",
            "boot with systemd.unified_cgroup_hierarchy=1: limits for each clone need version 2",
        );
    };
    let dir = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let limit = |file: &str| {
        fs::read_to_string(dir.join(file))
            .map_or_else(|_| "none".into(), |text| text.trim().to_owned())
    };
    let (memory, processes) = (limit("memory.max"), limit("pids.max"));
    Finding::ok(
        WHAT,
        format!("{path}: memory.max {memory}, pids.max {processes}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_comes_with_its_fix() {
        let findings = examine();
        assert!(findings.len() >= 8, "{findings:?}");
        for finding in &findings {
            assert_eq!(
                finding.fix.is_some(),
                finding.grade != Grade::Ok,
                "{finding:?}"
            );
        }
    }
}
