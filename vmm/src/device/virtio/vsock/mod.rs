//! Connections between programs of the guest and programs of the host (virtio 1.3, 5.10): streams, by a
//! context ID and ports, on the host through Unix sockets.
//!
//! [`device`] answers the guest, [`request`] is the form of its packets, [`table`] holds the connections,
//! [`connection`] is one of them, [`credit`] counts what each side may send, [`backend`] is how they leave
//! for the host.

pub mod backend;
mod connection;
mod credit;
pub mod device;
mod request;
pub mod state;
mod table;
