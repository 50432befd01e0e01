#![forbid(unsafe_code)]
//! Where inputs may name files: a directory of this process, in which it stands. Names lose whatever
//! would lead out of it.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

use anyhow::Result;
use tempfile::TempDir;

static PLACE: Mutex<Option<TempDir>> = Mutex::new(None);

/// Stands in the directory, which is made when it is asked for first.
///
/// # Panics
/// Where there is no room for temporary files: no target can run then.
pub fn enter() {
    let mut place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
    if place.is_none() {
        let new = tempfile::tempdir().expect("a temporary directory can be made");
        env::set_current_dir(new.path()).expect("it can be entered");
        *place = Some(new);
    }
}

/// The same name without a way out of the directory.
pub fn tame(name: &str) -> String {
    name.replace(['/', '\0'], "_")
}

/// Takes out what an input left.
pub fn clean() {
    let place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = place.as_ref().map(TempDir::path);
    for entry in path
        .map(Path::read_dir)
        .into_iter()
        .flatten()
        .flatten()
        .flatten()
    {
        let _ = fs::remove_file(entry.path());
    }
}

/// Leaves the directory, and takes it away.
///
/// # Errors
/// When it cannot be taken away.
pub fn remove() -> Result<()> {
    let mut place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(old) = place.take() {
        env::set_current_dir("/")?;
        old.close()?;
    }
    Ok(())
}
