#![forbid(unsafe_code)]
//! The pager process comes, goes, and comes again.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use super::super::Engine;
use super::super::control::PagerPlace;
use super::super::process::ChildProcess;
use super::super::supervise::Supervisor;
use super::super::token;
use super::{GivenUp, SharedPaging};
use crate::observe::metrics;
use crate::observe::relay::{Change, Delta, replay};
use crate::pager_process::process::{PagerProcess, ServedTemplate};
use crate::pager_process::protocol::PagerStart;
use crate::report::{chain, exit};

/// A pager that died is replaced this often ...
const RESTART_LIMIT: usize = 300;
/// ... in this time. A clone sleeps some milliseconds for each, so this is generous: what it bounds
/// is a pager that dies of its clients, again and again.
const RESTART_WINDOW: Duration = Duration::from_secs(60);
/// Pagers in a row that die before they are ready: what kills them is no accident.
const UNREADY_LIMIT: usize = 50;
/// A pager says something each second; one that has been silent for so long is stopped or hangs.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long a pager may take to say what it recorded last.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A start that failed is tried again after so long.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts that fail in a row, one for each [`PAUSE`]: what is lacking does not come.
const FAILED_LIMIT: usize = 300;

/// A pager that was killed and has not ended after so long may never: its disk does not answer.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A pager that was killed and has not ended.
#[derive(Debug)]
pub(super) struct Ending {
    process: ChildProcess,
    since: Instant,
}

/// Why there is no pager process.
pub(super) enum CannotStart {
    /// It is worth another try, soon: this process or the host lacks something for the moment.
    Now(String),
    /// It is not.
    Ever(GivenUp),
}

impl SharedPaging {
    /// An error when too many were started.
    fn may_start(&mut self, now: Instant) -> Result<(), String> {
        while self
            .starts
            .front()
            .is_some_and(|then| now.saturating_duration_since(*then) > RESTART_WINDOW)
        {
            self.starts.pop_front();
        }
        if self.starts.len() >= RESTART_LIMIT {
            let seconds = RESTART_WINDOW.as_secs();
            return Err(format!(
                "the pager process ended {RESTART_LIMIT} times within {seconds} s; its log says why"
            ));
        }
        if self.unready >= UNREADY_LIMIT {
            return Err(format!(
                "the pager process ended {UNREADY_LIMIT} times before it was ready; its log says why"
            ));
        }
        Ok(())
    }

    /// Whether it was tried a moment ago to start one.
    pub(super) fn rests(&self) -> bool {
        self.tried.is_some_and(|last| last.elapsed() < PAUSE)
    }

    /// How long until a pager is to be started that somebody waits for, or the end of the last one is
    /// looked for.
    pub(in crate::clone) fn wait_at_most(&self) -> Option<Duration> {
        let is_wanted = self.process.is_none() && !self.clients.is_empty();
        is_wanted.then_some(PAUSE)
    }

    /// Whether the pager that was killed last takes nothing more.
    fn last_has_ended(&mut self) -> bool {
        let ending = self.ending.as_mut();
        if ending.is_some_and(|ending| ending.process.has_ended()) {
            self.ending = None;
            if std::mem::take(&mut self.is_stuck) {
                self.given_up = None;
            }
        }
        self.ending.is_none()
    }

    /// The number of a pager that does not end, though it was killed long ago.
    fn stuck(&self) -> Option<u32> {
        let ending = self.ending.as_ref()?;
        (ending.since.elapsed() > END_LIMIT).then(|| ending.process.pid())
    }
}

impl Supervisor {
    /// Has the pager process started before the first clone needs it. What goes wrong is the first
    /// clone's to tell.
    pub(in crate::clone) fn prepare_paging(&mut self) {
        if self.options.pager.place == PagerPlace::Shared
            && self.paging.process.is_none()
            && self.paging.given_up.is_none()
            && !self.paging.rests()
            && let Err(CannotStart::Now(message) | CannotStart::Ever(GivenUp { message, .. })) =
                self.start_pager()
        {
            tracing::warn!("{message}");
        }
    }

    pub(super) fn start_pager(&mut self) -> Result<(), CannotStart> {
        if !self.paging.last_has_ended() {
            return Err(CannotStart::Now("the last pager has not ended".to_owned()));
        }
        let now = Instant::now();
        self.paging.may_start(now).map_err(|message| {
            CannotStart::Ever(GivenUp {
                code: exit::MEMORY,
                message,
            })
        })?;
        self.paging.tried = Some(now);
        let template = match self.paging.template.take() {
            Some(template) => template,
            None => ServedTemplate::open(&self.options.template).map_err(|error| {
                let refusal = GivenUp {
                    code: error.exit_code(),
                    message: chain(&error),
                };
                self.paging.refusal = Some(refusal.clone());
                CannotStart::Ever(refusal)
            })?,
        };
        self.paging.failed += 1;
        let start = PagerStart {
            config: self.options.pager.clone(),
            supervisor_pid: std::process::id(),
            verbosity: self.options.verbosity,
            counts_faults: self.options.engine == Engine::Root,
        };
        let started = PagerProcess::start(&self.options.program, start, &template);
        self.paging.template = Some(template);
        let process = started.map_err(|error| CannotStart::Now(chain(&error)))?;
        self.watch(process.channel(), token::PAGER)
            .map_err(|error| {
                CannotStart::Now(format!("cannot watch the pager process: {error}"))
            })?;
        self.paging.process = Some(process);
        self.paging.failed = 0;
        self.paging.starts.push_back(now);
        self.paging.unready += 1;
        self.paging.silence.heard();
        Ok(())
    }

    /// Starts the pager that clients wait for; gives up if that will never be.
    fn start_again(&mut self) {
        match self.start_pager() {
            Ok(()) => self.send_clients(),
            Err(CannotStart::Now(message)) if self.paging.failed >= FAILED_LIMIT => {
                self.give_up(&GivenUp {
                    code: exit::MEMORY,
                    message: format!("the pager process cannot be started: {message}"),
                });
            }
            Err(CannotStart::Now(message)) if self.paging.failed.is_power_of_two() => {
                tracing::warn!("the pager is tried again: {message}");
            }
            Err(CannotStart::Now(_)) => (),
            Err(CannotStart::Ever(given_up)) => self.give_up(&given_up),
        }
    }

    /// The pager is gone; its clients are not. They are attached to the next one.
    pub(super) fn lose_pager(&mut self, why: &str) {
        self.drop_pager();
        if self.paging.is_ended {
            return;
        }
        let clients = self.paging.clients.len();
        tracing::warn!(clients, "the pager process is lost: {why}");
        self.paging.restarts += 1;
        metrics::count_pager_restart(&self.options.name);
        if self.paging.last_has_ended() {
            self.start_again();
        }
    }

    /// Ends it, and takes its share out of all gauges. Its clients wait for another.
    pub(super) fn drop_pager(&mut self) {
        let paging = &mut self.paging;
        if let Some(process) = paging.process.take() {
            let _ = epoll::delete(&self.epoll, process.channel());
            let process = process.into_process();
            process.kill();
            let since = Instant::now();
            paging.ending = Some(Ending { process, since });
        }
        // Whoever waits for it hears of its end as of a message.
        if let Some(Ending { process, .. }) = &self.paging.ending
            && let Err(error) = self.watch(process.as_fd(), token::PAGER)
        {
            tracing::debug!(%error, "the pager's end is looked for");
        }
        self.forget_nothing();
        let paging = &mut self.paging;
        paging.abandoned.clear();
        paging.io = None;
        paging.sent.clear();
        paging.waiting = paging.clients.keys().copied().collect();
        let zeros: Delta = paging
            .gauges
            .keys()
            .map(|series| (series.clone(), Change::Gauge(0.0)))
            .collect();
        let gauges = &paging.gauges;
        replay(&zeros, |series, _| {
            gauges.get(series).copied().unwrap_or(0.0)
        });
        paging.gauges.clear();
    }

    /// Ends all clients by name, those to come too.
    pub(super) fn give_up(&mut self, why: &GivenUp) {
        tracing::error!("{}", why.message);
        self.paging.given_up = Some(why.clone());
        let clients = std::mem::take(&mut self.paging.clients);
        self.paging.numbers.clear();
        self.paging.waiting.clear();
        for client in clients.values() {
            let message = format!("its memory cannot be served: {}", why.message);
            self.end_owner(client.owner, why.code, &message);
        }
    }

    /// Looks after the pager, when nothing more urgent is to be done.
    pub(in crate::clone) fn tend_paging(&mut self) {
        if self.paging.process.is_none() {
            let was_ending = self.paging.ending.is_some();
            if !self.paging.last_has_ended() {
                return self.give_up_if_stuck();
            }
            let is_due = was_ending || !self.paging.rests();
            if is_due && !self.paging.clients.is_empty() && !self.paging.is_ended {
                self.start_again();
            }
            return;
        }
        self.end_abandoned();
        if self.paging.silence.look() > SILENCE_LIMIT {
            // What it said meanwhile may wait to be heard.
            self.hear_pager();
        }
        if self.paging.silence.look() > SILENCE_LIMIT {
            let pid = self.paging.pid().unwrap_or(0);
            let seconds = SILENCE_LIMIT.as_secs();
            self.lose_pager(&format!(
                "process {pid} has said nothing for {seconds} s (is it stopped?), so it was ended"
            ));
        }
        self.send_clients();
    }

    /// Ends the pager when all clones have ended, and hears what it recorded last.
    pub(in crate::clone) fn end_paging(&mut self) {
        self.paging.is_ended = true;
        let is_asked = self
            .paging
            .process
            .as_ref()
            .is_some_and(PagerProcess::ask_to_stop);
        let deadline = Instant::now() + LAST_WORDS;
        while is_asked && Instant::now() < deadline {
            let Some(process) = &self.paging.process else {
                break;
            };
            let mut fds = [PollFd::from_borrowed_fd(process.channel(), PollFlags::IN)];
            let pause = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            let _ = poll(&mut fds, Some(&pause));
            self.hear_pager();
        }
        self.drop_pager();
        let deadline = Instant::now() + LAST_WORDS;
        while !self.paging.last_has_ended() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(Ending { process, .. }) = self.paging.ending.take() {
            let pid = process.pid();
            tracing::warn!(
                pid,
                "the pager process was killed and has not ended: it is left"
            );
            process.leave();
        }
    }

    /// A pager that does not end keeps what it has of its clients: no other can serve them.
    fn give_up_if_stuck(&mut self) {
        let Some(pid) = self
            .paging
            .stuck()
            .filter(|_| self.paging.given_up.is_none())
        else {
            return;
        };
        let seconds = END_LIMIT.as_secs();
        let message = format!(
            "the pager process {pid} was killed and has not ended for {seconds} s (does its disk answer?)"
        );
        self.give_up(&GivenUp {
            code: exit::MEMORY,
            message,
        });
        self.paging.is_stuck = true;
    }
}
