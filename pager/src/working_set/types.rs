#![forbid(unsafe_code)]
//! What a pager saw of one clone.

use std::time::Duration;

use crate::page::{PageIndex, PageRange};

/// The first touch of a page by a clone, as a demand fault told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Which image, in the order in which the clone's images were attached: the backend.
    pub image: u32,
    /// Which page of it.
    pub page: PageIndex,
    /// Whether the page was written: by this touch, or, where that is known, later.
    pub write: bool,
    /// When, since the clone was attached.
    pub at: Duration,
}

/// What is known of a page that a clone had without asking for it: brought ahead of it, or
/// inherited. Such a page raises no fault, so nothing tells whether it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// It was written, which is a touch.
    Written,
    /// It was not written; read or not.
    Unwritten,
    /// Nobody knows whether it was even written.
    Unknown,
}

/// Pages of which something was seen when a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which image, as in [`Touch`].
    pub image: u32,
    /// Which pages of it.
    pub pages: PageRange,
    /// What was seen.
    pub sight: Sight,
}

/// The touches of one clone in order, each page once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Whose they are.
    pub client: u64,
    /// Its touches.
    pub touches: Vec<Touch>,
    /// What its memory showed at the end. A page that is here as [`Sight::Written`] counts as
    /// written whether a touch tells of it or not; of other pages that are both, the touch counts.
    pub seen: Vec<Seen>,
    /// Whether these are all: the bound on what is recorded was not hit.
    pub is_complete: bool,
}
