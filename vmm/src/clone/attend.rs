#![forbid(unsafe_code)]
//! A clone from its resumption to its end: metrics out, orders and signals in.

use std::cell::Cell;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use pando_pager::{Health, Pager, Serving};
use rustix::event::{PollFd, PollFlags};

use super::END_SIGNALS;
use super::control::{Channel, Ending, FromWorker, MAX_DELTA_BYTES, ToWorker};
use super::give_back::keeper::Keeper;
use super::give_back::running::{Asking, Running};
use super::instantiate::{CloneError, Paging};
use super::placement::{Placement, resident_pages};
use super::record::{self, Recorded};
use crate::machine::{self, Failure, Machine, MachineHandle, Outcome, Paused};
use crate::memory::guest::GuestRam;
use crate::observe::metrics::Judged;
use crate::observe::relay::{Relay, split};
use crate::report::{chain, exit};
use crate::root::faults::reports;

/// How often metrics go to the supervisor.
const METRICS_PERIOD: Duration = Duration::from_secs(1);

/// What to say when a thread cannot be made.
const NO_THREAD: &str =
    "cannot start a thread: is the limit of processes reached (ulimit -u, pids.max)?";

/// What a clone that is ready to run, or runs, has beside its machine.
pub(super) struct Ready<'a> {
    pub(super) channel: &'a Channel,
    pub(super) relay: Option<&'a Relay>,
    /// Who brings missing pages.
    pub(super) paging: Paging,
    pub(super) placement: Option<Placement>,
    /// Where what it touches is recorded.
    pub(super) record: Option<Recorded<'a>>,
    /// Who has it give memory back when it is idle.
    pub(super) keeper: Option<Keeper>,
    /// When this process's own code began, on the monotonic clock.
    pub(super) began: Duration,
    /// How long each step took so far.
    pub(super) stages: Vec<(String, Duration)>,
}

/// Readable once one of [`END_SIGNALS`] came.
pub(super) fn watch_signals() -> anyhow::Result<UnixStream> {
    let (signals, signal_end) = UnixStream::pair().context("cannot watch for signals")?;
    for signal in END_SIGNALS {
        let end = signal_end.try_clone().context("cannot watch for signals")?;
        signal_hook::low_level::pipe::register(signal, end).context("cannot watch for signals")?;
    }
    Ok(signals)
}

/// Has the machine end when its pager cannot go on: before a vCPU can touch a page that cannot be
/// had.
pub(super) fn stop_with(pager: Option<&Pager<Serving>>, handle: &MachineHandle) {
    if let Some(health) = pager.map(Pager::<Serving>::health) {
        let (on_poison, on_failure) = (handle.clone(), handle.clone());
        health.set_on_poison(Box::new(move |page| on_poison.stop(page.to_string())));
        health.set_on_failure(Box::new(move |why| on_failure.stop(why)));
    }
}

/// Lets the guest run until it ends or is stopped. `signals` is that of [`watch_signals`].
pub(super) fn run_to_end(
    machine: Machine<Paused>,
    mut ready: Ready<'_>,
    signals: &UnixStream,
) -> anyhow::Result<Ending> {
    stop_with(ready.paging.own(), &machine.handle());
    let resume_start = Instant::now();
    let machine = machine.resume().map_err(CloneError::from)?;
    let took = resume_start.elapsed();
    ready.stages.push(("resume".to_owned(), took));
    watch_to_end(machine, ready, signals)
}

/// Watches over a guest that runs until it ends or is stopped.
pub(super) fn watch_to_end(
    machine: Machine<machine::Running>,
    ready: Ready<'_>,
    signals: &UnixStream,
) -> anyhow::Result<Ending> {
    let Ready {
        channel,
        relay,
        paging,
        mut placement,
        record,
        mut keeper,
        began,
        stages,
    } = ready;
    let health = paging.own().map(Pager::<Serving>::health);
    let io = paging.io().to_owned();
    let handle = machine.handle();
    let places = machine.ram().places();
    // Kept beyond the machine's end, to see what was written.
    let ram = machine.shared_ram();
    let resumed = Instant::now();
    let started = FromWorker::Started {
        began,
        stages,
        io,
        places,
    };
    send(channel, &started);
    let (ended, ended_end) = UnixStream::pair().context("cannot watch the machine")?;
    let ended = &ended;
    let mut given = 0;
    let outcome = thread::scope(|scope| {
        let handle = &handle;
        let mut review = || {
            report_faults(channel, &paging);
            match (&mut placement, &paging) {
                (Some(placement), Paging::Own(pager)) => placement.review(pager.counts().faults),
                (Some(placement), Paging::Shared) => placement.review_pages(),
                (_, Paging::None) | (None, _) => (),
            }
            if let Some(record) = &record
                && record.is_due(resumed.elapsed())
            {
                tell(channel, record, paging.own(), &ram);
            }
            let (orders, is_stopped) = (Cell::new(given), Cell::new(false));
            if let Some(keeper) = &mut keeper {
                let mut clone = Running {
                    handle,
                    paging: &paging,
                    backings: ram.first_backings(),
                    asking: Asking {
                        channel,
                        orders: &orders,
                        is_stopped: &is_stopped,
                    },
                };
                give_back(keeper, &mut clone);
            }
            given = orders.get();
            is_stopped.get()
        };
        thread::Builder::new()
            .name("attend".to_owned())
            .spawn_scoped(scope, move || {
                attend(channel, relay, handle, signals, ended, &mut review)
            })
            .context(NO_THREAD)?;
        let run = record.as_ref().and_then(Recorded::run);
        if let (Some(recording), Some(pager)) = (run, paging.own()) {
            let watch = move || record::watch(recording, pager, handle, ended);
            let thread = thread::Builder::new().name("record".to_owned());
            thread.spawn_scoped(scope, watch).context(NO_THREAD)?;
        }
        let outcome = machine.wait();
        drop(ended_end);
        anyhow::Ok(outcome)
    })?;
    let ending = ending(outcome, health.as_ref());
    if let Some(record) = &record
        && ending.exit_code() == exit::OK
    {
        tell(channel, record, paging.own(), &ram);
    }
    report_faults(channel, &paging);
    if let Paging::Own(pager) = paging {
        pager.stop().map_err(CloneError::from)?;
    }
    Ok(ending)
}

/// Has the clone give memory back if it is idle.
fn give_back(keeper: &mut Keeper, clone: &mut Running<'_>) {
    let faults = match clone.paging {
        Paging::Own(pager) => pager.counts().faults,
        // Its own process does not see them; but pages that come in show.
        Paging::Shared => resident_pages().unwrap_or(0),
        Paging::None => return,
    };
    let given = keeper.review(faults, clone);
    if given.given_bytes > 0 {
        let gave = FromWorker::GaveBack {
            bytes: given.given_bytes,
            pauses: given.pauses,
        };
        send(clone.asking.channel, &gave);
    }
}

/// Says what the pager of a fork counted in holes of its root: nothing, where it does not count.
fn report_faults(channel: &Channel, paging: &Paging) {
    if let Some(pager) = paging.own() {
        for report in reports(&pager.take_range_faults()) {
            send(channel, &FromWorker::HoleFaults(report));
        }
    }
}

/// Sends what a recorded clone touched, the first time.
fn tell(channel: &Channel, record: &Recorded<'_>, pager: Option<&Pager<Serving>>, ram: &GuestRam) {
    let Some(lesson) = record.tell(pager, ram) else {
        return;
    };
    for piece in lesson.pieces {
        send(channel, &FromWorker::Touched(piece));
    }
    if lesson.judged != Judged::default() {
        send(channel, &FromWorker::Judged(lesson.judged));
    }
}

/// Sends metrics and reviews the clone's placement each second, and stops the machine when the supervisor says so, dies, or a signal
/// comes; returns when the other end of `ended` is closed. `review` says whether an order to stop came meanwhile.
fn attend(
    channel: &Channel,
    relay: Option<&Relay>,
    handle: &MachineHandle,
    signals: &UnixStream,
    ended: &UnixStream,
    review: &mut dyn FnMut() -> bool,
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
        let is_told = ready.get(1) == Some(&true) && {
            // Whatever else it says or fails to say is an order to stop.
            let message = channel.receive::<ToWorker>();
            !matches!(message, Ok(Some((ToWorker::Forgotten { .. }, _))))
        };
        if is_told || (!stopping && review()) {
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

/// Sends what was recorded since the last time, in as many messages as it takes; none for nothing.
pub(super) fn send_metrics(channel: &Channel, relay: Option<&Relay>) {
    for delta in relay.map_or_else(Vec::new, |relay| split(relay.take(), MAX_DELTA_BYTES)) {
        send(channel, &FromWorker::Metrics(delta));
    }
}

pub(super) fn send(channel: &Channel, message: &FromWorker) {
    // A supervisor that is gone takes this process along; there is nobody else to tell.
    if let Err(error) = channel.send(message, &[]) {
        tracing::debug!("{}", chain(&error));
    }
}
