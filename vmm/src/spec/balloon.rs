#![forbid(unsafe_code)]
//! A balloon as it is asked for.

/// Memory that the guest gives away and takes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonParts {
    /// The guest takes memory back before it ends programs for want of it.
    pub deflate_on_oom: bool,
    /// The guest says which of its pages are free, and they are discarded.
    pub free_page_reporting: bool,
}
