#![forbid(unsafe_code)]
//! The command line: from words to what is wanted. Pure, but for the files of `-readconfig`, whose
//! content the caller brings.

pub mod argv;
mod balloon;
mod blockdev;
pub mod chardev;
pub mod choices;
pub mod console;
pub mod device;
pub mod global;
pub mod hub;
pub mod identity;
pub mod machine;
mod mem;
pub mod memory;
pub mod netdev;
pub mod numa;
pub mod options;
pub mod pci;
mod place;
mod ports;
pub mod refused;
pub mod said;
pub mod smp;
mod throttle;
pub mod vhost_user;
pub mod vsock;
pub mod wanted;

pub use argv::{Argument, arguments};
pub use wanted::Wanted;
