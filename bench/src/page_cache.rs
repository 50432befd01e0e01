#![forbid(unsafe_code)]
//! Files in and out of the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

const PAGE_BYTES: u64 = 4096;
/// More of a file than this in the cache is not cold.
const COLD_SHARE: f64 = 0.01;

/// Has the kernel drop `path` from the page cache; an error where it keeps it, as a file system in
/// memory does.
pub(crate) fn drop_file(path: &Path) -> Result<()> {
    let file = open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)
        .with_context(|| format!("cannot drop {} from the page cache", path.display()))?;
    let share = cached_share(&file)?;
    ensure!(
        share <= COLD_SHARE,
        "{:.0} % of {} stay in the page cache: give --dir on a file system on disk",
        share * 100.0,
        path.display()
    );
    Ok(())
}

/// Which share of a sample of the file's pages is in the page cache.
fn cached_share(file: &File) -> Result<f64> {
    let pages = file.metadata()?.len() / PAGE_BYTES;
    // A read brings its neighbours along; samples far apart do not.
    let samples = pages.clamp(1, 64);
    let mut cached = 0;
    for sample in 0..samples {
        let offset = sample * pages / samples * PAGE_BYTES;
        let mut byte = [0];
        let slices = &mut [IoSliceMut::new(&mut byte)];
        match preadv2(file, slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(_) => cached += 1,
            Err(Errno::AGAIN) => (),
            Err(errno) => return Err(errno).context("cannot look into the page cache"),
        }
    }
    Ok(f64::from(cached) / samples as f64)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}
