#![forbid(unsafe_code)]
//! Whoever reads the clones' consoles stops reading: the supervisor goes on with all its other work.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use pando_tests::command::{Running, eventually, finish, is_alive, pando, signal_pid};
use pando_tests::metrics::{address, scrape, sum};
use rustix::process::Signal;

/// Bytes that a pipe takes before its writer waits (pipe(7)).
const PIPE_BYTES: u64 = 64 << 10;

/// A kernel that prints `pando!` for ever: an ELF64 with one segment at 1 MiB, entered in long mode.
fn chatty_kernel() -> Vec<u8> {
    const LOAD_ADDRESS: u64 = 0x10_0000;
    const TEXT: &[u8] = b"pando!\n";
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    code.extend([0x48, 0x8d, 0x35, 9, 0, 0, 0]); // lea rsi, [rip + 9]: what follows the jump
    code.push(0xb9); // mov ecx, length
    code.extend(u32::try_from(TEXT.len()).unwrap_or(0).to_le_bytes());
    code.extend([0xf3, 0x6e]); // rep outsb
    code.extend([0xeb, 0xf0]); // jmp to the lea
    code.extend(TEXT);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, version
    for word in [LOAD_ADDRESS, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, no sections
    }
    elf.extend([0; 4]);
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // sizes and counts of headers
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, all access
    let bytes = code.len() as u64;
    for word in [120, LOAD_ADDRESS, LOAD_ADDRESS, bytes, bytes, 1] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn chatty_template(dir: &Path) -> Result<std::path::PathBuf> {
    let (kernel, template) = (dir.join("kernel"), dir.join("t"));
    fs::write(&kernel, chatty_kernel())?;
    finish(
        pando(&["template", "create", "--memory", "64M", "--ready"])?
            .arg("serial:pando!")
            .arg("--kernel")
            .arg(&kernel)
            .arg(&template),
    )?
    .expect_code(0)?;
    Ok(template)
}

#[test]
fn a_reader_that_stalls_stops_neither_metrics_nor_burials_nor_signals() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = chatty_template(dir.path())?;
    let mut running = Running::start(
        pando(&["clone", "--count", "3", "--metrics", "127.0.0.1:0"])?.arg(&template),
    )?;
    let address = address(&mut running)?;
    let stdout = running.child.stdout.take().context("no pipe")?;
    // It is full with less than its size where writes did not end at its pages.
    let (mut last, mut same) = (0, 0);
    eventually("the pipe is full", || {
        let bytes = rustix::io::ioctl_fionread(stdout.as_fd()).unwrap_or(0);
        same = if bytes == last { same + 1 } else { 0 };
        last = bytes;
        bytes > PIPE_BYTES / 2 && same > 200
    })?;
    let ended = |address: &str| {
        let exposition = scrape(address).unwrap_or_default();
        sum(&exposition, "pando_clone_failures_total")
    };
    assert_eq!(ended(&address), Some(0.0));
    let clones = running.clones();
    signal_pid(clones[0], Signal::KILL)?;
    eventually("the clone is buried", || ended(&address) == Some(1.0))?;
    running.signal(Signal::TERM)?;
    assert_eq!(running.wait()?, Some(1));
    running.child.stdout = Some(stdout);
    let finished = running.finish()?.expect_error(&[
        "lines of clones were dropped: standard output was not read",
        "1 of 3 clones failed",
    ])?;
    assert!(finished.stdout.contains("] pando!\n"));
    assert!(clones.iter().all(|&pid| !is_alive(pid)));
    Ok(())
}
