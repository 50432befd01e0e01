#![forbid(unsafe_code)]
//! The process of one clone: takes its orders from the supervisor, runs the machine, reports.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;

use super::Engine;
use super::attend::{Ready, run_to_end, send, send_metrics, watch_signals};
use super::control::{Channel, Ending, FromWorker, Serial, ToWorker, WorkerConfig, monotonic};
use super::instantiate::{CloneError, Handover, Instance, inflate, instantiate, keeper};
use super::nets;
use super::placement::Placement;
use super::record::Recorded;
use crate::device::legacy::console::SerialTarget;
use crate::host;
use crate::machine::HostCheck;
use crate::observe::log;
use crate::observe::relay::Relay;
use crate::report::{chain, exit};
use crate::spec::CpuCount;
use crate::template::Template;

/// Runs a clone whose control socket is standard input. Returns the process's exit code.
pub fn run() -> u8 {
    let began = monotonic();
    let channel = match take_channel() {
        Ok(channel) => channel,
        Err(error) => {
            log::start(0);
            tracing::error!("{}", chain(error.as_ref()));
            return exit::USAGE;
        }
    };
    let relay = Relay::install();
    let ending = work(&channel, relay.as_ref(), began).unwrap_or_else(|error| Ending::Failed {
        code: exit_code(&error),
        message: chain(error.as_ref()),
    });
    let code = ending.exit_code();
    send_metrics(&channel, relay.as_ref());
    send(&channel, &FromWorker::Ended(ending));
    code
}

fn work(channel: &Channel, relay: Option<&Relay>, began: Duration) -> anyhow::Result<Ending> {
    let (config, descriptors) = match channel.receive::<ToWorker>()? {
        Some((ToWorker::Start(config), descriptors)) => (config, descriptors),
        Some((ToWorker::Stop | ToWorker::Forgotten { .. }, _)) | None => {
            return Ok(Ending::Stopped);
        }
    };
    log::start_clone(config.verbosity, config.clone);
    die_with(config.supervisor_pid)?;
    let serial = serial_target(&config.serial, descriptors)?;
    let signals = watch_signals()?;
    let orders = monotonic().saturating_sub(began);
    let mut stages = vec![("orders".to_owned(), orders)];
    let template_start = Instant::now();
    let template = Template::open(&config.template).map_err(CloneError::from)?;
    stages.push(("template".to_owned(), template_start.elapsed()));
    let so_far = SoFar { began, stages };
    run_instance(channel, relay, &config, &template, serial, so_far, &signals)
}

/// The start of a clone until its template was open.
struct SoFar {
    /// When this process's own code began, on the monotonic clock.
    began: Duration,
    stages: Vec<(String, Duration)>,
}

fn run_instance(
    channel: &Channel,
    relay: Option<&Relay>,
    config: &WorkerConfig,
    template: &Template,
    serial: SerialTarget,
    so_far: SoFar,
    signals: &UnixStream,
) -> anyhow::Result<Ending> {
    let host_check = if config.host_check_is_due {
        HostCheck::Due
    } else {
        HostCheck::Done
    };
    let placement = placement(config, template);
    let handover = Handover {
        channel,
        cpu: placement.as_ref().and_then(Placement::cpu),
    };
    let Instance {
        machine,
        paging,
        brought,
        stages: more,
    } = instantiate(
        template,
        config.engine,
        &config.pager,
        config.record,
        nets::connections(template, config, serial)?,
        host_check,
        handover,
    )?;
    inflate(&machine.handle(), &config.pager)?;
    let keeper = keeper(&config.pager);
    let SoFar { began, mut stages } = so_far;
    stages.extend(more);
    let ready = Ready {
        channel,
        relay,
        paging,
        placement,
        record: config
            .record
            .map(|record| Recorded::new(record, template, brought)),
        keeper,
        began,
        stages,
    };
    run_to_end(machine, ready, signals)
}

/// Keeps the clone on one CPU, where that is of use: one vCPU, and a pager that it waits for.
fn placement(config: &WorkerConfig, template: &Template) -> Option<Placement> {
    let is_useful = config.pager.keep_together
        && config.engine == Engine::Copy
        && template.spec().cpus() == CpuCount::ONE;
    is_useful.then(Placement::together).flatten()
}

/// The exit code for an error that kept a clone from running.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<CloneError>() {
        Some(CloneError::Template(error)) => error.exit_code(),
        Some(error) if host::is_lacking(error) => exit::HOST,
        _ => exit::FAILED,
    }
}

/// Keeps the control socket and gives standard input back to nobody.
pub fn take_channel() -> anyhow::Result<Channel> {
    let stdin = rustix::stdio::stdin();
    if !rustix::net::sockopt::socket_type(stdin)
        .is_ok_and(|kind| kind == rustix::net::SocketType::SEQPACKET)
    {
        bail!("this command is started by `pando clone` and is of no use by itself");
    }
    let channel = rustix::io::fcntl_dupfd_cloexec(stdin, 3).map_err(io::Error::from)?;
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).map_err(io::Error::from)?;
    Ok(Channel::new(channel))
}

/// Has the kernel end this process when its parent ends, and checks that it has not already.
pub fn die_with(supervisor_pid: u32) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(io::Error::from)
        .context("cannot tie this process to its supervisor")?;
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if u32::try_from(parent) != Ok(supervisor_pid) {
        bail!("the supervisor, process {supervisor_pid}, is gone");
    }
    Ok(())
}

pub(super) fn serial_target(
    serial: &Serial,
    descriptors: Vec<OwnedFd>,
) -> anyhow::Result<SerialTarget> {
    let mut descriptors = descriptors.into_iter();
    Ok(match serial {
        Serial::Null => SerialTarget::Null,
        Serial::Unix(path) => SerialTarget::Unix(path.clone()),
        Serial::Passed => SerialTarget::Fd(descriptors.next().context("no serial socket came")?),
        Serial::Terminal => {
            let input = descriptors.next().context("no terminal came")?;
            let output = descriptors.next().context("no terminal came")?;
            rustix::stdio::dup2_stdin(&input).map_err(io::Error::from)?;
            rustix::stdio::dup2_stdout(&output).map_err(io::Error::from)?;
            SerialTarget::Stdio
        }
    })
}
