#![forbid(unsafe_code)]
//! The thread of one vCPU: it waits for orders and obeys them one after the other.
//!
//! ```text
//! driver                               vCPU thread
//! 1 put the order into the queue       a enter KVM_RUN; it looks at immediate_exit
//! 2 immediate_exit = 1                 b (in the guest)
//! 3 signal                             c KVM_RUN returns EINTR
//!                                      d immediate_exit = 0
//!                                      e look into the queue
//! ```
//!
//! **Why a kick is never lost.** If 2 comes before a's look, `KVM_RUN` returns at once. If it comes
//! after, 3 comes after it too: the signal finds the thread on its way into the guest or in it, and
//! KVM leaves the guest for any pending signal. If 2 comes between c and d, d overwrites it, but
//! then 1 came before e, which sees the order. If 2 comes after d, the next a sees it. A signal
//! that arrives while the thread is not in `KVM_RUN` does nothing, and need not: 2 was before it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::kvm::KvmError;
use crate::kvm::vcpu::{ExitFlag, Vcpu};

use super::run::{Failure, Outside, Stop, run};
use super::state::VcpuState;

/// What a vCPU thread is told to do.
#[derive(Debug)]
enum Order {
    /// Run the guest until the next order.
    Run,
    /// Stop running and say so.
    Park,
    /// Read the state and send it. The vCPU must be parked.
    Save {
        msrs: Vec<u32>,
        reply: Sender<Result<VcpuState, KvmError>>,
    },
    /// End the thread.
    Quit,
}

/// What a vCPU thread does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstOrder {
    /// It waits, parked.
    Wait,
    /// It runs the guest.
    Run,
}

/// What a vCPU thread reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It has stopped running because it was told to.
    Parked,
    /// The guest has ended; the vCPU has stopped running.
    Ended(Stop),
}

/// A vCPU, its thread, and the way to both.
#[derive(Debug)]
pub struct VcpuThread {
    number: u8,
    orders: Sender<Order>,
    exit_flag: ExitFlag,
    thread: Option<JoinHandle<()>>,
}

/// What a vCPU thread needs.
#[derive(Debug)]
pub struct VcpuSetup {
    /// Number of the vCPU.
    pub number: u8,
    /// The vCPU, with its state set.
    pub vcpu: Vcpu,
    /// What CPUID answers on it.
    pub cpuid: Vec<CpuidEntry>,
    /// What it reaches outside the kernel.
    pub outside: Outside,
}

impl VcpuThread {
    /// Starts the thread. It calls `report` whenever it stops running; `report` must not
    /// block.
    pub fn spawn(
        setup: VcpuSetup,
        first_order: FirstOrder,
        report: impl Fn(u8, Report) + Send + 'static,
    ) -> io::Result<Self> {
        install_kick_handler()?;
        let (orders, inbox) = unbounded();
        if first_order == FirstOrder::Run {
            // Its other end is here.
            let _ = orders.send(Order::Run);
        }
        let number = setup.number;
        let exit_flag = setup.vcpu.exit_flag().clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{number}"))
            .spawn(move || {
                let work = AssertUnwindSafe(|| obey(setup, &inbox, &report));
                if catch_unwind(work).is_err() {
                    let thread = format!("the thread of vcpu {number}");
                    report(
                        number,
                        Report::Ended(Stop::Failed(Failure::ThreadDied { thread })),
                    );
                }
            })?;
        Ok(Self {
            number,
            orders,
            exit_flag,
            thread: Some(thread),
        })
    }

    /// Lets the guest run. Only while parked.
    pub fn run(&self) {
        self.give(Order::Run);
    }

    /// Makes the vCPU come out of the guest; it reports [`Report::Parked`].
    pub fn park(&self) {
        self.give(Order::Park);
        self.kick();
    }

    /// Asks for the state; the answer comes through the channel. Only while parked.
    pub fn save(&self, msrs: &[u32]) -> Receiver<Result<VcpuState, KvmError>> {
        let (reply, answer) = unbounded();
        self.give(Order::Save {
            msrs: msrs.to_vec(),
            reply,
        });
        answer
    }

    /// Tells the thread to end; [`Self::join`] waits for it.
    pub fn quit(&self) {
        self.give(Order::Quit);
        self.kick();
    }

    /// Waits until the thread has ended. [`Self::quit`] comes first.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.number, "the vcpu thread panicked");
        }
    }

    fn give(&self, order: Order) {
        // A thread that is gone has reported so; the driver ends the machine then.
        let _ = self.orders.send(order);
    }

    /// Steps 2 and 3 of the module's table; step 1 has been done.
    fn kick(&self) {
        self.exit_flag.set();
        if let Some(thread) = &self.thread
            && let Err(error) = thread.kill(SIGRTMIN())
        {
            tracing::debug!(vcpu = self.number, %error, "cannot be signalled, has it ended?");
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.quit();
            self.join();
        }
    }
}

/// The body of the thread: order after order until [`Order::Quit`].
fn obey(mut setup: VcpuSetup, inbox: &Receiver<Order>, report: &impl Fn(u8, Report)) {
    let number = setup.number;
    let mut is_consistent = true;
    // Ends too when the owner is gone without a word.
    while let Ok(order) = inbox.recv() {
        match order {
            Order::Run => {
                let is_ordered = || !inbox.is_empty();
                let left = run(&mut setup.vcpu, number, &setup.outside, is_ordered);
                is_consistent = left.is_consistent;
                match left.stop {
                    Stop::Ordered => {}
                    stop @ (Stop::Reset | Stop::PowerOff | Stop::Failed(_)) => {
                        report(number, Report::Ended(stop));
                    }
                }
            }
            Order::Park => report(number, Report::Parked),
            Order::Save { msrs, reply } => {
                // Nobody waits any more when the machine is being torn down.
                let _ = reply.send(if is_consistent {
                    VcpuState::save(&setup.vcpu, &setup.cpuid, &msrs)
                } else {
                    Err(KvmError::Inconsistent { vcpu: number })
                });
            }
            Order::Quit => return,
        }
    }
}

/// The kick's signal needs a handler, or it would end the process; the handler has nothing to do.
/// Once per process, forks of it included.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    (*INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), ignore).map_err(|error| error.errno())))
    .map_err(io::Error::from_raw_os_error)
}
