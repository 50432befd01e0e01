#![forbid(unsafe_code)]
//! The process of one clone: takes its orders from the supervisor, runs the machine, reports.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pando_pager::{Health, Pager, Serving};
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use super::control::{
    Channel, Ending, FromWorker, MAX_MESSAGE_BYTES, Serial, ToWorker, WorkerConfig, monotonic,
};
use super::instantiate::{CloneError, Instance, instantiate};
use super::placement::Placement;
use super::{END_SIGNALS, Engine};
use crate::device::legacy::console::SerialTarget;
use crate::host;
use crate::machine::{Failure, HostCheck, MachineHandle, Outcome};
use crate::observe::log;
use crate::observe::relay::{Relay, split};
use crate::report::{chain, exit};
use crate::spec::CpuCount;
use crate::template::Template;

/// How often metrics go to the supervisor.
const METRICS_PERIOD: Duration = Duration::from_secs(1);
/// Most bytes of a delta in one message, which has a few of its own.
const MAX_DELTA_BYTES: usize = MAX_MESSAGE_BYTES - 64;

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
        Some((ToWorker::Stop, _)) | None => return Ok(Ending::Stopped),
    };
    log::start_clone(config.verbosity, config.clone);
    die_with(config.supervisor_pid)?;
    let serial = serial_target(&config.serial, descriptors)?;
    let (signals, signal_end) = UnixStream::pair().context("cannot watch for signals")?;
    for signal in END_SIGNALS {
        let end = signal_end.try_clone().context("cannot watch for signals")?;
        signal_hook::low_level::pipe::register(signal, end).context("cannot watch for signals")?;
    }
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
    let mut placement = placement(config, template);
    let Instance {
        machine,
        pager,
        stages: more,
    } = instantiate(template, config.engine, &config.pager, serial, host_check)?;
    let SoFar { began, mut stages } = so_far;
    stages.extend(more);
    let health = pager.as_ref().map(Pager::<Serving>::health);
    let io = pager
        .as_ref()
        .map_or("none", |pager| pager.io().name())
        .to_owned();
    let handle = machine.handle();
    if let Some(health) = &health {
        // Before a vCPU can touch a page that cannot be had.
        let (on_poison, on_failure) = (handle.clone(), handle.clone());
        health.set_on_poison(Box::new(move |page| on_poison.stop(page.to_string())));
        health.set_on_failure(Box::new(move |why| on_failure.stop(why)));
    }
    let resume_start = Instant::now();
    let machine = machine.resume().map_err(CloneError::from)?;
    stages.push(("resume".to_owned(), resume_start.elapsed()));
    let started = FromWorker::Started { began, stages, io };
    send(channel, &started);
    let outcome = thread::scope(|scope| {
        let (ended, ended_end) = UnixStream::pair().context("cannot watch the machine")?;
        let handle = &handle;
        let mut review = || {
            if let (Some(placement), Some(pager)) = (&mut placement, &pager) {
                placement.review(pager.counts().faults);
            }
        };
        thread::Builder::new()
            .name("attend".to_owned())
            .spawn_scoped(scope, move || {
                attend(channel, relay, handle, signals, &ended, &mut review)
            })
            .context(
                "cannot start a thread: is the limit of processes reached (ulimit -u, pids.max)?",
            )?;
        let outcome = machine.wait();
        drop(ended_end);
        anyhow::Ok(outcome)
    })?;
    if let Some(pager) = pager {
        pager.stop().map_err(CloneError::from)?;
    }
    Ok(ending(outcome, health.as_ref()))
}

/// Keeps the clone on one CPU, where that is of use: one vCPU, and a pager that it waits for.
fn placement(config: &WorkerConfig, template: &Template) -> Option<Placement> {
    let is_useful = config.pager.keep_together
        && config.engine == Engine::Copy
        && template.spec().cpus() == CpuCount::ONE;
    is_useful.then(Placement::together).flatten()
}

/// Sends metrics and reviews the clone's placement each second, and stops the machine when the supervisor says so, dies, or a signal
/// comes; returns when the other end of `ended` is closed.
fn attend(
    channel: &Channel,
    relay: Option<&Relay>,
    handle: &MachineHandle,
    signals: &UnixStream,
    ended: &UnixStream,
    review: &mut dyn FnMut(),
) {
    let mut stopping = false;
    loop {
        let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
        if !stopping {
            fds.push(PollFd::new(channel, PollFlags::IN));
            fds.push(PollFd::new(signals, PollFlags::IN));
        }
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(METRICS_PERIOD.as_secs()).unwrap_or(1),
            tv_nsec: 0,
        };
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            return;
        }
        send_metrics(channel, relay);
        review();
        if ready.get(1) == Some(&true) {
            // Whatever it says or fails to say: there is no other order than to stop.
            let _ = channel.receive::<ToWorker>();
            handle.stop("the supervisor asked for it");
            stopping = true;
        }
        if ready.get(2) == Some(&true) {
            let mut signals = signals;
            let _ = signals.read(&mut [0]);
            handle.stop("a signal asked for it");
            stopping = true;
        }
    }
}

fn ending(outcome: Outcome, health: Option<&Health>) -> Ending {
    if let Some(page) = health.and_then(|health| health.poisoned().into_iter().next()) {
        return Ending::Failed {
            code: exit::MEMORY,
            message: format!("guest memory could not be read: {page}"),
        };
    }
    if let Some(why) = health.and_then(Health::failure) {
        let message = format!("the clone's pager failed: {why}");
        return Ending::Failed {
            code: exit::MEMORY,
            message,
        };
    }
    match outcome {
        Outcome::PowerOff => Ending::PowerOff,
        Outcome::Reset => Ending::Reset,
        Outcome::Stopped => Ending::Stopped,
        Outcome::Failed(failure) => Ending::Failed {
            code: match failure {
                Failure::MemoryError { .. } => exit::MEMORY,
                _ => exit::FAILED,
            },
            message: failure.to_string(),
        },
    }
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
fn take_channel() -> anyhow::Result<Channel> {
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
fn die_with(supervisor_pid: u32) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(io::Error::from)
        .context("cannot tie the clone to its supervisor")?;
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if u32::try_from(parent) != Ok(supervisor_pid) {
        bail!("the supervisor, process {supervisor_pid}, is gone");
    }
    Ok(())
}

fn serial_target(serial: &Serial, descriptors: Vec<OwnedFd>) -> anyhow::Result<SerialTarget> {
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

/// Sends what was recorded since the last time, in as many messages as it takes; none for nothing.
fn send_metrics(channel: &Channel, relay: Option<&Relay>) {
    for delta in relay.map_or_else(Vec::new, |relay| split(relay.take(), MAX_DELTA_BYTES)) {
        send(channel, &FromWorker::Metrics(delta));
    }
}

fn send(channel: &Channel, message: &FromWorker) {
    // A supervisor that is gone takes this process along; there is nobody else to tell.
    if let Err(error) = channel.send(message, &[]) {
        tracing::debug!("{}", chain(&error));
    }
}
