#![forbid(unsafe_code)]
//! What a pager saw of one clone.

use std::time::Duration;

use crate::page::PageIndex;

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

/// The touches of one clone in order, each page once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Whose they are.
    pub client: u64,
    /// Its touches.
    pub touches: Vec<Touch>,
    /// Whether these are all: the bound on what is recorded was not hit.
    pub is_complete: bool,
}
