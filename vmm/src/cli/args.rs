#![forbid(unsafe_code)]
//! What can be typed. Pure: nothing here looks at the host or opens a file.

mod devices;
mod pager;
mod pool;
mod sockets;
mod unique;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use self::devices::{CloneDeviceArgs, DeviceArgs, DiscardArg};
pub use self::pager::{PagerCommand, PagerCommandArgs, PagerPlaceArg, PagerServeArgs};
pub use self::pool::WarmArg;
pub use self::sockets::CloneSocketArgs;
pub use self::unique::UniqueArgs;
use super::size::Size;
use crate::clone::Engine;
use crate::clone::control::Io;
use crate::clone::give_back::policy::Policy;
use crate::clone::learn::Learn;

const EXIT_CODES: &str = "\
Exit codes:
  0  all went well
  1  something failed; the message says what
  2  the command line is wrong
  3  this host cannot do it (see `pando doctor`)
  4  the template is damaged, changed, too new, or made for another host
  5  guest memory could not be read from the template

Log level: -v, -vv, -vvv, or PANDO_LOG=pando_pager=debug.";

/// One template VM, any number of clones: a virtual machine monitor whose pager serves template
/// memory on fault.
#[derive(Debug, Parser)]
#[command(name = "pando", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Args {
    /// Log more to standard error; repeat for more
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a template of the built-in guest, start clones, prove that they are right, show costs
    Demo(DemoArgs),
    /// Say what this host can do, and the fix for what it cannot
    Doctor(DoctorArgs),
    /// Make, look at and check templates
    Template(TemplateArgs),
    /// Start clones of a template and watch over them until they end
    Clone(CloneArgs),
    /// Run one VM that is neither template nor clone
    Run(RunArgs),
    /// The pager by itself, for other VMMs
    Pager(PagerCommandArgs),
    /// Run one VM by QEMU's options, with a QMP monitor: `pando qemu -help` lists them
    ///
    /// The options, messages and exit codes are those of qemu-system-x86_64, as far as VM templating
    /// goes; what Pando does not have is refused by name. A link to pando with the name
    /// qemu-system-x86_64 behaves the same.
    #[command(disable_help_flag = true)]
    Qemu {
        /// QEMU's options
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "OPTIONS"
        )]
        words: Vec<String>,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// The process of one clone; started by `pando clone`
    #[command(hide = true, name = "clone-worker")]
    CloneWorker,
    /// The root process of a template; started by `pando clone --engine root`
    #[command(hide = true, name = "root-worker")]
    RootWorker,
    /// The pager process of a supervisor; started by `pando clone --pager shared`
    #[command(hide = true, name = "pager-worker")]
    PagerWorker,
}

/// `pando demo`
#[derive(Debug, ClapArgs)]
pub struct DemoArgs {
    /// How many clones to start
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clones: u32,
    /// RAM of the template VM
    #[arg(long, default_value = "128M", value_name = "SIZE")]
    pub memory: Size,
    /// Where clone memory comes from: copy (all of it by the pager), root (forks that share what
    /// their root process holds, copy-on-write) or kernel (a private mapping)
    #[arg(long, default_value_t = Engine::Copy)]
    pub engine: Engine,
    /// How many clones may be starting at once [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub parallel: Option<u32>,
    /// Keep the template in this directory, which must not exist [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    pub template: Option<PathBuf>,
    /// Where pages are served: own (a thread in each clone's process) or shared (one process for all
    /// clones) [default: shared for several clones, own for one]
    #[arg(long = "pager", value_enum, value_name = "WHERE")]
    pub pager_place: Option<PagerPlaceArg>,
    /// How the clones' pagers work.
    #[command(flatten)]
    pub pager: PagerArgs,
    /// Serve Prometheus metrics at http://ADDR/metrics; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub metrics: SocketAddr,
    /// Keep clones and metrics up when all is shown, until interrupted
    #[arg(long)]
    pub hold: bool,
    /// Print one JSON document instead of the table
    #[arg(long)]
    pub json: bool,
}

/// `pando doctor`
#[derive(Debug, ClapArgs)]
pub struct DoctorArgs {
    /// Print one JSON document instead of the table
    #[arg(long)]
    pub json: bool,
}

/// `pando template`
#[derive(Debug, ClapArgs)]
pub struct TemplateArgs {
    /// What to do with a template.
    #[command(subcommand)]
    pub command: TemplateCommand,
}

/// The subcommands of `pando template`.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Boot a VM, wait until it is ready, freeze it, seal its files
    Create(Box<CreateArgs>),
    /// Show what a template holds, its RAM as a map of data, zero and hole
    Inspect(InspectArgs),
    /// Read all of a template and compare it with its checksums
    Verify(VerifyArgs),
    /// Run clones one after the other and record which pages they touch, for clones to come
    Warm(WarmArgs),
}

/// What a machine is and boots. What is given here counts more than the machine file.
#[derive(Debug, Default, ClapArgs)]
pub struct BootArgs {
    /// Machine file, TOML or JSON: memory backends, NUMA nodes, memory modules and all that the other
    /// flags say (docs/machine.md)
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// A bzImage, or an ELF vmlinux (PVH or 64-bit entry); `embedded` is the built-in guest
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0 panic=-1]
    #[arg(long, allow_hyphen_values = true)]
    pub append: Option<String>,
    /// RAM of the machine, in whole pages, at least 4M [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Number of vCPUs, 1 to 8 [default: 1]
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Devices.
    #[command(flatten)]
    pub devices: DeviceArgs,
}

/// `pando template create`
#[derive(Debug, ClapArgs)]
pub struct CreateArgs {
    /// Directory of the new template; must not exist
    pub out: PathBuf,
    /// The machine.
    #[command(flatten)]
    pub boot: BootArgs,
    /// When to freeze: serial:TEXT (COM1 has shown TEXT) or after:SECONDS
    #[arg(long, value_name = "WHEN")]
    pub ready: ReadyArg,
    /// Give up when the guest is not ready after this many seconds
    #[arg(long, default_value_t = 300.0, value_name = "SECONDS")]
    pub timeout: f64,
    /// Do not take disk for all RAM before the guest runs; a disk that fills then ends the create
    #[arg(long)]
    pub no_reserve: bool,
    /// Print one JSON document about the finished template
    #[arg(long)]
    pub json: bool,
}

/// `pando template inspect`
#[derive(Debug, ClapArgs)]
pub struct InspectArgs {
    /// The template
    pub dir: PathBuf,
    /// Also write the map as an SVG picture
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print one JSON document instead
    #[arg(long)]
    pub json: bool,
}

/// `pando template verify`
#[derive(Debug, ClapArgs)]
pub struct VerifyArgs {
    /// The template
    pub dir: PathBuf,
    /// Seal the files as they are now, if every checksum is right (after copying a template)
    #[arg(long)]
    pub reseal: bool,
}

/// `pando template warm`
#[derive(Debug, ClapArgs)]
pub struct WarmArgs {
    /// The template
    pub dir: PathBuf,
    /// How many runs to record
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// End a run after this many seconds at the latest
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub seconds: f64,
    /// End a run when it has asked for no new page for this many seconds
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    pub idle: f64,
    /// Send this line to COM1 first; `\n`, `\r`, `\t` and `\\` are understood
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub input: Option<Line>,
    /// How the pager works.
    #[command(flatten)]
    pub pager: PagerArgs,
    /// Print one JSON document instead of the table
    #[arg(long)]
    pub json: bool,
}

/// A line to send to a guest, escapes resolved, its end included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line(pub Vec<u8>);

/// The longest line: it waits in a socket until the guest runs.
const MAX_LINE_BYTES: usize = 64 << 10;

impl std::str::FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = Vec::new();
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            let character = match character {
                '\\' => match characters.next() {
                    Some('n') => '\n',
                    Some('r') => '\r',
                    Some('t') => '\t',
                    Some('\\') => '\\',
                    other => {
                        let other = other.map_or_else(String::new, String::from);
                        return Err(format!("'\\{other}' is neither \\n, \\r, \\t nor \\\\"));
                    }
                },
                plain => plain,
            };
            bytes.extend(character.encode_utf8(&mut [0; 4]).as_bytes());
        }
        if !bytes.ends_with(b"\n") {
            bytes.push(b'\n');
        }
        if bytes.len() > MAX_LINE_BYTES {
            let length = bytes.len();
            return Err(format!(
                "it has {length} bytes, at most {MAX_LINE_BYTES} are sent"
            ));
        }
        Ok(Self(bytes))
    }
}

/// How a clone's pager works.
#[derive(Debug, ClapArgs)]
pub struct PagerArgs {
    /// How template pages are read
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Do not compare the checksum of each chunk when it is first read
    #[arg(long)]
    pub no_verify: bool,
    /// Let the scheduler place a clone's vCPU and pager, instead of keeping both on one CPU while
    /// pages come in
    #[arg(long)]
    pub no_pin: bool,
    /// Do not install the pages of the template's working set (`pando template warm`) before the guest
    /// runs
    #[arg(long)]
    pub no_working_set: bool,
    /// Give a page up that could not be read within this many seconds
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub fault_deadline: f64,
}

/// How template pages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IoArg {
    /// io_uring, or pread where the kernel refuses it.
    Auto,
    /// io_uring, or an error.
    Uring,
    /// pread in a few threads.
    Pread,
}

impl From<IoArg> for Io {
    fn from(arg: IoArg) -> Self {
        match arg {
            IoArg::Auto => Self::Auto,
            IoArg::Uring => Self::Uring,
            IoArg::Pread => Self::Pread,
        }
    }
}

/// `pando clone`
#[derive(Debug, ClapArgs)]
pub struct CloneArgs {
    /// The template
    pub dir: PathBuf,
    /// How many clones
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Where clone memory comes from: copy (all of it by the pager), root (forks that share what
    /// their root process holds, copy-on-write) or kernel (a private mapping)
    #[arg(long, default_value_t = Engine::Copy)]
    pub engine: Engine,
    /// Whether clones are told apart.
    #[command(flatten)]
    pub unique: UniqueArgs,
    /// Put the COM1 of clone K on a Unix socket, DIR/clone-K.sock [default: this terminal for one
    /// clone, lines marked with the clone's number for several]
    #[arg(long, value_name = "DIR")]
    pub serial: Option<PathBuf>,
    /// Where vsocks and ports are reached.
    #[command(flatten)]
    pub sockets: CloneSocketArgs,
    /// What their devices have.
    #[command(flatten)]
    pub devices: CloneDeviceArgs,
    /// Where pages are served: own (a thread in each clone's process) or shared (one process for all
    /// clones) [default: shared for several clones, own for one]
    #[arg(long = "pager", value_enum, value_name = "WHERE")]
    pub pager_place: Option<PagerPlaceArg>,
    /// How the clones' pagers work.
    #[command(flatten)]
    pub pager: PagerArgs,
    /// Engine root: most template memory that the root holds for all clones; a pager brings the
    /// rest (see --pager) [default: half of what the host has free]
    #[arg(long, value_name = "SIZE")]
    pub root_memory: Option<Size>,
    /// Engine root: have this many clones made ahead, but for their console (`4`); more of them
    /// after many starts, up to a ceiling (`4:32`)
    #[arg(long, value_name = "FLOOR[:CEILING]")]
    pub warm: Option<WarmArg>,
    /// Which clones teach the template's working set what they touch: the first two and then each N-th,
    /// for their first 10 seconds; or off. Engine kernel teaches nothing
    #[arg(long, value_name = "N|off", default_value = "16")]
    pub learn: Learn,
    /// Have clones that were idle for AGE (such as 5s) give guest memory that they did not write back to
    /// the host, all but BUDGET (such as 1M) [default: all of it]; sooner, and all, when the host is
    /// short of memory. It comes back when it is touched
    #[arg(long, value_name = "AGE[:BUDGET]")]
    pub give_back: Option<Policy>,
    /// Give each clone a cgroup (version 2) of its own, which also makes known what the kernel holds for
    /// it; a start takes longer
    #[arg(long)]
    pub cgroups: bool,
    /// Start clones although this host has no room for all of them, by arithmetic; those for which there
    /// is none in the end fail by themselves
    #[arg(long)]
    pub overcommit: bool,
    /// Serve Prometheus metrics at http://ADDR/metrics; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
    /// Print one JSON document when all clones have ended
    #[arg(long)]
    pub json: bool,
}

/// `pando run`
#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    /// The machine.
    #[command(flatten)]
    pub boot: BootArgs,
    /// Where COM1 goes: stdio, null, file:PATH, pty or unix:PATH [default: stdio]
    #[arg(long, value_name = "TARGET")]
    pub serial: Option<String>,
    /// Check the machine, print it as a machine file (TOML) and run nothing
    #[arg(long)]
    pub print_machine: bool,
}

/// When a template VM is frozen.
#[derive(Debug, Clone, PartialEq)]
pub enum ReadyArg {
    /// COM1 has shown this text.
    Serial(String),
    /// This much time has passed.
    After(Duration),
}

impl std::str::FromStr for ReadyArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("serial", "")) => {
                Err("serial: wants the text to wait for, as serial:READY".into())
            }
            Some(("serial", text)) => Ok(Self::Serial(text.to_owned())),
            Some(("after", seconds)) => seconds
                .parse()
                .ok()
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .map(Self::After)
                .ok_or_else(|| format!("'{seconds}' is no number of seconds, as in after:2.5")),
            _ if text == "vsock" => {
                Err("this version has no vsock device: use serial:TEXT or after:SECONDS".into())
            }
            _ => Err(format!("'{text}' is neither serial:TEXT nor after:SECONDS")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_line_has_its_escapes_resolved_and_an_end() {
        let line = |text: &str| text.parse::<Line>().map(|line| line.0);
        assert_eq!(line("i"), Ok(b"i\n".to_vec()));
        assert_eq!(line(r"a\tb\n\\\r\n"), Ok(b"a\tb\n\\\r\n".to_vec()));
        assert!(line(r"a\").unwrap_err().contains(r"'\' is neither"));
        let long = line(&"x".repeat(1 << 16)).unwrap_err();
        assert!(long.contains("65537 bytes"));
    }

    #[test]
    fn ready_marks_are_read() {
        assert_eq!("serial:a:b".parse(), Ok(ReadyArg::Serial("a:b".into())));
        assert_eq!(
            "after:0.5".parse(),
            Ok(ReadyArg::After(Duration::from_millis(500)))
        );
        for wrong in [
            "serial:",
            "after:-1",
            "after:nan",
            "after:1e99",
            "vsock",
            "moon",
        ] {
            assert!(wrong.parse::<ReadyArg>().is_err(), "{wrong}");
        }
    }
}
