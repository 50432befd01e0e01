#![forbid(unsafe_code)]
//! The end of a clone, as its supervisor sees to it.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::control::{Ending, FromWorker};
use super::member::Event;
use super::paging::Owner;
use super::supervise::Supervisor;
use crate::observe::metrics;
use crate::observe::relay::{Change, Delta, replay};
use crate::report::exit;

impl Supervisor {
    /// Ends a clone for a reason that it need not know of; [`Self::wait`] tells of its end.
    pub(super) fn condemn(&mut self, number: usize, code: u8, message: &str) {
        let Some(clone) = self.clones.get_mut(number) else {
            return;
        };
        // One that met the page that could not be had can say less of it.
        let knows_less =
            matches!(&clone.ending, Some(Ending::Failed { code, .. }) if *code == exit::MEMORY);
        if clone.is_condemned || (clone.ending.is_some() && !(knows_less && code == exit::MEMORY)) {
            return;
        }
        let message = message.to_owned();
        clone.ending = Some(Ending::Failed { code, message });
        clone.is_condemned = true;
        if let Some(process) = &clone.process {
            process.kill();
        }
    }

    /// Takes leave of a clone whose process ended: what it said last, its exit, its gauges.
    pub(super) fn bury(&mut self, number: usize) -> Event {
        // Which page could not be had is the pager's to say, and it said so first.
        self.hear_pager();
        while let Some(process) = self.clones[number].process.as_ref()
            && let Ok(Some((message, _))) = process.channel.receive::<FromWorker>()
        {
            self.hear(number, message);
        }
        let clone = &mut self.clones[number];
        if let Some(mut process) = clone.process.take() {
            let unsaid = process.reap();
            if (clone.ending.is_none() || clone.is_condemned)
                && let Some(path) = &clone.socket
            {
                remove_dead_socket(path);
            }
            drop(clone.terminal.take());
            let ending = clone.ending.get_or_insert(unsaid);
            if ending.exit_code() != 0 {
                metrics::count_failure(&self.options.name);
            }
        }
        let zeros: Delta = clone
            .gauges
            .keys()
            .map(|series| (series.clone(), Change::Gauge(0.0)))
            .collect();
        replay(&zeros, |series, _| {
            clone.gauges.get(series).copied().unwrap_or(0.0)
        });
        clone.gauges.clear();
        self.forks.refill.has_started(number);
        self.paging.forget(Owner::Clone(number));
        self.learner.ended(number);
        self.usage.ended(&self.options.name, number);
        self.publish_counts();
        Event::Ended(number)
    }
}

/// Removes the socket of a worker that was killed, unless somebody else listens there by now.
fn remove_dead_socket(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refuses = UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && refuses {
        // Whatever keeps it there: the next clone takes its place.
        let _ = fs::remove_file(path);
    }
}
