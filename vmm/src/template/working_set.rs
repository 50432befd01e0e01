#![forbid(unsafe_code)]
//! The file `working-set`: what clones of a template taught about the pages that they touch.
//!
//! It is a hint, and the only file of a template that changes after sealing. It has no seal; its
//! own checksum and the mark of its template do that work, and whatever is wrong with it costs
//! time and nothing else: it is ignored with a reason, never an error of the template.
//!
//! The file is read-only like the others and never written: a new one takes its place by one
//! rename, under an exclusive `flock` of the template's directory, so that of two supervisors that
//! learn at once each adds to what the other has written. Who may not write the directory (another
//! owner, a read-only file system) gets an error, which is to be told as a note.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pando_pager::image::Index;
use pando_pager::working_set::{MergeRules, Merged, Plan, PlanRules, Trace, WorkingSet};
use rustix::fs::{Access, FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

use super::touched::RunFacts;
use super::{Template, TemplateError, WORKING_SET_FILE, files, staging};
use crate::report::one_line;

/// How often the lock of the directory is tried.
const LOCK_TRIES: u32 = 500;
/// Pause between two tries: 2.5 s in all, where a merge takes milliseconds.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why nothing could be learned. The template is as good as before.
#[derive(Debug, Error)]
pub enum LearnError {
    /// Another process holds the template's directory.
    #[error(
        "the working set of {} was not updated: another process held the lock of the directory \
         for {} ms; try again when it has ended",
        dir.display(), tries.saturating_mul(5)
    )]
    Locked {
        /// The template.
        dir: PathBuf,
        /// How often it was tried.
        tries: u32,
    },
    /// The directory or its file system refuses.
    #[error(
        "the working set of {} was not updated; let this user write the directory (its files stay \
         read-only), or learn with a copy of the template that it may write",
        dir.display()
    )]
    Refused {
        /// The template.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: Box<TemplateError>,
    },
}

/// What a template has for a working set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// None: no clone has taught anything yet.
    Absent,
    /// One.
    Known(WorkingSet),
    /// A file that is of no use.
    Ignored {
        /// Why.
        reason: String,
    },
}

impl Found {
    /// The working set, if there is one.
    pub fn set(&self) -> Option<&WorkingSet> {
        match self {
            Self::Known(set) => Some(set),
            Self::Absent | Self::Ignored { .. } => None,
        }
    }
}

/// What the working set of `template` says to bring ahead of its clones; nothing where there is
/// none. A file that is of no use is noted.
pub fn plan(template: &Template, rules: &PlanRules) -> Plan {
    match WorkingSetFile::of(template).read() {
        Found::Known(set) => Plan::new(&set, template.index(), rules),
        Found::Absent => Plan::default(),
        Found::Ignored { reason } => {
            tracing::warn!("the working set is not used: {reason}");
            Plan::default()
        }
    }
}

/// What came of learning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Learned {
    /// The working set as it is now on disk.
    pub set: WorkingSet,
    /// What each run did to it.
    pub merged: Vec<Merged>,
    /// Why the file that was there had to be replaced by a new beginning, if it had.
    pub replaced: Option<String>,
}

impl Learned {
    /// What the last run, which had this trace, did.
    pub fn facts(&self, trace: &Trace) -> RunFacts {
        let merged = self.merged.last().copied().unwrap_or_default();
        RunFacts::of(trace, &merged)
    }
}

/// A template's working set, on disk.
#[derive(Debug)]
pub struct WorkingSetFile<'a> {
    dir: &'a Path,
    template_mark: u64,
    index: &'a Index,
}

impl<'a> WorkingSetFile<'a> {
    /// That of `template`.
    pub fn of(template: &'a Template) -> Self {
        // The index has a checksum of all RAM: templates that differ in it are not mixed up.
        let digest = &template.manifest().file().index.digest;
        Self {
            dir: template.dir(),
            template_mark: xxhash_rust::xxh3::xxh3_64(digest.as_bytes()),
            index: template.index(),
        }
    }

    /// Where it is, or would be.
    pub fn path(&self) -> PathBuf {
        self.dir.join(WORKING_SET_FILE)
    }

    /// What there is.
    pub fn read(&self) -> Found {
        let path = self.path();
        let ignored = |error: &TemplateError| Found::Ignored {
            reason: one_line(error),
        };
        let file = match files::open_if_there(&path) {
            Ok(Ok(file)) => file,
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Found::Absent,
            Ok(Err(error)) => return ignored(&TemplateError::io("open", &path)(error)),
            Err(error) => return ignored(&error),
        };
        let bytes = match files::read(&file, &path, WorkingSet::MAX_FILE_BYTES as u64) {
            Ok(bytes) => bytes,
            Err(error) => return ignored(&error),
        };
        match WorkingSet::decode(&bytes) {
            Ok(set) if set.is_of(self.template_mark, self.index) => Found::Known(set),
            Ok(_) => Found::Ignored {
                reason: "it was recorded with another template".to_owned(),
            },
            Err(error) => Found::Ignored {
                reason: one_line(&error),
            },
        }
    }

    /// Whether this user may put another in its place, as far as can be told without doing it.
    pub fn check_writable(&self) -> Result<(), LearnError> {
        rustix::fs::access(self.dir, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|errno| self.refused(TemplateError::errno("write", self.dir)(errno)))
    }

    /// Merges one run by the usual rules.
    pub fn learn_run(&self, trace: &Trace) -> Result<Learned, LearnError> {
        self.learn(std::slice::from_ref(trace), &MergeRules::default())
    }

    /// The same, but does not wait for a lock that somebody else holds.
    pub fn learn_run_now(&self, trace: &Trace) -> Result<Learned, LearnError> {
        self.learn_in(1, std::slice::from_ref(trace), &MergeRules::default())
    }

    /// Merges runs into what is there now and puts the result in its place. Traces without a page
    /// that counts are no runs; with none at all nothing is written.
    pub fn learn(&self, traces: &[Trace], rules: &MergeRules) -> Result<Learned, LearnError> {
        self.learn_in(LOCK_TRIES, traces, rules)
    }

    fn learn_in(
        &self,
        tries: u32,
        traces: &[Trace],
        rules: &MergeRules,
    ) -> Result<Learned, LearnError> {
        // Held until the new file is in place.
        let _lock = self.lock(tries)?;
        let (mut set, replaced) = match self.read() {
            Found::Known(set) => (set, None),
            Found::Absent => (self.nothing(), None),
            Found::Ignored { reason } => (self.nothing(), Some(reason)),
        };
        let runs_before = set.runs();
        let merged = traces
            .iter()
            .map(|trace| set.merge(trace, self.index, rules))
            .collect();
        if set.runs() != runs_before {
            self.sweep();
            staging::replace(&self.path(), &set.encode()).map_err(|source| self.refused(source))?;
        }
        Ok(Learned {
            set,
            merged,
            replaced,
        })
    }

    fn nothing(&self) -> WorkingSet {
        WorkingSet::new(self.template_mark, self.index)
    }

    fn refused(&self, source: TemplateError) -> LearnError {
        LearnError::Refused {
            dir: self.dir.to_owned(),
            source: Box::new(source),
        }
    }

    /// Tries to get the lock so often, with a pause between.
    fn lock(&self, tries: u32) -> Result<File, LearnError> {
        let dir = File::open(self.dir)
            .map_err(|error| self.refused(TemplateError::io("open", self.dir)(error)))?;
        for attempt in 1..=tries {
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(dir),
                Err(Errno::WOULDBLOCK | Errno::INTR) if attempt < tries => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => (),
                Err(errno) => {
                    return Err(self.refused(TemplateError::errno("lock", self.dir)(errno)));
                }
            }
        }
        Err(LearnError::Locked {
            dir: self.dir.to_owned(),
            tries,
        })
    }

    /// Removes what was left by a process that was killed in the instant of putting a file in
    /// place. Under the lock nobody else has one.
    fn sweep(&self) {
        let prefix = staging::replacement_prefix(WORKING_SET_FILE);
        let entries = fs::read_dir(self.dir).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(prefix.as_bytes()) {
                // What stays is in nobody's way, unless a process number comes again.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests;
