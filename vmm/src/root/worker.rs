#![forbid(unsafe_code)]
//! The root process: fills its memory once, then forks clones as it is told. One thread, no ring,
//! no VM: a fork must find nothing of another thread's half done.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pando_pager::working_set::Plan;
use pando_pager::{PAGE_BYTES, Root, RootPlan, RootRange};

use super::protocol::{FromRoot, RangeFaults, RootConfig, ToRoot};
use crate::clone::END_SIGNALS;
use crate::clone::control::{Channel, monotonic};
use crate::clone::forked::{self, Inheritance};
use crate::clone::instantiate::{CloneError, first_ranges, plan};
use crate::clone::worker::{die_with, exit_code, take_channel};
use crate::machine::{self, HostCheck};
use crate::observe::log;
use crate::report::{chain, exit};
use crate::sys::fork::{Forked, OneThread, fork_sibling};
use crate::sys::text::Text;
use crate::template::Template;

/// Runs a root whose control socket is standard input, or the clone that a fork of it became.
/// Returns the process's exit code.
pub fn run() -> u8 {
    let channel = match take_channel() {
        Ok(channel) => channel,
        Err(error) => {
            log::start(0);
            tracing::error!("{}", chain(error.as_ref()));
            return exit::USAGE;
        }
    };
    match serve(channel) {
        Ok(code) => code,
        Err((channel, error)) => {
            let code = exit_code(&error);
            let message = chain(error.as_ref());
            // A supervisor that is gone needs no answer.
            let _ = channel.send(&FromRoot::Failed { code, message }, &[]);
            code
        }
    }
}

/// What a root is made of.
struct Ready {
    template: Template,
    root: Root,
    /// What its clones are known to need.
    plan: Plan,
    /// What they need of this program.
    text: Text,
    one_thread: OneThread,
}

/// Serves until the supervisor goes; in a fork, until the clone has ended.
fn serve(channel: Channel) -> Result<u8, (Channel, anyhow::Error)> {
    let (mut ready, config) = match prepare(&channel) {
        Ok(Some(prepared)) => prepared,
        Ok(None) => return Ok(exit::OK),
        Err(error) => return Err((channel, error)),
    };
    let mut owes_answer = false;
    let mut told_ranges = 0;
    let mut forks = 0;
    let mut unseen = None;
    loop {
        // Clones first; what makes the next fork cheaper comes when nothing is to be done.
        while !channel.has_message() && (ready.root.promote_next() || ready.root.collapse_next()) {}
        if owes_answer && !channel.has_message() {
            owes_answer = false;
            let filled = ready.root.filled();
            let promoted_ranges = filled.promoted_ranges - told_ranges;
            told_ranges = filled.promoted_ranges;
            let answer = FromRoot::Filled {
                filled_bytes: filled.pages * PAGE_BYTES,
                hole_bytes: filled.hole_pages * PAGE_BYTES,
                promoted_ranges,
            };
            if let Err(error) = channel.send(&answer, &[]) {
                return Err((channel, error.into()));
            }
        }
        if let Some((pid, is_whole)) = unseen.take_if(|_| !channel.has_message_within(START_TIME)) {
            ready.text.learn(pid, is_whole);
        }
        let Order {
            id,
            is_wanted,
            theirs,
            cgroup,
        } = match next_order(&channel) {
            Ok(Some(Told::Fork(order))) => order,
            Ok(Some(Told::HoleFaults(faults))) => {
                owes_answer = true;
                ready.root.note_faults(&faults);
                continue;
            }
            Ok(None) => return Ok(exit::OK),
            Err(error) => return Err((channel, error)),
        };
        match fork_sibling(&ready.one_thread, cgroup.as_ref().map(AsFd::as_fd)) {
            Ok(Forked::Child) => {
                drop((channel, cgroup));
                let Ready {
                    template,
                    root,
                    plan,
                    ..
                } = ready;
                let inheritance = Inheritance {
                    id,
                    is_wanted,
                    template,
                    memories: root.into_memories(),
                    plan,
                    record: config.pager.learn.record(forks),
                    pager: config.pager,
                    host_check: if config.host_check_is_due {
                        HostCheck::Due
                    } else {
                        HostCheck::Done
                    },
                    supervisor_pid: config.supervisor_pid,
                };
                return Ok(forked::run(&Channel::new(theirs), inheritance));
            }
            Ok(Forked::Parent { pid, pidfd }) => {
                forks += 1;
                let pid = pid.as_raw_nonzero().get().unsigned_abs();
                unseen = ready.text.is_learning().then_some((pid, is_wanted));
                let sent = channel.send(&FromRoot::Forked { id, pid }, &[pidfd.as_fd()]);
                if let Err(error) = sent {
                    return Err((channel, error.into()));
                }
            }
            Err(error) => {
                let message = format!("cannot fork: {error}; {FORK_HINT}");
                if let Err(error) = channel.send(&FromRoot::NotForked { id, message }, &[]) {
                    return Err((channel, error.into()));
                }
            }
        }
    }
}

/// Within this a fork has mostly run what it runs to start.
const START_TIME: Duration = Duration::from_millis(2);

/// How often a root that fills its memory says so.
const WORD_PERIOD: Duration = Duration::from_millis(200);

const FORK_HINT: &str =
    "is the limit of processes (ulimit -u, pids.max) or of memory (vm.overcommit_memory) reached?";

/// Opens the template and fills the memory.
fn prepare(channel: &Channel) -> anyhow::Result<Option<(Ready, RootConfig)>> {
    let Some((message, _)) = channel.receive::<ToRoot>()? else {
        return Ok(None);
    };
    let ToRoot::Start(config) = message else {
        bail!("the first message to a root was not what to be a root of");
    };
    log::start_root(config.verbosity);
    die_with(config.supervisor_pid)?;
    ignore_end_signals()?;
    let start = Instant::now();
    let template = Template::open(&config.template).map_err(CloneError::from)?;
    let images = template.images().map_err(CloneError::from)?;
    let backend_pages = images.iter().map(|image| image.index().pages().get());
    let backend_pages = backend_pages.collect();
    let budget_pages = config.budget_bytes / PAGE_BYTES;
    let (first, plan) = if config.pager.working_set {
        (first_ranges(&template, budget_pages), plan(&template))
    } else {
        Default::default()
    };
    let fill = RootPlan {
        budget_pages,
        verify: config.pager.verify,
        first,
    };
    let mut last_word = start;
    let root = Root::fill(images, fill, &mut |pages| {
        if last_word.elapsed() >= WORD_PERIOD {
            last_word = Instant::now();
            let filled_bytes = pages * PAGE_BYTES;
            // A supervisor that is gone ends this process.
            let _ = channel.send(&FromRoot::Filling { filled_bytes }, &[]);
        }
    })
    .map_err(CloneError::from)
    .context("a root cannot hold the template's memory")?;
    let filled = root.filled();
    machine::prepare_for_forks().map_err(CloneError::from)?;
    // The first look at the clock has to find the kernel's code for it.
    let _ = monotonic();
    let text = Text::for_forks();
    // Last: whatever was called before might have started a thread.
    let one_thread = OneThread::prove().context("a root cannot fork")?;
    channel.send(
        &FromRoot::Ready {
            backend_pages,
            filled_bytes: filled.pages * PAGE_BYTES,
            hole_bytes: filled.hole_pages * PAGE_BYTES,
            took: start.elapsed(),
        },
        &[],
    )?;
    let ready = Ready {
        template,
        root,
        plan,
        text,
        one_thread,
    };
    Ok(Some((ready, config)))
}

/// A terminal sends its signals to the whole group; only the supervisor decides what they mean.
pub(crate) fn ignore_end_signals() -> anyhow::Result<()> {
    for signal in END_SIGNALS {
        let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        signal_hook::flag::register(signal, seen).context("cannot ignore signals")?;
    }
    Ok(())
}

/// A fork to make.
struct Order {
    id: u64,
    is_wanted: bool,
    /// Its end of the control socket.
    theirs: OwnedFd,
    /// The directory of the cgroup in which it is to begin.
    cgroup: Option<OwnedFd>,
}

/// What a root was told.
enum Told {
    Fork(Order),
    HoleFaults(BTreeMap<RootRange, u64>),
}

/// The next thing to do; `None` when the supervisor is gone.
fn next_order(channel: &Channel) -> anyhow::Result<Option<Told>> {
    let Some((message, descriptors)) = channel.receive::<ToRoot>()? else {
        return Ok(None);
    };
    let (id, is_wanted) = match message {
        ToRoot::Fork { id, is_wanted } => (id, is_wanted),
        ToRoot::HoleFaults(faults) => {
            let place = |fault: &RangeFaults| RootRange {
                backend: fault.backend,
                unit: fault.unit,
            };
            let faults = faults.iter().map(|fault| (place(fault), fault.faults));
            return Ok(Some(Told::HoleFaults(faults.collect())));
        }
        ToRoot::Start(_) => bail!("a root was told twice what to be a root of"),
    };
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next(), descriptors.next()) {
        (Some(theirs), cgroup, None) => Ok(Some(Told::Fork(Order {
            id,
            is_wanted,
            theirs,
            cgroup,
        }))),
        _ => {
            Err(io::Error::other("an order to fork came without its one or two descriptors").into())
        }
    }
}
