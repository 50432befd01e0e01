//! The nested rig: real Linux guests under Pando on a machine that cannot run them itself.
//!
//! QEMU emulates a machine with AMD SVM in software (TCG). A Debian kernel boots in it (**L1**), loads
//! kvm-amd, and a shell scenario runs there with a full KVM: it starts `pando`, whose guests (**L2**)
//! boot the same Debian kernel. Correctness is real there, timings are not.
//!
//! A scenario reports through the serial console, one line per check: `CHECK <name> ok` or
//! `CHECK <name> FAIL <detail>`; `RIG done` is the last line of a run that got to its end. The whole
//! console is kept in `target/rig/<name>.log`.
//!
//! Nothing is installed and nothing is reachable from L1: kernels are taken out of their packages into
//! a cache folder, L1 has a loopback device and no other network, and every run has a time limit.

pub mod console;
pub mod initramfs;
pub mod l1;
pub mod packages;

pub use console::{Check, Report};
pub use l1::L1;
pub use packages::Series;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where the console logs and the images of runs are kept: `target/rig` of this build.
///
/// # Errors
/// When the folder cannot be made.
pub fn work_folder() -> Result<PathBuf> {
    let folder = build_folder()?.join("../rig");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    folder
        .canonicalize()
        .with_context(|| format!("cannot resolve {}", folder.display()))
}

/// A program that this workspace builds (`pando`, `say`, ..), from the folder that the running
/// program was built into.
///
/// # Errors
/// When it has not been built; the message names the command that builds it.
pub fn built_program(name: &str) -> Result<PathBuf> {
    let path = build_folder()?.join(name);
    if !path.is_file() {
        bail!(
            "{} is not built: run `cargo build --workspace --bins`",
            path.display()
        );
    }
    if let Some(source) = newer_source(&path)? {
        bail!(
            "{} is older than {}: run `cargo build --workspace --bins`, which `cargo nextest run -p` \
             does not do by itself",
            path.display(),
            source.display()
        );
    }
    Ok(path)
}

/// A file that a program is made of, by the list that cargo leaves beside it, and that was changed
/// since: such a program would be tested in place of the one that was meant.
fn newer_source(program: &Path) -> Result<Option<PathBuf>> {
    let Ok(list) = fs::read_to_string(program.with_extension("d")) else {
        // Another build system's.
        return Ok(None);
    };
    let changed = |path: &Path| fs::metadata(path).and_then(|facts| facts.modified());
    let built =
        changed(program).with_context(|| format!("cannot look at {}", program.display()))?;
    let sources = list.lines().next().and_then(|line| line.split_once(": "));
    let sources = sources.map_or("", |(_, sources)| sources).split(' ');
    // A name with a space is in pieces, none of which is a file.
    Ok(sources
        .map(PathBuf::from)
        .find(|source| changed(source).is_ok_and(|time| time > built)))
}

/// The folder of the profile that runs: `target/debug`, or `target/release`.
fn build_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut folder = program.parent().context("this program has no folder")?;
    if folder.ends_with("deps") {
        folder = folder
            .parent()
            .context("this program's folder has no parent")?;
    }
    Ok(folder.to_path_buf())
}
