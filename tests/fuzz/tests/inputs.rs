#![forbid(unsafe_code)]
//! Seeds of all targets, what was found once, and little changes of both, without libFuzzer.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use pando_fuzz::{TARGETS, Target, scratch, target};

/// The scratch directory is one for all of a process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The target, on inputs that it came back from, and on each of them cut and with bytes changed.
fn run(target: &Target, input: &[u8]) {
    (target.run)(input);
    (target.run)(&input[..input.len() / 2]);
    for part in 0..8 {
        let mut changed = input.to_vec();
        if let Some(byte) = changed.get_mut(input.len() * part / 8) {
            *byte ^= 1 << part;
        }
        (target.run)(&changed);
    }
}

#[test]
fn every_target_takes_its_seeds() -> Result<()> {
    let _alone = alone();
    for target in TARGETS {
        let seeds = (target.seeds)();
        ensure!(seeds.len() > 3, "{} has hardly any seeds", target.name);
        ensure!(!(target.words)().is_empty(), "{} has no words", target.name);
        for seed in seeds {
            let most = usize::try_from(target.max_bytes)?;
            ensure!(
                !seed.is_empty() && seed.len() <= most,
                "a seed of {}",
                target.name
            );
            run(target, &seed);
        }
    }
    scratch::remove()
}

/// `found/TARGET/NAME`: each made a target fail once.
#[test]
fn what_was_found_once_is_taken() -> Result<()> {
    let _alone = alone();
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("found");
    let mut count = 0;
    for directory in fs::read_dir(&found)? {
        let directory = directory?.path();
        let name = directory.file_name().context("a folder has a name")?;
        let name = name.to_string_lossy();
        let target = target(&name).with_context(|| format!("no target is called {name}"))?;
        for input in fs::read_dir(&directory)? {
            run(target, &fs::read(input?.path())?);
            count += 1;
        }
    }
    ensure!(count > 0, "{} has no inputs", found.display());
    scratch::remove()
}
