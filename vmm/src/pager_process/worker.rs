#![forbid(unsafe_code)]
//! The process: serves the clients of one supervisor until that says stop, or is gone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use pando_pager::image::Index;
use pando_pager::{FaultCounts, Image};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::hub::Hub;
use super::outlet::{Form, Outlet};
use super::peer::Peer;
use super::protocol::{BEAT, FromPager, PagerStart, RawImage, ToPager};
use super::registry::PeerId;
use crate::clone::control::{Channel, MAX_DELTA_BYTES};
use crate::clone::worker::{die_with, take_channel};
use crate::host;
use crate::observe::log;
use crate::observe::relay::{Relay, split};
use crate::report::{chain, exit};
use crate::root::faults::reports;
use crate::root::worker::ignore_end_signals;
use crate::template::TemplateError;

/// Most clients of a supervisor: more than `pando clone` starts.
const MAX_CLIENTS: usize = 1 << 14;
/// More than the index of 1 TiB needs; a bound on what is read into memory.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Runs the pager whose control socket is standard input. Returns the process's exit code.
pub fn run() -> u8 {
    let channel = match take_channel() {
        Ok(channel) => channel,
        Err(error) => {
            log::start(0);
            tracing::error!("{}", chain(error.as_ref()));
            return exit::USAGE;
        }
    };
    let relay = Relay::install();
    let start = match begin(&channel) {
        Ok(Some(start)) => start,
        Ok(None) => return exit::OK,
        Err(error) => return fail(&channel, &error),
    };
    let counts = if start.counts_faults {
        FaultCounts::ByRange
    } else {
        FaultCounts::Total
    };
    let hub = match Hub::start(&start.config, MAX_CLIENTS, counts) {
        Ok(hub) => hub,
        Err(error) => return fail(&channel, &error.into()),
    };
    let outlet = Outlet::new(channel, Form::Program, Arc::clone(hub.waker()));
    let peer = Peer {
        id: PeerId(0),
        outlet: Arc::new(outlet),
    };
    match serve(hub, &peer, relay.as_ref()) {
        Ok(()) => exit::OK,
        Err(error) => fail(peer.outlet.channel(), &error),
    }
}

fn begin(channel: &Channel) -> anyhow::Result<Option<PagerStart>> {
    let Some((message, _)) = channel.receive::<ToPager>()? else {
        return Ok(None);
    };
    let ToPager::Start(start) = message else {
        bail!("the first message to a pager was not how to work");
    };
    log::start_pager(start.verbosity);
    die_with(start.supervisor_pid)?;
    ignore_end_signals()?;
    Ok(Some(start))
}

fn fail(channel: &Channel, error: &anyhow::Error) -> u8 {
    let code = match error.downcast_ref::<TemplateError>() {
        Some(error) => error.exit_code(),
        None if host::is_lacking(error.as_ref()) => exit::HOST,
        None => exit::FAILED,
    };
    let message = chain(error.as_ref());
    tracing::error!("{message}");
    // A supervisor that is gone or reads nothing needs no answer.
    let _ = channel.send_now(&FromPager::Failed { code, message }, &[]);
    code
}

fn serve(mut hub: Hub, peer: &Peer, relay: Option<&Relay>) -> anyhow::Result<()> {
    peer.outlet.tell(FromPager::Ready);
    let mut next_beat = Instant::now() + BEAT;
    loop {
        wait(&hub, peer, next_beat)?;
        hub.clear_wake();
        if let Some(why) = hub.failure() {
            bail!("{why}");
        }
        let mut is_over = false;
        let mut wrong = None;
        let is_there = peer.attend(
            |outlet| outlet.channel().receive_now::<ToPager>(),
            |message, descriptors| match message {
                ToPager::Client(order) => hub.obey(peer.id, &peer.outlet, order, descriptors),
                ToPager::Image(image) => {
                    if let Err(error) = add_image(&mut hub, &image, descriptors) {
                        wrong.get_or_insert(error);
                    }
                }
                ToPager::Stop => is_over = true,
                ToPager::Start(_) => {
                    wrong.get_or_insert(anyhow!("a pager was told twice how to work"));
                }
            },
        )?;
        if let Some(error) = wrong {
            return Err(error);
        }
        if is_over {
            drop(hub);
            return stop(peer.outlet.channel(), relay);
        }
        if !is_there {
            return Ok(());
        }
        if Instant::now() >= next_beat {
            next_beat = Instant::now() + BEAT;
            beat(&hub, &peer.outlet, relay);
        }
    }
}

fn wait(hub: &Hub, peer: &Peer, until: Instant) -> anyhow::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(1),
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut fds = [
        PollFd::from_borrowed_fd(hub.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(peer.outlet.as_fd(), peer.flags()),
    ];
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(io::Error::from(errno)).context("cannot wait for orders"),
    }
}

/// Says what was recorded, or at least that this process lives. What does not go out now is
/// recorded until it does.
fn beat(hub: &Hub, outlet: &Outlet, relay: Option<&Relay>) {
    if !outlet.is_clear() {
        return;
    }
    let mut deltas = relay.map_or_else(Vec::new, |relay| split(relay.take(), MAX_DELTA_BYTES));
    if deltas.is_empty() {
        deltas.push(Vec::new());
    }
    for delta in deltas {
        outlet.tell(FromPager::Metrics(delta));
    }
    for report in reports(&hub.take_range_faults()) {
        outlet.tell(FromPager::HoleFaults(report));
    }
}

/// Says what was recorded last. Nothing is served any more.
fn stop(channel: &Channel, relay: Option<&Relay>) -> anyhow::Result<()> {
    for delta in relay.map_or_else(Vec::new, |relay| split(relay.take(), MAX_DELTA_BYTES)) {
        channel.send(&FromPager::Metrics(delta), &[])?;
    }
    channel.send(&FromPager::Stopped, &[])?;
    Ok(())
}

fn add_image(hub: &mut Hub, raw: &RawImage, descriptors: Vec<OwnedFd>) -> anyhow::Result<()> {
    let [ram, index] = <[OwnedFd; 2]>::try_from(descriptors)
        .map_err(|fds| io::Error::other(format!("an image came with {} files", fds.len())))?;
    let index = read_index(&File::from(index), &raw.backend)
        .with_context(|| format!("the index of {} is of no use", raw.path))?;
    let path = Path::new(&raw.path);
    let image = Image::from_file(File::from(ram), path, &raw.backend, index).map_err(|source| {
        TemplateError::Image {
            path: path.to_owned(),
            source,
        }
    })?;
    hub.add_image(image, &raw.template)?;
    Ok(())
}

/// The part of one backend of an index, read from the beginning: the descriptor's position is
/// shared with others.
fn read_index(file: &File, backend: &str) -> anyhow::Result<pando_pager::image::BackendIndex> {
    let length = file.metadata()?.len();
    if length > MAX_INDEX_BYTES {
        bail!("it has {length} bytes, {MAX_INDEX_BYTES} are the limit");
    }
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, 0)?;
    let backends = Index::decode(&bytes)?.into_backends();
    let found = backends.into_iter().find(|(id, _)| id == backend);
    let (_, index) = found.with_context(|| format!("it has no backend {backend}"))?;
    Ok(index)
}
