//! A network device on a tap of the host.

pub mod backend;
pub mod device;
pub mod request;
pub mod state;
