#![forbid(unsafe_code)]
//! From an argument vector to the end of the machine.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crossbeam::channel::Sender;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::background::{self, Background};
use super::error::OptionError;
use super::line::chardev::Chardev;
use super::line::wanted::{self, ProgramOptions};
use super::line::{Wanted, arguments, choices, options};
use super::link::{Link, open_link, reason};
use super::qmp::message::{PACKAGE, QEMU_VERSION};
use super::qmp::server::{self, Monitor};
use super::vm::{Message, Plan, Teller, Vm};
use super::words::config_file;
use crate::config::file::MachineFile;
use crate::observe::{log, metrics};
use crate::report::{exit, one_line};
use crate::sys::lock::{LockKind, Locked, TO_THE_END, lock_range};

/// How long monitors have to send what waits when the program ends.
const FLUSH: Duration = Duration::from_millis(500);

/// What a command line comes to.
#[derive(Debug)]
pub enum Command {
    /// Text for standard output, and nothing else.
    Text(String),
    /// A machine.
    Machine(Box<Wanted>),
}

/// Reads an argument vector without the program's name. `tell` is told what QEMU warns of.
pub fn read(
    program: &str,
    words: &[String],
    tell: &mut dyn FnMut(&str),
) -> Result<Command, OptionError> {
    let arguments = arguments(words, &mut read_file)?;
    let has = |name: &str| arguments.iter().any(|argument| argument.name == name);
    if has("help") || has("h") {
        return Ok(Command::Text(options::help(program)));
    }
    if has("version") {
        let (major, minor, micro) = QEMU_VERSION;
        return Ok(Command::Text(format!(
            "QEMU emulator version {major}.{minor}.{micro} ({PACKAGE})\n"
        )));
    }
    if let Some(text) = arguments.iter().find_map(choices::of) {
        return Ok(Command::Text(text));
    }
    for argument in &arguments {
        for warning in argument.warnings() {
            tell(&warning);
        }
    }
    let wanted = wanted::read(&arguments)?;
    if wanted.program.print_machine {
        let plan = Plan::new(wanted)?;
        let file = MachineFile::of(&plan.spec, plan.boot.as_ref(), None);
        let text = file.to_toml();
        return text
            .map(Command::Text)
            .map_err(|error| OptionError::new(error.to_string()));
    }
    Ok(Command::Machine(Box::new(wanted)))
}

fn read_file(path: &str) -> Result<String, String> {
    let mut content = Vec::new();
    let file = fs::File::open(path)
        .map_err(|error| format!("Could not open '{path}': {}", reason(&error)))?;
    file.take(config_file::MAX_FILE_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(|error| format!("Cannot read config file: {}", reason(&error)))?;
    if content.len() as u64 > config_file::MAX_FILE_BYTES {
        return Err(format!(
            "Cannot read config file: it has more than {} bytes",
            config_file::MAX_FILE_BYTES
        ));
    }
    String::from_utf8(content).map_err(|_| "Cannot read config file: it is no text".to_owned())
}

/// Makes the machine and runs it until the end; the exit code.
pub fn run(wanted: Wanted, words: &[String], mut tell: Teller) -> Result<u8, OptionError> {
    let program = wanted.program.clone();
    let background = match background::begin(&program, words)? {
        Background::Parent(code) => return Ok(code),
        Background::Child(child) => Some(child),
        Background::No => None,
    };
    // First of all: no file is written that turns out to be memory.
    let plan = Plan::new(wanted)?;
    for warning in plan.wanted.warnings() {
        tell(&warning);
    }
    start_log(&program)?;
    let _pid_file = program
        .pid_file
        .as_deref()
        .map(PidFile::write)
        .transpose()?;
    if let Some(address) = &program.metrics {
        serve_metrics(address)?;
    }
    let monitors = plan.wanted.monitors.clone();
    let mut vm = Vm::new(plan, tell)?;
    let sender = vm.sender();
    let mut links = Vec::new();
    for option in &monitors {
        let link = match option.chardev {
            Chardev::Hub(at) => vm
                .monitor_on_hub(at, !option.control)
                .map(Link::Stream)
                .map_err(|error| OptionError::new(format!("cannot start a monitor: {error}")))?,
            _ => open_link(&option.chardev, &option.id, &mut |line| vm.say(line))?,
        };
        links.push(link);
    }
    vm.power_on()?;
    // Behind the machine: who is answered finds one.
    let mut started = Vec::new();
    for (option, link) in monitors.iter().zip(links) {
        let monitor = server::start(option, link, sender.clone(), Message::Ask)
            .map_err(|error| OptionError::new(format!("cannot start a monitor: {error}")))?;
        if option.control {
            vm.bus().add(monitor.port.clone());
        }
        started.push(monitor);
    }
    watch_signals(sender)
        .map_err(|error| OptionError::new(format!("cannot watch for signals: {error}")))?;
    // A state that cannot be loaded is told to whoever waits for the background.
    let code = match vm.begin() {
        Some(code) => code,
        None => {
            if let Some(child) = background {
                child.ready()?;
            }
            vm.run()
        }
    };
    end(&started);
    Ok(code)
}

/// `-metrics`
fn serve_metrics(address: &str) -> Result<(), OptionError> {
    let wrong = |_| {
        OptionError::new(format!(
            "-metrics {address}: that is no ADDRESS:PORT, as in 127.0.0.1:9300"
        ))
    };
    let address = address.parse().map_err(wrong)?;
    let served = metrics::serve(address).map_err(|error| OptionError::new(one_line(&error)))?;
    tracing::info!("metrics: http://{served}/metrics");
    Ok(())
}

fn start_log(program: &ProgramOptions) -> Result<(), OptionError> {
    let filter = program
        .log_items
        .iter()
        .map(|item| match item.as_str() {
            "qmp" => "pando_vmm::qemu::qmp=debug",
            "migration" => "pando_vmm::qemu=debug",
            "machine" => "pando_vmm=debug",
            "pager" => "pando_pager=debug",
            _ => "debug",
        })
        .collect::<Vec<_>>()
        .join(",");
    log::start_to(program.log_file.as_deref(), &filter).map_err(|error| {
        let path = program.log_file.clone().unwrap_or_default();
        OptionError::new(format!(
            "Error opening logfile {}: {}",
            path.display(),
            reason(&error)
        ))
    })
}

fn watch_signals(sender: Sender<Message>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    // Ends with the process: it waits for a signal, which need never come.
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if sender.send(Message::Signal(signal)).is_err() {
                    break;
                }
            }
        })?;
    Ok(())
}

/// Lets monitors send what waits; one whose client does not read is not waited for long.
fn end(monitors: &[Monitor]) {
    for monitor in monitors {
        monitor.port.close();
    }
    for monitor in monitors {
        let _ = monitor.ended.recv_timeout(FLUSH);
        let dropped = monitor.port.dropped();
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "events were dropped: a monitor's client did not read"
            );
        }
    }
}

/// `-pidfile`: goes when this is dropped.
struct PidFile {
    path: PathBuf,
    /// Locked as long as this process is there, as with QEMU.
    _file: fs::File,
}

impl PidFile {
    fn write(path: &Path) -> Result<Self, OptionError> {
        let failed = |error: io::Error| {
            OptionError::new(format!(
                "cannot create PID file: Could not create '{}': {}",
                path.display(),
                reason(&error)
            ))
        };
        let mut file = fs::File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        if lock_range(&file, LockKind::Exclusive, 0, TO_THE_END).is_ok_and(|l| l == Locked::Busy) {
            return Err(OptionError::new(format!(
                "cannot create PID file: Cannot lock pid file: {} is that of a machine that is there",
                path.display()
            )));
        }
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            _file: file,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What a failure exits with.
pub const FAILED: u8 = exit::FAILED;
