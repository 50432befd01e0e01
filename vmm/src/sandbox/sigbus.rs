// UNSAFETY: installs a signal handler and reads the `siginfo_t` that the kernel hands to it. The
// handler does only what is async-signal-safe: plain thread-local cells without destructors,
// atomic loads, the function behind one of them that promises the same, write(2) and _exit(2).
#![expect(unsafe_code, reason = "installs and is a signal handler")]
//! SIGBUS: guest memory that cannot be read.
//!
//! A page that the pager poisoned, a RAM file that was cut short, or a new page of one whose disk is
//! full raises SIGBUS in whichever thread touches it. In a vCPU thread inside `KVM_RUN` KVM has already left the guest; the handler
//! notes the address and the vCPU loop ends the machine with a message. Anywhere else an
//! instruction of this process has failed that cannot be finished: one line, then exit code
//! [`EXIT_CODE`].

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence};

/// Exit code of the process when guest memory could not be read outside a vCPU.
pub const EXIT_CODE: i32 = 5;

thread_local! {
    static IN_GUEST: Cell<bool> = const { Cell::new(false) };
    static ADDRESS: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What came of a stay in the guest.
#[derive(Debug)]
pub struct Guarded<T> {
    /// What the closure returned.
    pub result: T,
    /// Host address of the memory that raised SIGBUS meanwhile, if any did.
    pub sigbus: Option<u64>,
}

/// Runs `enter`, which must do nothing but enter the guest, noting a SIGBUS instead of ending the
/// process.
pub fn in_guest<T>(enter: impl FnOnce() -> T) -> Guarded<T> {
    IN_GUEST.set(true);
    // The handler runs on this thread: only the compiler could reorder.
    compiler_fence(Ordering::SeqCst);
    let result = enter();
    compiler_fence(Ordering::SeqCst);
    IN_GUEST.set(false);
    Guarded {
        result,
        sigbus: ADDRESS.take(),
    }
}

static BEFORE_EXIT: OnceLock<fn()> = OnceLock::new();

/// Has the handler call `act` before it ends the process. There is one such act; the first stays.
///
/// It must be async-signal-safe: the interrupted thread may hold any lock, the allocator's too.
pub fn before_exit(act: fn()) {
    let _ = BEFORE_EXIT.set(act);
}

/// What the line says in place of its guesses, and the exit code, for a process that knows what
/// SIGBUS means in it. Only the first call counts.
pub fn explain(text: &str, exit_code: i32) {
    let _ = EXPLANATION.set((format!("pando: {text}\n").into_bytes(), exit_code));
}

// Reading a `OnceLock` that is set is one atomic load: safe in a signal handler.
static EXPLANATION: OnceLock<(Vec<u8>, i32)> = OnceLock::new();

/// Installs the handler, once per process.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    (*INSTALLED.get_or_init(|| install_handler().map_err(|e| e.raw_os_error().unwrap_or(0))))
        .map_err(io::Error::from_raw_os_error)
}

fn install_handler() -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all-zero is a valid `sigaction` (no handler, empty mask, no flags); the handler has
    // the signature that SA_SIGINFO asks for and is async-signal-safe.
    let status = unsafe {
        let action = action.assume_init_mut();
        action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, action, ptr::null_mut())
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to an SA_SIGINFO handler, and for SIGBUS its
    // `si_addr` is set.
    let address = unsafe { (*info).si_addr() } as u64;
    if IN_GUEST.get() {
        ADDRESS.set(Some(address));
        return;
    }
    // Looking at a `OnceLock` is one atomic load.
    if let Some(act) = BEFORE_EXIT.get() {
        act();
    }
    let mut line = *b"pando: guest memory at host address 0x0000000000000000 cannot be had: \
        its page is poisoned, its file was cut short, or its disk is full\n";
    let digits = 38;
    for (position, byte) in line[digits..digits + 16].iter_mut().enumerate() {
        let nibble = (address >> (60 - 4 * position)) & 0xf;
        *byte = b"0123456789abcdef"[nibble as usize];
    }
    let (text, code): (&[u8], i32) = match EXPLANATION.get() {
        Some((text, code)) => (text, *code),
        None => (&line, EXIT_CODE),
    };
    // SAFETY: both are async-signal-safe; `text` lives until the process ends here.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(code);
    }
}
