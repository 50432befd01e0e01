//! Devices as a driver sees them: registers and queues in guest memory, nothing beside.

mod balloon;
mod console;
mod console_guest;
mod console_hostile;
mod console_load;
mod documents;
mod driver;
mod flights;
mod hostile;
mod limits;
mod net;
mod net_hostile;
mod net_load;
mod requests;
mod rings;
mod saved;
mod taken_out;
mod vhost_user;
mod vhost_user_hostile;
mod vhost_user_net;
mod vsock;
mod vsock_guest;
mod vsock_host;
mod vsock_hostile;
mod vsock_load;
