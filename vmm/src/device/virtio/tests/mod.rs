//! Devices as a driver sees them: registers and queues in guest memory, nothing beside.

mod driver;
mod hostile;
mod net;
mod requests;
mod saved;
