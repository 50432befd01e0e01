#![forbid(unsafe_code)]
//! Fuzz targets of Pando: whatever comes from outside, taken as far as it goes without a guest.
//!
//! A target is a function of bytes that must come back, whatever they are: no panic, no overflow, no
//! hang, no memory beyond its limit. `tests/fuzz/run` runs them with libFuzzer; `fuzz-inputs` replays
//! single inputs without it, and so do the tests of this crate.

pub mod command_line;
pub mod devices;
pub mod kernel;
pub mod machine_file;
pub mod messages;
pub mod monitor;
pub mod parts;
pub mod scratch;
pub mod state;
pub mod template;

/// One thing that reads what comes from outside.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What it is called on command lines.
    pub name: &'static str,
    /// What it feeds, in one line.
    pub about: &'static str,
    /// Takes an input.
    pub run: fn(&[u8]),
    /// Inputs to begin with: each part of what the target reads is in one of them.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words that inputs are made of.
    pub words: fn() -> Vec<String>,
    /// Most bytes of an input.
    pub max_bytes: u32,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "command-line",
        about: "`pando qemu`: an argument vector down to the machine, printed and read again",
        run: command_line::run,
        seeds: command_line::seeds,
        words: command_line::words,
        max_bytes: 4096,
    },
    Target {
        name: "monitor",
        about: "QMP and the monitor for people: bytes of a client to a machine that waits for a state",
        run: monitor::run,
        seeds: monitor::seeds,
        words: monitor::words,
        max_bytes: 4096,
    },
    Target {
        name: "state",
        about: "state files: header, body, memory, and a machine that loads them",
        run: state::run,
        seeds: state::seeds,
        words: state::words,
        max_bytes: 1 << 16,
    },
    Target {
        name: "template",
        about: "manifest, page index, working set and state of a template",
        run: template::run,
        seeds: template::seeds,
        words: template::words,
        max_bytes: 1 << 14,
    },
    Target {
        name: "messages",
        about: "what supervisors, clones, roots and pagers say to each other, and other VMMs to a pager",
        run: messages::run,
        seeds: messages::seeds,
        words: messages::words,
        max_bytes: 1 << 14,
    },
    Target {
        name: "machine-file",
        about: "machines as TOML and JSON, down to the machine, printed and read again",
        run: machine_file::run,
        seeds: machine_file::seeds,
        words: machine_file::words,
        max_bytes: 4096,
    },
    Target {
        name: "kernel",
        about: "kernel images: bzImage and ELF, loaded into a guest's RAM",
        run: kernel::run,
        seeds: kernel::seeds,
        words: kernel::words,
        max_bytes: 1 << 14,
    },
    Target {
        name: "devices",
        about: "virtio devices: registers, queues and memory of a guest, pauses, saving and restoring",
        run: devices::run,
        seeds: devices::seeds,
        words: devices::words,
        max_bytes: 2048,
    },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
