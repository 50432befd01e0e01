#![forbid(unsafe_code)]
//! Where clones are reached, on the command line.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use crate::spec::{FIRST_CID, LAST_CID};

/// `pando clone --vsock` and `--console`
#[derive(Debug, Clone, ClapArgs)]
pub struct CloneSocketArgs {
    /// Put the vsock of clone K on a Unix socket, DIR/clone-K.vsock: a program of the host connects and says
    /// `CONNECT PORT`; those that the guest reaches listen on DIR/clone-K.vsock_PORT [default: clones have
    /// a vsock if the template has, and reach nobody]
    #[arg(long = "vsock", value_name = "DIR")]
    pub vsock_dir: Option<PathBuf>,
    /// The vsock context ID of clone 0; clone K has K more [default: the template's]
    #[arg(
        long,
        value_name = "CID",
        value_parser = clap::value_parser!(u32).range(i64::from(FIRST_CID)..=i64::from(LAST_CID))
    )]
    pub vsock_cid: Option<u32>,
    /// Put the ports of clone K on Unix sockets, DIR/clone-K.NAME.sock, or DIR/clone-K.ID-NUMBER.sock for a
    /// port without a name [default: clones have the template's ports, and they lead to nobody]
    #[arg(long = "console", value_name = "DIR")]
    pub console_dir: Option<PathBuf>,
}
