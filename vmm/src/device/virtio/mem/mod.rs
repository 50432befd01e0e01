//! Memory that grows and shrinks (virtio 1.2, 5.15): the guest plugs and unplugs blocks of a region as the host
//! requests. What is unplugged goes back to the host through the discard gate.

mod bitmap;
pub mod device;
pub mod request;
pub mod state;
