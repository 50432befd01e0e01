//! System calls that no crate wraps safely.

pub mod event;
pub mod fork;
pub mod lock;
pub mod pagemap;
pub mod spawn;
pub mod tap;
pub mod text;
pub mod uring;
