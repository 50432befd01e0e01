#![forbid(unsafe_code)]
//! The program that is measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The `pando` program: the one that was `given`, or the one beside this program.
pub(crate) fn program(given: Option<&Path>) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .context("cannot tell where this program is")?
            .with_file_name("pando"),
    };
    ensure!(
        path.is_file(),
        "no program {}: build it, or give --pando",
        path.display()
    );
    Ok(path)
}
