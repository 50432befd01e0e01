#![forbid(unsafe_code)]
//! A pager as small as can be: one thread, one memory, and what it believes of each page.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::sys::Served;

/// What page `page` of the template holds: every third page is zero.
pub(crate) fn template(page: usize) -> u64 {
    if page % 3 == 2 {
        0
    } else {
        0x7e3a_0000 + page as u64
    }
}

#[derive(Debug, Default)]
struct Belief {
    present: Vec<bool>,
    served: usize,
    wrong: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct TestPager {
    belief: Arc<Mutex<Belief>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl TestPager {
    /// Serves `memory`, of which the first `present` of `pages` are there.
    pub(crate) fn start(memory: &Arc<Served>, pages: usize, present: usize) -> Self {
        let belief = Belief {
            present: (0..pages).map(|page| page < present).collect(),
            ..Belief::default()
        };
        let belief = Arc::new(Mutex::new(belief));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let (memory, shared, end) = (Arc::clone(memory), Arc::clone(&belief), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            loop {
                let mut fds = [
                    PollFd::new(&*memory, PollFlags::IN),
                    PollFd::new(&*end, PollFlags::IN),
                ];
                poll(&mut fds, None).unwrap();
                if !fds[1].revents().is_empty() {
                    return;
                }
                while let Some(fault) = memory.fault() {
                    serve(
                        &memory,
                        &mut shared.lock().unwrap(),
                        fault.page,
                        fault.is_write,
                    );
                }
            }
        });
        Self {
            belief,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn forget(&self, first: usize, count: usize) {
        self.belief.lock().unwrap().present[first..first + count].fill(false);
    }

    /// How often a page was put in place.
    pub(crate) fn served(&self) -> usize {
        self.belief.lock().unwrap().served
    }

    /// What it saw that must not be.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.belief.lock().unwrap().wrong.clone()
    }
}

fn serve(memory: &Served, belief: &mut Belief, page: usize, is_write: bool) {
    let value = template(page);
    // As the real one does: only what is installed for reading is write-protected.
    let done = if value == 0 && !is_write {
        memory.install_zero(page)
    } else {
        memory.install(page, value, !is_write)
    };
    match done {
        Ok(()) if belief.present[page] => {
            belief
                .wrong
                .push(format!("page {page} went behind the pager's back"));
        }
        Ok(()) => {
            belief.present[page] = true;
            belief.served += 1;
        }
        // Somebody else raised it as well.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => memory.wake(page),
        Err(error) => belief.wrong.push(format!("page {page}: {error}")),
    }
}

impl Drop for TestPager {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).unwrap();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
