#![forbid(unsafe_code)]
//! What tests of a supervisor have in common: real processes in the place of clones, which say nothing.

use std::process::Command;
use std::time::Instant;

use super::Engine;
use super::control::{Channel, PagerConfig};
use super::member::Clone;
use super::process::{ChildProcess, CloneProcess, SerialPlan};
use super::supervise::{CloneOptions, RootOptions, Supervisor};
use crate::machine::HostCheck;

/// A supervisor without clones, of a template that is not there.
pub(super) fn supervisor() -> Supervisor {
    Supervisor::new(CloneOptions {
        program: "pando".into(),
        template: "template".into(),
        name: "tested".into(),
        engine: Engine::Copy,
        pager: PagerConfig::default(),
        verbosity: 0,
        measure_memory: false,
        overcommit: true,
        host_check: HostCheck::Done,
        root: RootOptions::default(),
    })
    .unwrap()
}

/// Adds a process that lives until it is ended; gives its end of the control socket.
pub(super) fn add_process(supervisor: &mut Supervisor) -> Channel {
    let child = ChildProcess::spawn(Command::new("sleep").arg("600")).unwrap();
    let (channel, theirs) = Channel::pair().unwrap();
    let process = CloneProcess::adopt(child, channel, Instant::now());
    let mut clone = Clone::new(&SerialPlan::Null, None);
    let number = supervisor.clones.len();
    supervisor.adopt(number, &mut clone, process, None).unwrap();
    supervisor.clones.push(clone);
    Channel::new(theirs)
}
