#![forbid(unsafe_code)]
//! The proof that clones can be told apart, on the command line.

use clap::Args as ClapArgs;

/// What prints a guest's context ID: no file shows it (`IOCTL_VM_SOCKETS_GET_LOCAL_CID`, vsock(7)).
const CID_COMMAND: &str = "perl -e 'open(F, \"<\", \"/dev/vsock\") && ioctl(F, 0x7b9, $c = pack(\"L\", 0)) && print unpack(\"L\", $c)' 2>/dev/null";

/// `pando clone --check-unique`
#[derive(Debug, Clone, ClapArgs)]
pub struct UniqueArgs {
    /// Start two clones, ask each for its generation ID, random numbers, MAC, ids and clock, compare, and
    /// end them; exit code 1 where something is equal that must differ, or a clock is not the host's.
    /// Needs a guest with a root shell that reads commands from its COM1 (ttyS0)
    #[arg(long, conflicts_with_all = ["count", "serial", "json"])]
    pub check_unique: bool,
    /// With --check-unique: what the guest's shell wants in front of a command
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        requires = "check_unique"
    )]
    pub shell_prefix: String,
    /// With --check-unique: boot id, machine id and host name must differ as well, which the guest renews by
    /// itself (guest/vm-fork)
    #[arg(long, requires = "check_unique")]
    pub strict: bool,
    /// With --check-unique: a shell command that ends when the guest has renewed what it renews by itself,
    /// such as 'until [ -e /run/vm-fork/done ]; do sleep 0.1; done'
    #[arg(long, value_name = "COMMAND", requires = "check_unique")]
    pub wait_for: Option<String>,
    /// With --check-unique: give up when a clone has not answered within this many seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        requires = "check_unique"
    )]
    pub answer_within: u32,
    /// With --check-unique: the command by which the guest says its vsock context ID [default: the system's
    /// call, by perl]
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = CID_COMMAND,
        hide_default_value = true,
        requires = "check_unique"
    )]
    pub cid_command: String,
    /// With --check-unique: how far a clock may be from the host's
    #[arg(
        long,
        value_name = "MILLISECONDS",
        default_value_t = 100,
        requires = "check_unique"
    )]
    pub clock_tolerance: u64,
}
