//! Ports between programs of the guest and of the host (virtio 1.2, 5.3): streams of bytes, each with a
//! number, maybe a name, and one other end.
//!
//! ```text
//! queue  0  1         2        3         4  5     6  7    ...
//!        port 0       control            port 1   port 2        of each pair the first brings data to the guest
//! ```
//!
//! [`device`] answers the guest, [`request`] is the form of control messages, [`port`] is what one port owes
//! to whom, [`backend`] is the host's side of it.
//!
//! Nothing is kept in between: what the guest writes is in its request until the host has taken it, and what
//! the host writes is in its socket until the guest gives room.

pub mod backend;
pub mod device;
mod port;
mod request;
pub mod state;
