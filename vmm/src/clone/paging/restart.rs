#![forbid(unsafe_code)]
//! The pager process comes, goes, and comes again.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use super::super::Engine;
use super::super::control::PagerPlace;
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

/// Why there is no pager process.
pub(super) enum CannotStart {
    /// It is worth another try, soon: this process or the host lacks something for the moment.
    Now(String),
    /// It is not.
    Ever(GivenUp),
}

impl SharedPaging {
    /// Counts a start; an error when there were too many.
    fn note_start(&mut self) -> Result<(), String> {
        let now = Instant::now();
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
        self.starts.push_back(now);
        self.unready += 1;
        Ok(())
    }
}

impl Supervisor {
    /// Has the pager process started before the first clone needs it. What goes wrong is the first
    /// clone's to tell.
    pub(in crate::clone) fn prepare_paging(&mut self) {
        if self.options.pager.place == PagerPlace::Shared
            && self.paging.process.is_none()
            && self.paging.given_up.is_none()
            && let Err(CannotStart::Now(message) | CannotStart::Ever(GivenUp { message, .. })) =
                self.start_pager()
        {
            tracing::warn!("{message}");
        }
    }

    pub(super) fn start_pager(&mut self) -> Result<(), CannotStart> {
        self.paging.note_start().map_err(|message| {
            CannotStart::Ever(GivenUp {
                code: exit::MEMORY,
                message,
            })
        })?;
        let template = match self.paging.template.take() {
            Some(template) => template,
            None => ServedTemplate::open(&self.options.template).map_err(|error| {
                CannotStart::Ever(GivenUp {
                    code: error.exit_code(),
                    message: chain(&error),
                })
            })?,
        };
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
        self.paging.silence.heard();
        Ok(())
    }

    /// Starts the pager that clients wait for; gives up if that will never be.
    fn start_again(&mut self) {
        match self.start_pager() {
            Ok(()) => self.send_clients(),
            Err(CannotStart::Now(message)) => tracing::warn!("the pager is tried again: {message}"),
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
        self.start_again();
    }

    /// Ends it, and takes its share out of all gauges. Its clients wait for another.
    pub(super) fn drop_pager(&mut self) {
        let paging = &mut self.paging;
        if let Some(process) = paging.process.take() {
            let _ = epoll::delete(&self.epoll, process.channel());
        }
        self.forget_nothing();
        let paging = &mut self.paging;
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
            let last = self.paging.starts.back();
            let is_due = last.is_none_or(|last| last.elapsed() > PAUSE);
            if is_due && !self.paging.clients.is_empty() && !self.paging.is_ended {
                self.start_again();
            }
            return;
        }
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
                return;
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
    }
}
