#![forbid(unsafe_code)]
//! Files out of the page cache.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Advice, fadvise};

use crate::sys::page_cache::cached_pages;

/// One page of so many may stay in the page cache of a file that counts as cold.
const COLD_ONE_OF: u64 = 100;
/// How often it is tried.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// Has the kernel drop `path` from the page cache; an error where it keeps it, as a file system in
/// memory does.
pub(crate) fn drop_file(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let pages = file.metadata()?.len() / 4096;
    let mut cached = None;
    for _ in 0..TRIES {
        fadvise(&file, 0, None, Advice::DontNeed)
            .with_context(|| format!("cannot drop {} from the page cache", path.display()))?;
        cached = cached_pages(&file).context("cannot look into the page cache")?;
        if cached.is_none_or(|cached| cached <= pages / COLD_ONE_OF) {
            return Ok(());
        }
        // Pages that are still being read, ahead of a clone that has ended, cannot be dropped.
        std::thread::sleep(BETWEEN_TRIES);
    }
    bail!(
        "{} of {pages} pages of {} stay in the page cache: give --dir on a file system on disk",
        cached.unwrap_or_default(),
        path.display()
    )
}
