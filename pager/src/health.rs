#![forbid(unsafe_code)]
//! What went wrong while serving: pages that could not be had, and the end of the pager itself.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::page::PageIndex;

/// Poisoned pages that are remembered by name; later ones are only counted.
const REMEMBERED: usize = 1024;

/// Why a page could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonReason {
    /// Reading it failed, and failed again.
    Read {
        /// What the kernel said.
        errno: i32,
    },
    /// The file ended too early: it was cut while it was served.
    Short {
        /// Bytes asked for.
        expected: usize,
        /// Bytes there.
        actual: usize,
    },
    /// Its chunk is not what the template's index says.
    Checksum {
        /// Hash in the index.
        expected: u64,
        /// Hash of what was read.
        actual: u64,
    },
    /// It did not come in time.
    Deadline {
        /// How long the fault waited.
        limit: Duration,
    },
    /// Until its deadline there was no memory to put it in.
    NoMemory,
    /// The kernel refused to install it; EAGAIN: until its deadline.
    Install {
        /// What the kernel said.
        errno: i32,
    },
    /// It was installed and is gone again, behind the pager's back: something discarded it.
    Discarded,
}

impl fmt::Display for PoisonReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error;
        match *self {
            Self::Read { errno } => write!(f, "cannot be read: {}", error(errno)),
            Self::Short { expected, actual } => write!(
                f,
                "the file was cut: {actual} of {expected} bytes could be read"
            ),
            Self::Checksum { expected, actual } => write!(
                f,
                "its chunk has checksum {actual:016x} where the index says {expected:016x}"
            ),
            Self::Deadline { limit } => write!(f, "was not read within {limit:?}"),
            Self::NoMemory => write!(f, "no memory to install it"),
            Self::Install { errno } => write!(f, "cannot be installed: {}", error(errno)),
            Self::Discarded => write!(f, "was discarded after it had been installed"),
        }
    }
}

/// A page that touching is an error now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoisonedPage {
    /// Id of the image.
    pub image: String,
    /// The page.
    pub page: PageIndex,
    /// Why.
    pub reason: PoisonReason,
}

impl fmt::Display for PoisonedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}: {}", self.page, self.image, self.reason)
    }
}

/// What touching a page that cannot be had does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonMethod {
    /// UFFDIO_POISON: SIGBUS, in KVM a memory error.
    Marker,
    /// All access is taken away (kernels without UFFDIO_POISON): SIGSEGV, in KVM EFAULT.
    Protect,
}

type OnPoison = Arc<dyn Fn(&PoisonedPage) + Send + Sync>;
type OnFailure = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Default)]
struct State {
    poisoned: Vec<PoisonedPage>,
    total: u64,
    failure: Option<String>,
    on_poison: Option<OnPoison>,
    on_failure: Option<OnFailure>,
}

/// The pager's troubles, for other threads. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    method: PoisonMethod,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Health")
            .field("method", &self.method)
            .field("poisoned", &state.total)
            .field("failure", &state.failure)
            .finish_non_exhaustive()
    }
}

impl Health {
    pub(crate) fn new(method: PoisonMethod) -> Self {
        Self {
            method,
            state: Arc::default(),
        }
    }

    pub(crate) fn with_method(&self, method: PoisonMethod) -> Self {
        Self {
            method,
            state: Arc::clone(&self.state),
        }
    }

    /// Nothing in here can be left half-changed, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages that could not be had, in order; at most the first 1024.
    pub fn poisoned(&self) -> Vec<PoisonedPage> {
        self.state().poisoned.clone()
    }

    /// What touching such a page does here.
    pub fn poison_method(&self) -> PoisonMethod {
        self.method
    }

    /// Why the pager ended by itself, if it did. All memory it served is inaccessible then: what
    /// touches it gets SIGSEGV, in KVM EFAULT, rather than wait for ever or read zeros.
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Calls `notice` on the pager thread for each page that cannot be had, *before* whoever
    /// waits for it is told. It must not touch served memory, and it delays every other fault.
    pub fn set_on_poison(&self, notice: Box<dyn Fn(&PoisonedPage) + Send + Sync>) {
        self.state().on_poison = Some(Arc::from(notice));
    }

    /// Calls `notice` on the pager thread when the pager ends by itself, before the memory
    /// becomes inaccessible. It must not touch served memory.
    pub fn set_on_failure(&self, notice: Box<dyn Fn(&str) + Send + Sync>) {
        self.state().on_failure = Some(Arc::from(notice));
    }

    pub(crate) fn report(&self, page: &PoisonedPage) {
        let notice = {
            let mut state = self.state();
            state.total += 1;
            if state.poisoned.len() < REMEMBERED {
                state.poisoned.push(page.clone());
            }
            state.on_poison.clone()
        };
        if let Some(notice) = notice {
            notice(page);
        }
    }

    pub(crate) fn fail(&self, reason: &str) {
        let notice = {
            let mut state = self.state();
            state.failure = Some(reason.to_owned());
            state.on_failure.clone()
        };
        if let Some(notice) = notice {
            notice(reason);
        }
    }
}
