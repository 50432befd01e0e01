#![forbid(unsafe_code)]
//! The embedded guest's program.
//!
//! Conventions: `r15` holds the command letter while a command runs; a command begins with its
//! parameters at [`PARAMETERS`](super::layout::PARAMETERS) and ends with a jump to one of the
//! labels of [`Shared`]. Interrupts come only while the guest halts, and their handler never
//! returns: it begins the main loop anew with an empty stack (the emulating KVM this has to run on
//! need not know `iretq`). Every register survives that, so a half-read line is not lost.

mod boot;
mod line;
mod pages;
mod reply;
mod small;
mod words;

use iced_x86::code_asm::{CodeAssembler, CodeLabel};
use iced_x86::{BlockEncoderOptions, IcedError};

use super::layout::CODE;

/// Exceptions have the first 32 vectors.
const EXCEPTIONS: u64 = 32;
/// In [`CommandEntry::parameters`]: as many as the caller likes.
const ANY_PARAMETERS: u32 = 0xff;

/// The assembled program, and the addresses that the tables of the image need.
#[derive(Debug)]
pub(super) struct Program {
    /// The instructions, to lie at [`CODE`].
    pub(super) code: Vec<u8>,
    /// Where the guest begins.
    pub(super) entry: u64,
    /// Handler of device interrupts.
    pub(super) interrupt: u64,
    /// Handler of each exception.
    pub(super) exceptions: Vec<u64>,
    /// What obeys each command letter, `a` first.
    pub(super) commands: [Option<CommandEntry>; 26],
}

/// One entry of the command table.
#[derive(Debug, Clone, Copy)]
pub(super) struct CommandEntry {
    pub(super) address: u64,
    pub(super) parameters: u32,
}

/// Places that several parts of the program jump to or call.
#[derive(Debug, Clone, Copy)]
struct Shared {
    /// Begins waiting for input, with an empty stack. Also the interrupt handler.
    main: CodeLabel,
    /// Begins a reply line `ok <command>` and points `rdi` behind it. A subroutine.
    begin_reply: CodeLabel,
    /// Appends a space and `rax` in hex to the reply; changes `rcx` and `rdx`. A subroutine.
    put_hex: CodeLabel,
    /// Ends the reply line, sends it and waits for the next command.
    finish: CodeLabel,
    /// Sends the reply line so far, changing `rcx`, `rdx` and `rsi`. A subroutine.
    send_reply: CodeLabel,
    /// Appends the ticks since the start of the command, then finishes.
    finish_timed: CodeLabel,
    /// Notes the time stamp at which the work of a command begins; changes `rax` and `rdx`. A
    /// subroutine.
    start_clock: CodeLabel,
    /// Refuses: no such command.
    unknown: CodeLabel,
    /// Refuses: parameters that are no hex numbers, or the wrong number of them.
    bad_parameters: CodeLabel,
    /// Refuses: a value outside of what the command takes, or pages that are not free for data.
    out_of_range: CodeLabel,
    /// Refuses: the machine should be gone by now.
    still_here: CodeLabel,
    /// Checks the pages `[r14, r14 + r13)`; changes `rax`. A subroutine that refuses by jumping to
    /// `out_of_range`.
    check_pages: CodeLabel,
}

impl Shared {
    fn new(a: &mut CodeAssembler) -> Self {
        let mut label = || a.create_label();
        Self {
            main: label(),
            begin_reply: label(),
            put_hex: label(),
            finish: label(),
            send_reply: label(),
            finish_timed: label(),
            start_clock: label(),
            unknown: label(),
            bad_parameters: label(),
            out_of_range: label(),
            still_here: label(),
            check_pages: label(),
        }
    }
}

/// A command letter, how many parameters it takes, and the code that obeys it.
struct Emitted {
    letter: u8,
    parameters: u32,
    label: CodeLabel,
}

/// A constant as a 32-bit operand: all addresses and page numbers of the guest are that small.
#[expect(
    clippy::cast_possible_truncation,
    reason = "asserted, at compile time where it is used in a constant"
)]
const fn immediate(value: u64) -> i32 {
    assert!(value <= i32::MAX as u64, "no 32-bit operand");
    value as i32
}

/// Assembles the program.
pub(super) fn assemble() -> Program {
    try_assemble().expect("the embedded guest is made of constant instructions")
}

fn try_assemble() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut shared = Shared::new(&mut a);
    boot::emit(&mut a, &mut shared)?;
    line::emit(&mut a, &mut shared)?;
    let exceptions = reply::emit(&mut a, &mut shared)?;
    let mut commands = small::emit(&mut a, &mut shared)?;
    commands.extend(pages::emit(&mut a, &mut shared)?);
    commands.extend(words::emit(&mut a, &mut shared)?);

    let assembled =
        a.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut table = [None; 26];
    for command in commands {
        table[usize::from(command.letter - b'a')] = Some(CommandEntry {
            address: assembled.label_ip(&command.label)?,
            parameters: command.parameters,
        });
    }
    Ok(Program {
        entry: CODE,
        interrupt: assembled.label_ip(&shared.main)?,
        exceptions: exceptions
            .iter()
            .map(|label| assembled.label_ip(label))
            .collect::<Result<_, _>>()?,
        commands: table,
        code: assembled.inner.code_buffer,
    })
}
