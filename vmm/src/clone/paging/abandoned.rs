#![forbid(unsafe_code)]
//! Clients that the pager serves no longer although nobody took them from it: their process ends,
//! or became another program.

use std::fs;
use std::time::Duration;

use super::super::supervise::Supervisor;
use super::Owner;
use crate::report::exit;

/// The pager may see that memory is gone a little before the process has ended.
const GRACE: Duration = Duration::from_secs(1);
/// No process takes so long to end; one whose first thread has ended while others run looks as if it did.
const LONGEST: Duration = Duration::from_secs(60);

impl Supervisor {
    /// Ends, by name, those whose process runs on: each of its next missing pages would hold it for
    /// ever.
    pub(super) fn end_abandoned(&mut self) {
        let paging = &mut self.paging;
        let is_due = |number: &u64| {
            let since = paging.abandoned.get(number);
            since.is_some_and(|since| since.elapsed() > GRACE)
        };
        let due: Vec<u64> = paging.abandoned.keys().copied().filter(is_due).collect();
        for number in due {
            let owner = self.paging.clients.get(&number).map(|client| client.owner);
            let since = self.paging.abandoned.get(&number);
            let may_be_ending = since.is_some_and(|since| since.elapsed() < LONGEST);
            if may_be_ending && owner.is_some_and(|owner| self.is_ending(owner)) {
                // Its memory is gone before its end is heard, and a large one takes a while to go.
                continue;
            }
            self.paging.abandoned.remove(&number);
            if let Some(owner) = owner {
                let why = "the pager process had to let go of its memory though it runs: did it \
                           become another program?";
                self.end_owner(owner, exit::MEMORY, why);
            }
        }
    }

    /// Whether a process is being taken apart, or is no more.
    fn is_ending(&self, owner: Owner) -> bool {
        match owner {
            Owner::Clone(number) => {
                let process = self.clones.get(number).and_then(|c| c.process.as_ref());
                process.is_none_or(|process| is_exiting(process.pid()))
            }
            Owner::Shell(id) => self.forks.shell_pid(id).is_none_or(is_exiting),
        }
    }
}

/// Whether a process is dead or dying: `PF_EXITING` among the flags of proc_pid_stat(5), or nothing there.
fn is_exiting(pid: u32) -> bool {
    const PF_EXITING: u32 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    let flags = stat.ok().and_then(|stat| {
        // Behind the name: state, parent, group, session, terminal, its group, flags.
        let (_, fields) = stat.rsplit_once(") ")?;
        fields.split(' ').nth(6)?.parse::<u32>().ok()
    });
    flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::time::Instant;

    use pando_pager::Registration;

    use super::super::super::control::{ClientMemory, Ending};
    use super::super::super::supervise::Event;
    use super::super::super::testing::{add_process, supervisor};
    use super::*;
    use crate::pager_process::protocol::ClientNews;

    #[test]
    fn a_dead_process_is_exiting_and_this_one_is_not() {
        assert!(!is_exiting(std::process::id()));
        let mut child = Command::new("true").spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_exiting(child.id()) {
            assert!(Instant::now() < deadline, "it does not count as ended");
        }
        child.wait().unwrap();
        assert!(is_exiting(child.id()));
    }

    #[test]
    fn a_process_that_the_pager_let_go_of_ends_by_name_unless_it_ended() {
        let mut supervisor = supervisor();
        let mut ends = Vec::new();
        for number in 0..2 {
            ends.push(add_process(&mut supervisor));
            let registration = Registration::new().unwrap();
            let uffd = registration.as_fd().try_clone_to_owned().unwrap();
            let memory = ClientMemory {
                regions: Vec::new(),
                cpu: None,
                track_writes: false,
                discards: false,
            };
            supervisor
                .paging
                .add(Owner::Clone(number), (uffd, None), memory);
        }
        supervisor.hear_news(ClientNews::Gone { client: 0 });
        supervisor.hear_news(ClientNews::Gone { client: 1 });
        supervisor.end_abandoned();
        assert_eq!(supervisor.paging.abandoned.len(), 2, "they may be ending");
        for since in supervisor.paging.abandoned.values_mut() {
            *since -= 2 * GRACE;
        }
        // The end of one is heard of.
        supervisor.paging.forget(Owner::Clone(1));
        supervisor.end_abandoned();
        assert!(supervisor.paging.abandoned.is_empty());
        while !supervisor.wait(GRACE).unwrap().contains(&Event::Ended(0)) {}
        let Some(Ending::Failed { code, message }) = &supervisor.clones()[0].ending else {
            panic!("{:?}", supervisor.clones()[0].ending);
        };
        assert_eq!(*code, exit::MEMORY);
        assert!(message.contains("though it runs"), "{message}");
        assert!(supervisor.clones()[1].ending.is_none());
    }
}
