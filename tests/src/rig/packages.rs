#![forbid(unsafe_code)]
//! What a run takes from the distribution: Debian's kernels (unpacked, never installed), busybox and
//! QEMU.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};

/// The oldest QEMU that runs both kernels: 7.2 emulates SVM in a way that makes Linux 6.12 oops.
const OLDEST_QEMU: u32 = 10;
/// The modules that give L1 its KVM and its taps, in the order in which they are loaded. A kernel that has one
/// built in, or can do without, simply does not have the file.
const MODULES: [(&str, &str); 5] = [
    ("irqbypass", "virt/lib"),
    ("ccp", "drivers/crypto/ccp"),
    ("kvm", "arch/x86/kvm"),
    ("kvm-amd", "arch/x86/kvm"),
    ("tun", "drivers/net"),
];

/// The modules of the guest's drivers, in the order in which they are loaded: those of 6.1, of which 6.12
/// has most built in.
const GUEST_MODULES: [(&str, &str); 16] = [
    ("virtio_ring", "drivers/virtio"),
    ("virtio", "drivers/virtio"),
    ("virtio_pci_legacy_dev", "drivers/virtio"),
    ("virtio_pci_modern_dev", "drivers/virtio"),
    ("virtio_pci", "drivers/virtio"),
    ("virtio_blk", "drivers/block"),
    ("virtio-rng", "drivers/char/hw_random"),
    ("virtio_console", "drivers/char"),
    ("virtio_mem", "drivers/virtio"),
    ("vsock", "net/vmw_vsock"),
    ("vmw_vsock_virtio_transport_common", "net/vmw_vsock"),
    ("vmw_vsock_virtio_transport", "net/vmw_vsock"),
    ("failover", "net/core"),
    ("net_failover", "drivers/net"),
    ("virtio_net", "drivers/net"),
    ("virtio_balloon", "drivers/virtio"),
];

/// A series of Debian's cloud kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series {
    /// bookworm's: userfaultfd without POISON and MOVE.
    Linux6_1,
    /// bookworm-backports': POISON, MOVE, `WP_ASYNC`.
    Linux6_12,
}

impl Series {
    /// All that the rig knows.
    pub const ALL: [Series; 2] = [Series::Linux6_1, Series::Linux6_12];

    /// `6.1`: as in the version of the package.
    pub fn name(self) -> &'static str {
        match self {
            Series::Linux6_1 => "6.1",
            Series::Linux6_12 => "6.12",
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Series {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|series| series.name() == text)
            .with_context(|| format!("no such kernel '{text}': the rig has 6.1 and 6.12"))
    }
}

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// Modules to load, in order: name and content.
    pub modules: Vec<(String, Vec<u8>)>,
    /// Modules of the guest's drivers, in the order in which to load them.
    pub guest_modules: Vec<(String, Vec<u8>)>,
}

impl Kernel {
    /// The newest kernel of `series`, from the cache folder, or else from the package.
    ///
    /// # Errors
    /// When it is not in the cache and apt cannot deliver it; the message says what to run.
    pub fn find(series: Series) -> Result<Self> {
        let folder = cache_folder()?.join(series.name());
        if !folder.join("boot").is_dir() {
            fetch(series, &folder).with_context(|| {
                format!("no Linux {series} for the rig: run tests/setup as root, then try again")
            })?;
        }
        let image = only_entry(&folder.join("boot"), "vmlinuz-")?;
        let tree = only_entry(&folder.join("lib/modules"), "")?.join("kernel");
        let modules = those_there(&tree, &MODULES)?;
        if !modules.iter().any(|(name, _)| name == "kvm-amd") {
            bail!("{} has no kvm-amd module", tree.display());
        }
        Ok(Self {
            image,
            modules,
            guest_modules: those_there(&tree, &GUEST_MODULES)?,
        })
    }
}

fn those_there(tree: &Path, wanted: &[(&str, &str)]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for (name, place) in wanted {
        if let Some(content) = module(&tree.join(place), name)? {
            found.push(((*name).to_owned(), content));
        }
    }
    Ok(found)
}

/// A static busybox.
///
/// # Errors
/// When it is not installed, or is not static.
pub fn busybox() -> Result<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .context("no busybox: install the package busybox-static (tests/setup does)")
}

/// A program of the system, such as `mke2fs`.
///
/// # Errors
/// When it is not installed.
pub fn system_program(name: &str) -> Result<PathBuf> {
    ["/sbin", "/usr/sbin", "/bin", "/usr/bin"]
        .into_iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no {name}: install the packages e2fsprogs, perl-base and qemu-utils (tests/setup does)")
        })
}

/// The emulator, checked to be new enough.
///
/// # Errors
/// When it is not installed, or is older than both kernels need.
pub fn qemu() -> Result<&'static str> {
    const PROGRAM: &str = "qemu-system-x86_64";
    let advice = format!(
        "QEMU {OLDEST_QEMU} or newer is needed (package qemu-system-x86, on bookworm from \
         bookworm-backports; tests/setup installs it)"
    );
    let version = output(Command::new(PROGRAM).arg("--version")).context(advice.clone())?;
    let major = version
        .split("version ")
        .nth(1)
        .and_then(|rest| rest.split('.').next())
        .and_then(|major| major.parse::<u32>().ok())
        .with_context(|| format!("cannot read a version in '{}'", version.trim()))?;
    if major < OLDEST_QEMU {
        bail!("{PROGRAM} is version {major}: {advice}");
    }
    Ok(PROGRAM)
}

/// Runs a program and gives what it printed.
///
/// # Errors
/// When it cannot be started or fails; the message has what it said.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let result = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !result.status.success() {
        let said = String::from_utf8_lossy(&result.stderr);
        bail!("{name} failed ({}): {}", result.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

fn cache_folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("pando-rig"))
}

/// Downloads and unpacks; the folder appears whole or not at all.
fn fetch(series: Series, folder: &Path) -> Result<()> {
    let parent = folder.parent().context("the cache folder has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let package = package_of(series)?;
    let scratch = tempfile::tempdir_in(parent)
        .with_context(|| format!("cannot make a folder in {}", parent.display()))?;
    output(
        Command::new("apt-get")
            .args(["download", "-q", &package])
            .current_dir(scratch.path()),
    )?;
    let deb = only_entry(scratch.path(), "linux-image-")?;
    let unpacked = scratch.path().join("unpacked");
    output(Command::new("dpkg").arg("-x").args([&deb, &unpacked]))?;
    match fs::rename(&unpacked, folder) {
        // Another run was faster.
        Err(_) if folder.join("boot").is_dir() => Ok(()),
        other => other.with_context(|| format!("cannot move the kernel to {}", folder.display())),
    }
}

/// The package that the meta package of the newest version of `series` depends on.
fn package_of(series: Series) -> Result<String> {
    const META: &str = "linux-image-cloud-amd64";
    let prefix = format!("{series}.");
    let versions = output(Command::new("apt-cache").args(["madison", META]))?;
    let version = versions
        .lines()
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .find(|version| version.starts_with(&prefix))
        .with_context(|| format!("apt knows no {META} of version {series}"))?;
    let meta = format!("{META}={version}");
    let depends = output(Command::new("apt-cache").args(["depends", &meta]))?;
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .with_context(|| format!("{meta} depends on no kernel"))
}

fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("{} has no entry '{prefix}*'", folder.display());
}

/// A module's content, decompressed; nothing when the kernel has no such module.
fn module(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let plain = folder.join(format!("{name}.ko"));
    if plain.is_file() {
        return fs::read(&plain)
            .map(Some)
            .with_context(|| format!("cannot read {}", plain.display()));
    }
    let packed = folder.join(format!("{name}.ko.xz"));
    if !packed.is_file() {
        return Ok(None);
    }
    let result = Command::new("xz")
        .arg("-dc")
        .arg(&packed)
        .output()
        .context("cannot run xz: install the package xz-utils")?;
    if !result.status.success() {
        bail!("xz cannot unpack {}", packed.display());
    }
    Ok(Some(result.stdout))
}
