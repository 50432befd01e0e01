//! Virtio devices (OASIS virtio 1.2), modern only.
//!
//! Four parts that do not know each other more than they must: a **transport** ([`transport::pci`]) is
//! how the guest finds and sets up a device; a **queue** ([`queue`]) takes requests out of guest memory
//! and puts answers there; a **device** ([`device::VirtioDevice`]) is what a request means; a
//! **backend** is where its bytes are. [`worker`] holds a device and its queues together and works on
//! them in a thread of its own, which is started when the guest first asks for something: neither a
//! machine that is made nor one that is restored has one before. [`inbound`] is for what comes to a device
//! without being asked for; its thread also waits for the outside, from when the machine runs.
//!
//! [`limit`] is how fast requests may be worked on. A device that is too early sleeps until its time.
//!
//! Every device has the same files: `device`, `request` where requests have a form, `backend`, `state`
//! where it has one of its own.
//!
//! Queue contents, registers and addresses come from the guest and are not trusted. What is wrong with
//! one request fails that request; what is wrong with a queue stops the device until it is reset. Work
//! for one guest request, and the number of requests for one notification, are limited.

pub mod balloon;
mod bell;
pub mod block;
pub mod console;
pub mod core;
pub mod delegate;
pub mod device;
pub mod inbound;
pub mod limit;
pub mod mem;
pub mod net;
pub mod queue;
pub mod rng;
pub mod state;
pub mod transport;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod tests;
