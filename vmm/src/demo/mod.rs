//! The demonstration: one template of the built-in guest, many clones, each proven right.
//!
//! [`plan`] says what is asked of the template VM and of each clone, and what they must answer;
//! [`drive`] asks; [`result`](mod@result) is what is shown.

pub mod drive;
pub mod plan;
pub mod result;
