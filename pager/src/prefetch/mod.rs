#![forbid(unsafe_code)]
//! What to install beside the page that was asked for.

pub(crate) mod plan;
