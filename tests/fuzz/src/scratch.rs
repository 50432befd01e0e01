#![forbid(unsafe_code)]
//! Where inputs may name files: a directory of this process, in which it stands. Names lose whatever
//! would lead out of it.

use std::path::Path;
use std::sync::OnceLock;
use std::{env, fs};

use anyhow::{Context, Result};
use tempfile::TempDir;

static PLACE: OnceLock<TempDir> = OnceLock::new();

/// Stands in the directory, which is made when it is asked for first.
///
/// # Panics
/// Where there is no room for temporary files: no target can run then.
pub fn enter() -> &'static Path {
    PLACE
        .get_or_init(|| {
            let place = tempfile::tempdir().expect("a temporary directory can be made");
            env::set_current_dir(place.path()).expect("it can be entered");
            place
        })
        .path()
}

/// The same name without a way out of the directory.
pub fn tame(name: &str) -> String {
    name.replace(['/', '\0'], "_")
}

/// Takes out what an input left.
pub fn clean() {
    let left = fs::read_dir(enter()).into_iter().flatten().flatten();
    for entry in left {
        let _ = fs::remove_file(entry.path());
    }
}

/// Leaves the directory for good, and takes it away.
///
/// # Errors
/// When it cannot be taken away.
pub fn remove() -> Result<()> {
    let Some(place) = PLACE.get() else {
        return Ok(());
    };
    env::set_current_dir("/")?;
    fs::remove_dir_all(place.path()).context("cannot remove the temporary directory")
}
