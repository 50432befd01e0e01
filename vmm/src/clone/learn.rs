#![forbid(unsafe_code)]
//! Clones that teach their template in passing: which are recorded, and how what they touched gets
//! into the working set without anybody waiting for it.
//!
//! ```text
//! clone: first touches, what it wrote --- pieces ---> supervisor: Learner, one trace a clone
//!                                                        | bounded queue, dropped when full
//!                                                        v
//!                                          thread: merges under the template's lock
//! ```

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use pando_pager::working_set::Trace;
use serde::{Deserialize, Serialize};

use super::record::{Arriving, LESSON_WINDOW, Record, TracePiece};
use super::supervise::Supervisor;
use crate::observe::metrics;
use crate::report::chain;
use crate::template::Template;
use crate::template::working_set::{LearnError, WorkingSetFile};

/// The first clones of a run are recorded, so many: what they touch is news more often than what
/// later ones do.
const FIRST: u64 = 2;
/// Most clones whose traces arrive at a time; of others nothing is learned.
const MAX_ARRIVING: usize = 64;
/// Most traces that wait to be merged; others are dropped.
const MAX_WAITING: usize = 16;

/// Which clones teach the template what they touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Learn {
    /// None.
    Off,
    /// The first ones of a run, and then each so-manieth.
    Every(NonZeroU32),
}

impl Learn {
    /// What is recorded of clone `number` of a run, counted from 0.
    pub fn record(self, number: u64) -> Option<Record> {
        match self {
            Self::Off => None,
            Self::Every(every) => {
                let is_due = number < FIRST || number.is_multiple_of(u64::from(every.get()));
                is_due.then_some(Record::Beginning(LESSON_WINDOW))
            }
        }
    }
}

impl FromStr for Learn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let every = text.parse().map_err(|_| {
            format!("'{text}' is neither off nor a number of clones from 1 on, such as 16")
        })?;
        Ok(Self::Every(every))
    }
}

impl fmt::Display for Learn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.pad("off"),
            Self::Every(every) => every.fmt(f),
        }
    }
}

/// What became of what clones touched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Lessons {
    /// Clones whose touches are in the working set.
    pub learned: u64,
    /// Clones that touched nothing that counts.
    pub empty: u64,
    /// Clones for which there was no room: the queue was full.
    pub dropped: u64,
    /// Clones whose touches could not be written.
    pub refused: u64,
}

/// What can become of what a clone touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Learned,
    Empty,
    Dropped,
    Refused,
}

impl Lessons {
    fn count(&mut self, template: &str, fate: Fate) {
        let (count, name) = match fate {
            Fate::Learned => (&mut self.learned, "learned"),
            Fate::Empty => (&mut self.empty, "empty"),
            Fate::Dropped => (&mut self.dropped, "dropped"),
            Fate::Refused => (&mut self.refused, "refused"),
        };
        *count += 1;
        metrics::count_lesson(template, name);
    }
}

/// Takes in what clones of one template touch.
#[derive(Debug)]
pub(super) struct Learner {
    learn: Learn,
    dir: PathBuf,
    /// The template's name in metrics.
    template: String,
    arriving: HashMap<usize, Arriving>,
    teacher: Option<Teacher>,
    lessons: Arc<Mutex<Lessons>>,
}

impl Supervisor {
    /// Waits until the template has learned what clones told until now; what became of it.
    pub fn finish_lessons(&mut self) -> Lessons {
        self.learner.finish()
    }
}

/// The thread that merges.
#[derive(Debug)]
struct Teacher {
    traces: SyncSender<Trace>,
    thread: JoinHandle<()>,
}

impl Learner {
    pub(super) fn new(learn: Learn, dir: &Path, template: &str) -> Self {
        Self {
            learn,
            dir: dir.to_owned(),
            template: template.to_owned(),
            arriving: HashMap::new(),
            teacher: None,
            lessons: Arc::default(),
        }
    }

    /// Takes a part of what `clone` touched.
    pub(super) fn hear(&mut self, clone: usize, piece: TracePiece) {
        if self.learn == Learn::Off {
            return;
        }
        if !self.arriving.contains_key(&clone) && self.arriving.len() >= MAX_ARRIVING {
            return self.count(Fate::Dropped);
        }
        let arriving = self.arriving.entry(clone).or_default();
        arriving.add(piece);
        if arriving.is_whole()
            && let Some(trace) = self.arriving.remove(&clone)
            && let Some(trace) = trace.finish(clone as u64)
        {
            self.teach(trace);
        }
    }

    /// A clone has ended: half a trace is none.
    pub(super) fn ended(&mut self, clone: usize) {
        self.arriving.remove(&clone);
    }

    /// Waits until all that was told is merged; what became of it.
    pub(super) fn finish(&mut self) -> Lessons {
        if let Some(Teacher { traces, thread }) = self.teacher.take() {
            drop(traces);
            if thread.join().is_err() {
                tracing::error!("the thread that learns panicked");
            }
        }
        *self.lessons.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn teach(&mut self, trace: Trace) {
        if self.teacher.is_none() {
            match self.start() {
                Ok(teacher) => self.teacher = Some(teacher),
                Err(error) => {
                    tracing::warn!(%error, "cannot start the thread that learns");
                    return self.count(Fate::Dropped);
                }
            }
        }
        let sent = self
            .teacher
            .as_ref()
            .map(|teacher| teacher.traces.try_send(trace));
        if !matches!(sent, Some(Ok(()))) {
            self.count(Fate::Dropped);
        }
    }

    fn start(&self) -> std::io::Result<Teacher> {
        let (traces, waiting) = sync_channel(MAX_WAITING);
        let (dir, template) = (self.dir.clone(), self.template.clone());
        let lessons = Arc::clone(&self.lessons);
        let thread = std::thread::Builder::new()
            .name("learn".to_owned())
            .spawn(move || learn_all(&dir, &template, &waiting, &lessons))?;
        Ok(Teacher { traces, thread })
    }

    fn count(&self, fate: Fate) {
        let mut lessons = self.lessons.lock().unwrap_or_else(PoisonError::into_inner);
        lessons.count(&self.template, fate);
    }
}

impl Drop for Learner {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Merges traces until there are no more to come.
fn learn_all(dir: &Path, name: &str, traces: &Receiver<Trace>, lessons: &Mutex<Lessons>) {
    let template = Template::open(dir);
    if let Err(error) = &template {
        tracing::warn!("nothing is learned: {}", chain(error));
    }
    let mut is_said = false;
    // Who holds the lock for so long is not waited for once for each clone: the supervisor's end
    // waits for this.
    let mut is_locked = false;
    for trace in traces {
        let learned = template.as_ref().ok().map(|template| {
            let file = WorkingSetFile::of(template);
            if is_locked {
                file.learn_run_now(&trace)
            } else {
                file.learn_run(&trace)
            }
        });
        is_locked = matches!(learned, Some(Err(LearnError::Locked { .. })));
        let fate = match learned {
            Some(Ok(learned)) => {
                let pages: u64 = learned.merged.iter().map(|run| run.known + run.new).sum();
                if pages == 0 {
                    Fate::Empty
                } else {
                    Fate::Learned
                }
            }
            Some(Err(error)) => {
                if !is_said {
                    tracing::warn!("what clones touch is not kept: {}", chain(&error));
                }
                is_said = true;
                Fate::Refused
            }
            None => Fate::Refused,
        };
        let mut lessons = lessons.lock().unwrap_or_else(PoisonError::into_inner);
        lessons.count(name, fate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_clones_and_then_each_so_manieth_are_recorded() {
        let learn: Learn = "16".parse().unwrap();
        let recorded: Vec<u64> = (0..50).filter(|&n| learn.record(n).is_some()).collect();
        assert_eq!(recorded, [0, 1, 16, 32, 48]);
        assert!((0..50).all(|n| Learn::Off.record(n).is_none()));
        assert_eq!("off".parse(), Ok(Learn::Off));
        assert_eq!(
            (learn.to_string(), Learn::Off.to_string()),
            ("16".into(), "off".into())
        );
        for wrong in ["", "0", "-1", "on", "1.5", "99999999999"] {
            let error = wrong.parse::<Learn>().unwrap_err();
            assert!(error.contains("neither off nor a number"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_learned_is_counted_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let every = Learn::Every(NonZeroU32::MIN);
        let mut learner = Learner::new(every, dir.path(), "t");
        learner.teach(Trace::default());
        learner.teach(Trace::default());
        let lessons = learner.finish();
        assert_eq!((lessons.refused, lessons.learned), (2, 0), "no template");
    }
}
