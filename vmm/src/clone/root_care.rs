#![forbid(unsafe_code)]
//! What the supervisor does for a root and its pool when nobody is served by it: a root that says
//! nothing is replaced, shells are made and ended.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::forks::Purpose;
use super::member::Event;
use super::paging::Owner;
use super::process::ChildProcess;
use super::supervise::{SuperviseError, Supervisor};

/// A root that does not answer for this long is replaced, unless the options say otherwise. It does
/// nothing between two words that takes more than some milliseconds, on a disk that answers.
pub const FORK_DEADLINE: Duration = Duration::from_secs(10);
/// A root that is not ready and says nothing for this long is replaced: until it has opened its
/// template nothing tells how far it is.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// How long after a start the pool waits with making a shell: the guest's first work comes first.
const REFILL_REST: Duration = Duration::from_millis(3);
/// A pool that has been too small for this long is filled although clones are starting.
const REFILL_PATIENCE: Duration = Duration::from_millis(200);
/// How long filling the pool for the first time may take.
const WARM_UP_LIMIT: Duration = Duration::from_secs(120);

/// When a pool may be refilled.
#[derive(Debug, Default)]
pub(super) struct Refill {
    /// Clones that were asked for and have not started.
    pub(super) starting: std::collections::HashSet<usize>,
    /// When the last of them had.
    last_start: Option<Instant>,
    /// Since when the pool has been too small.
    short_since: Option<Instant>,
}

impl Refill {
    /// A clone that was asked for has started, or never will.
    pub(super) fn has_started(&mut self, clone: usize) {
        if self.starting.remove(&clone) {
            self.last_start = Some(Instant::now());
        }
    }

    /// Whether a shell may be made at `now`, for a pool that is too small or not.
    pub(super) fn may_begin(&mut self, is_short: bool, now: Instant) -> bool {
        if !is_short {
            self.short_since = None;
            return false;
        }
        let since = *self.short_since.get_or_insert(now);
        let age = |then: Instant| now.saturating_duration_since(then);
        let is_calm =
            self.starting.is_empty() && self.last_start.is_none_or(|then| age(then) >= REFILL_REST);
        is_calm || age(since) >= REFILL_PATIENCE
    }
}

impl Supervisor {
    /// Keeps the pool at its level, when nothing more urgent is to be done.
    pub(super) fn tend_forks(&mut self) {
        self.check_root();
        self.take_strays();
        self.reap_shells();
        self.tell_hole_faults();
        let limits = self.options.root.shells;
        let forks = &mut self.forks;
        forks.is_short = false;
        if forks.is_ended || limits.ceiling == 0 || !forks.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let target = forks.demand.target(limits, now);
        let coming = forks.shells.len() + forks.flying.len();
        let is_short = coming < target;
        if forks.refill.may_begin(is_short, now) {
            forks.waiting.push_back(Purpose::Shell);
            self.send_forks();
        } else if self.forks.warm() > target
            && let Some(shell) = self.forks.take_warm()
        {
            self.usage.unmade();
            self.paging.forget(Owner::Shell(shell.id));
            let _ = rustix::event::epoll::delete(&self.epoll, shell.channel.as_fd());
            self.end_shell(shell.process);
        } else {
            self.forks.is_short = is_short;
        }
    }

    /// Replaces a root that owes an answer and says nothing.
    pub(super) fn check_root(&mut self) {
        if !self.owes_answer() {
            self.forks.silence.heard();
            return;
        }
        let silent = self.forks.silence.look();
        if silent < self.answer_limit() {
            return;
        }
        let pid = self.forks.root_pid().unwrap_or_default();
        let flying = self.forks.flying.len();
        self.lose_root(&format!(
            "process {pid} said nothing for {:.1} s with {flying} forks under way: was it stopped, \
             or does its disk not answer? another one takes its place",
            silent.as_secs_f64()
        ));
    }

    /// Whether the root is to say something: that it is ready, or that it forked.
    fn owes_answer(&self) -> bool {
        let forks = &self.forks;
        forks.root.is_some() && (!forks.is_ready || !forks.flying.is_empty())
    }

    fn answer_limit(&self) -> Duration {
        if self.forks.is_ready {
            self.options.root.fork_deadline.unwrap_or(FORK_DEADLINE)
        } else {
            READY_DEADLINE
        }
    }

    /// How long to wait for events at most, so that what has its time is done in time.
    pub(super) fn wait_at_most(&self, timeout: Duration) -> Duration {
        let silence = self.owes_answer().then(|| self.answer_limit());
        let refill = self.forks.is_short.then_some(REFILL_REST);
        let paging = self.paging.wait_at_most();
        let all = [silence, refill, paging].into_iter().flatten();
        all.fold(timeout, Duration::min)
    }

    /// Ends a process that waited for a clone to be asked for; its end is taken later.
    pub(super) fn end_shell(&mut self, process: ChildProcess) {
        process.kill();
        self.forks.dying.push(process);
    }

    /// Takes the ends of shells that have ended meanwhile.
    pub(super) fn reap_shells(&mut self) {
        self.forks.dying.retain_mut(|process| !process.has_ended());
    }

    /// Engine `root`: has the root made and waits until as many shells are warm as wait without
    /// demand. What goes wrong is the first clone's to tell.
    pub fn warm_up(&mut self) -> Result<(), SuperviseError> {
        let begun = Instant::now();
        let mut events = Vec::new();
        self.prepare();
        while self.forks.root.is_some()
            && self.forks.warm() < self.options.root.shells.floor
            && !events.contains(&Event::Signal)
        {
            if begun.elapsed() > WARM_UP_LIMIT {
                tracing::warn!(warm = self.forks.warm(), "the pool does not fill");
                break;
            }
            events.append(&mut self.wait(Duration::from_millis(100))?);
        }
        self.pending.append(&mut events);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_refilled_when_it_is_calm_or_was_too_small_for_long() {
        let mut refill = Refill::default();
        let now = Instant::now();
        assert!(!refill.may_begin(false, now));
        assert!(refill.may_begin(true, now));
        refill.starting.insert(3);
        assert!(!refill.may_begin(true, now + REFILL_REST));
        assert!(refill.may_begin(true, now + REFILL_PATIENCE));
        refill.has_started(3);
        let started = Instant::now();
        assert!(!refill.may_begin(false, started));
        assert!(!refill.may_begin(true, started));
        assert!(refill.may_begin(true, started + REFILL_REST));
    }
}
