#![forbid(unsafe_code)]
//! What can be wrong with a template, said so that one knows which file and what to do.

use std::io;
use std::path::{Path, PathBuf};

use pando_pager::image::ImageError;
use thiserror::Error;

use crate::device::virtio::block::backend::DiskError;
use crate::report::exit;

/// Why a template could not be made, opened or used.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// A directory without a manifest, or no directory at all.
    #[error(
        "{} is not a template: it has no readable {}; make one with `pando template create`",
        dir.display(), super::MANIFEST_FILE
    )]
    NotATemplate {
        /// What was given.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A system call on one of the files failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The manifest is of a later format.
    #[error(
        "{} has format {found}, and this pando reads formats up to {supported}: \
         use a newer pando, or make the template again with this one",
        path.display()
    )]
    NewerFormat {
        /// The manifest or state file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format that is read.
        supported: u32,
    },
    /// A file of the template does not say what it should.
    #[error("{} is damaged: {reason}; restore it from a copy or make the template again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A sealed file is not the file that was sealed.
    #[error(
        "{} is not the file that was sealed: its {what} is {actual}, sealed was {expected}; \
         restore it, or, if it was copied on purpose, check and seal it again with \
         `pando template verify --reseal {}`",
        path.display(), dir.display()
    )]
    Changed {
        /// The template.
        dir: PathBuf,
        /// Which file of it.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// What the seal says.
        expected: String,
        /// What the file says.
        actual: String,
    },
    /// The page index or a RAM file cannot be used.
    #[error("template image {} cannot be used", path.display())]
    Image {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ImageError,
    },
    /// This host lacks something that the template needs.
    #[error(
        "this host cannot run {}: it lacks {}; run it on a host like the one that made it",
        dir.display(), missing.join(", ")
    )]
    Host {
        /// The template.
        dir: PathBuf,
        /// The features by name.
        missing: Vec<String>,
    },
    /// A clone's disk cannot be made.
    #[error("cannot give a clone its disk")]
    Disk(#[source] DiskError),
    /// The output of a create exists.
    #[error("{} exists already: choose another name, or remove it first", dir.display())]
    Exists {
        /// What was given.
        dir: PathBuf,
    },
    /// There is no way to make a template of this name or size there.
    #[error("cannot make a template at {}: {reason}", dir.display())]
    Output {
        /// What was given.
        dir: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// Not enough room for the RAM of the template.
    #[error(
        "no room for the template in {}: its RAM needs {needed_bytes} bytes and {free_bytes} are free; \
         free some, choose another disk, or give --no-reserve if the guest will not fill its RAM",
        dir.display()
    )]
    DiskFull {
        /// Where the template was to be made.
        dir: PathBuf,
        /// What it needs.
        needed_bytes: u64,
        /// What is there.
        free_bytes: u64,
    },
}

impl TemplateError {
    /// For `map_err` on a system call.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// For `map_err` where the cause is a `rustix` error.
    pub fn errno(action: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.to_owned();
        move |errno| Self::Io {
            action,
            path,
            source: errno.into(),
        }
    }

    /// What a program that fails with this exits with: a template that must not be used is told from
    /// a system that did not do what was asked.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. }
            | Self::Disk(_)
            | Self::Exists { .. }
            | Self::Output { .. }
            | Self::DiskFull { .. } => exit::FAILED,
            Self::NotATemplate { .. }
            | Self::NewerFormat { .. }
            | Self::Damaged { .. }
            | Self::Changed { .. }
            | Self::Image { .. }
            | Self::Host { .. } => exit::TEMPLATE,
        }
    }

    /// A file that does not say what it should.
    pub fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
