#![forbid(unsafe_code)]
//! The end of a clone, as its supervisor sees to it.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::closing::close_elsewhere;
use super::control::{Ending, FromWorker, Received};
use super::member::Event;
use super::paging::Owner;
use super::process::traced;
use super::supervise::Supervisor;
use crate::observe::metrics;
use crate::observe::relay::{Change, Delta, replay};
use crate::report::exit;

/// Most messages of a clone that are heard after its end; its socket has room for fewer.
const LAST_MESSAGES: usize = 4096;

impl Supervisor {
    /// Ends a clone for a reason that it need not know of; [`Self::wait`] tells of its end.
    pub(super) fn condemn(&mut self, number: usize, code: u8, message: &str) {
        let Some(clone) = self.clones.get_mut(number) else {
            return;
        };
        // One that met the page that could not be had can say less of it.
        let knows_less =
            matches!(&clone.ending, Some(Ending::Failed { code, .. }) if *code == exit::MEMORY);
        if clone.is_condemned {
            return;
        }
        if clone.ending.is_none() || (knows_less && code == exit::MEMORY) {
            let message = message.to_owned();
            clone.ending = Some(Ending::Failed { code, message });
        }
        // One that said that it ends may run on all the same.
        clone.is_condemned = true;
        if let Some(process) = &clone.process {
            process.kill();
            // It has nothing more to say, and a child of its may hold the socket.
            let _ = epoll::delete(&self.epoll, process.channel.as_fd());
        }
    }

    /// Takes leave of a clone whose process ended: what it said last, its exit, its gauges.
    pub(super) fn bury(&mut self, number: usize) -> Event {
        // Which page could not be had is the pager's to say, and it said so first.
        self.hear_pager();
        let mut unwanted = Vec::new();
        let mut is_silent = false;
        let messages = if self.clones[number].is_condemned {
            0
        } else {
            LAST_MESSAGES
        };
        // Not until its socket closes: somebody else may hold that.
        for _ in 0..messages {
            let Some(process) = self.clones[number].process.as_ref() else {
                break;
            };
            match process.channel.receive_now::<FromWorker>() {
                Ok(Received::Message(message, descriptors)) => {
                    unwanted.extend(descriptors);
                    self.hear(number, message);
                }
                Ok(Received::Closed) => {
                    is_silent = true;
                    break;
                }
                Ok(Received::Nothing) | Err(_) => break,
            }
        }
        if let Some(process) = self.clones[number].process.as_ref() {
            self.unwatch(process.pidfd());
        }
        let clone = &mut self.clones[number];
        if let Some(process) = clone.process.take() {
            let (mut process, channel) = process.into_parts();
            if !is_silent {
                // With what is still in it.
                unwanted.push(channel.into());
            }
            close_elsewhere(unwanted);
            let unsaid = match process.reap() {
                Some(unsaid) => unsaid,
                None => {
                    self.forks.dying.push(process);
                    traced()
                }
            };
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
    if is_socket && refuses(path) == Some(true) {
        // Whatever keeps it there: the next clone takes its place.
        let _ = fs::remove_file(path);
    }
}

/// Whether nobody listens there. Somebody who accepts nothing is not waited for.
fn refuses(path: &Path) -> Option<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    let address = SocketAddrUnix::new(path).ok()?;
    Some(connect(&probe, &address) == Err(Errno::CONNREFUSED))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::clone::testing::{add_process, supervisor};

    #[test]
    fn only_a_socket_that_nobody_has_is_removed_and_nobody_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clone-0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        // Its queue is full: another one would wait for ever.
        remove_dead_socket(&path);
        assert!(path.exists());
        drop(listener);
        remove_dead_socket(&path);
        assert!(!path.exists());
        fs::write(&path, "not a socket").unwrap();
        remove_dead_socket(&path);
        assert!(path.exists());
    }

    /// Waits for the end of the one clone, and gives it.
    fn ended(supervisor: &mut Supervisor) -> Ending {
        let deadline = Instant::now() + Duration::from_secs(60);
        let pause = Duration::from_millis(20);
        while !supervisor.wait(pause).unwrap().contains(&Event::Ended(0)) {
            assert!(Instant::now() < deadline, "it runs on");
        }
        supervisor.clones()[0].ending.clone().unwrap()
    }

    #[test]
    fn one_that_said_that_it_ended_and_runs_on_is_ended_for_what_it_does() {
        let mut supervisor = supervisor();
        let clone = add_process(&mut supervisor);
        clone
            .send(&FromWorker::Ended(Ending::Stopped), &[])
            .unwrap();
        let (unwanted, _) = UnixStream::pair().unwrap();
        clone.send(&FromWorker::Warm, &[unwanted.as_fd()]).unwrap();
        assert_eq!(ended(&mut supervisor), Ending::Stopped);
    }

    #[test]
    fn what_a_clone_does_wrong_is_said() {
        let started = || FromWorker::Started {
            began: Duration::ZERO,
            stages: Vec::new(),
            io: "none".to_owned(),
            places: Vec::new(),
        };
        let (unwanted, _) = UnixStream::pair().unwrap();
        let beside = vec![(FromWorker::Warm, true)];
        let twice = vec![(started(), false), (started(), false)];
        for (said, text) in [(beside, "descriptor"), (twice, "said twice")] {
            let mut supervisor = supervisor();
            let clone = add_process(&mut supervisor);
            for (message, has_one) in said {
                let one = [unwanted.as_fd()];
                let descriptors = if has_one { &one[..] } else { &[] };
                clone.send(&message, descriptors).unwrap();
            }
            let Ending::Failed { message, .. } = ended(&mut supervisor) else {
                panic!("it ended well");
            };
            assert!(message.contains(text), "{message}");
        }
    }

    #[test]
    fn a_message_that_is_none_is_the_reason_of_the_end() {
        let mut supervisor = supervisor();
        let clone = add_process(&mut supervisor);
        rustix::net::send(&clone, b"nonsense", rustix::net::SendFlags::empty()).unwrap();
        let Ending::Failed { message, .. } = ended(&mut supervisor) else {
            panic!("it ended well");
        };
        assert!(!message.contains("signal"), "{message}");
    }
}
