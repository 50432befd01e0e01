#![forbid(unsafe_code)]
//! Runs a program to which the kernel refuses some system calls with EPERM, as a container
//! runtime does: `deny io_uring_setup,userfaultfd -- PROGRAM ARGS...`

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Numbers of the system calls that tests take away (arch/x86/entry/syscalls/syscall_64.tbl).
const CALLS: [(&str, i64); 2] = [("userfaultfd", 323), ("io_uring_setup", 425)];

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let names = args
        .next()
        .context("usage: deny CALL,CALL -- PROGRAM ARGS...")?;
    let names = names
        .into_string()
        .ok()
        .context("system calls have plain names")?;
    if args.next().as_deref() != Some("--".as_ref()) {
        bail!("usage: deny CALL,CALL -- PROGRAM ARGS...");
    }
    let mut rules = BTreeMap::new();
    for name in names.split(',') {
        let known = CALLS.iter().find(|(known, _)| *known == name);
        let (_, number) = known.with_context(|| format!("system call {name} is not known here"))?;
        rules.insert(*number, Vec::new());
    }
    let refuse = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error().unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    let name = args.next().context("no program to run")?;
    Err(Command::new(&name).args(args).exec()).with_context(|| format!("cannot run {name:?}"))
}
