#![forbid(unsafe_code)]
//! COM1 and a monitor on one end: `-nographic`, `mon:` and `mux=on`, with the escapes of Ctrl-A.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use pando_tests::command::{HANG, Running, eventually, finish, pando};
use pando_tests::qemu::write;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Both directions of an end.
struct Talk<R, W> {
    reader: R,
    writer: W,
    seen: String,
}

impl<R: Read + AsFd, W: Write> Talk<R, W> {
    fn new(reader: R, writer: W) -> Self {
        let seen = String::new();
        Self {
            reader,
            writer,
            seen,
        }
    }

    fn send(&mut self, text: &str) -> Result<()> {
        self.writer.write_all(text.as_bytes())?;
        Ok(self.writer.flush()?)
    }

    /// Reads up to `text`; what came before it and had not been asked for.
    fn wait(&mut self, text: &str) -> Result<String> {
        while !self.seen.contains(text) {
            let mut fds = [PollFd::new(&self.reader, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&Timespec::try_from(HANG)?))?;
            ensure!(ready > 0, "no {text:?} in: {}", self.seen);
            let mut buffer = [0; 512];
            let count = self.reader.read(&mut buffer)?;
            ensure!(count > 0, "it ended without {text:?}: {}", self.seen);
            self.seen += &String::from_utf8_lossy(&buffer[..count]);
        }
        let at = self.seen.find(text).unwrap_or(0) + text.len();
        Ok(self.seen.drain(..at).collect())
    }
}

/// From COM1 to the monitor and back.
fn there_and_back<R: Read + AsFd, W: Write>(talk: &mut Talk<R, W>) -> Result<()> {
    talk.wait("pando guest ready")?;
    talk.send("\x01c")?;
    talk.wait("- type 'help' for more information\r\n(qemu) ")?;
    talk.send("info stax\x7ftus\r")?;
    talk.wait("info stax\x08 \x08tus\r\nVM status: running\r\n(qemu) ")?;
    // What the monitor was not given ends with the switch, and comes again with it.
    talk.send("sto\x01c")?;
    talk.wait("sto\r\n")?;
    talk.send(&format!("{}\n", write(4, 1)))?;
    talk.wait("ok w")?;
    talk.send("\x01c")?;
    talk.wait("(qemu) sto")?;
    talk.send("p\rinfo status\r")?;
    talk.wait("VM status: paused")?;
    talk.send("\x01s\x01h")?;
    talk.wait("C-a h    print this help\r\n")?;
    talk.wait("C-a C-a  sends C-a\r\n")?;
    Ok(())
}

#[test]
fn nographic_has_com1_and_a_monitor_on_one_terminal() -> Result<()> {
    let mut command = pando(&["qemu", "-nographic", "-m", "64M", "-kernel", "embedded"])?;
    let mut running = Running::start(command.stdin(Stdio::piped()))?;
    let input = running.child.stdin.take().context("no standard input")?;
    let output = running.child.stdout.take().context("no standard output")?;
    let mut talk = Talk::new(output, input);
    there_and_back(&mut talk)?;
    talk.send("\x01x")?;
    talk.wait("QEMU: Terminated")?;
    assert_eq!(running.wait()?, Some(0));
    Ok(())
}

#[test]
fn a_shared_socket_with_a_log_outlives_its_clients_and_resets() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let chardev = "socket,id=m,path=mux,server=on,wait=off,mux=on,logfile=log";
    let mut command = pando(&["qemu", "-nodefaults", "-m", "64M", "-kernel", "embedded"])?;
    command.current_dir(dir.path()).args([
        "-chardev",
        chardev,
        "-serial",
        "chardev:m",
        "-mon",
        "chardev=m,mode=readline",
    ]);
    let mut running = Running::start(&mut command)?;
    let connect = || -> Result<Talk<UnixStream, UnixStream>> {
        let mut stream = None;
        eventually("it listens", || {
            stream = UnixStream::connect(dir.path().join("mux")).ok();
            stream.is_some()
        })?;
        let stream = stream.context("no connection")?;
        stream.set_read_timeout(Some(HANG))?;
        Ok(Talk::new(stream.try_clone()?, stream))
    };
    // Who reads the log needs no client.
    eventually("the log has it", || {
        let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        log.contains("pando guest ready")
    })?;
    let mut talk = connect()?;
    talk.send("\x01c")?;
    talk.wait("(qemu) ")?;
    talk.send("system_reset\r")?;
    talk.wait("pando guest ready")?;
    drop(talk);
    let mut talk = connect()?;
    // The terminal is still the monitor's.
    talk.send("quit\r")?;
    talk.wait("quit\r\n")?;
    assert_eq!(running.wait()?, Some(0));
    let log = fs::read_to_string(dir.path().join("log"))?;
    assert_eq!(log.matches("pando guest ready").count(), 2, "{log}");
    Ok(())
}

#[test]
fn what_a_guest_prints_last_comes_out_and_its_log_has_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (serial, more) in [
        ("mon:stdio", [].as_slice()),
        ("chardev:s", &["-chardev", "stdio,id=s,logfile=log"]),
    ] {
        let mut command = pando(&["qemu", "-nodefaults", "-m", "64M", "-kernel", "embedded"])?;
        command.current_dir(dir.path()).args(["-serial", serial]);
        let mut running = Running::start(command.args(more).stdin(Stdio::piped()))?;
        let input = running.child.stdin.take().context("no standard input")?;
        let output = running.child.stdout.take().context("no standard output")?;
        let mut talk = Talk::new(output, input);
        talk.wait("pando guest ready")?;
        // It prints an answer, and is off.
        talk.send(&format!("{}\np\n", write(4, 1)))?;
        assert_eq!(running.wait()?, Some(0));
        talk.wait("ok w")?;
    }
    let log = fs::read_to_string(dir.path().join("log"))?;
    assert!(log.contains("ok w"), "{log}");
    Ok(())
}

#[test]
fn messages_have_the_time_where_it_is_wanted() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let link = dir.path().join("kvm");
    std::os::unix::fs::symlink(pando(&["x"])?.get_program(), &link)?;
    let mut command = std::process::Command::new(&link);
    command.args(["-m", "64M", "-incoming", "file:none"]);
    let plain = finish(command.current_dir(dir.path()))?.expect_code(1)?;
    assert!(plain.stderr.starts_with("kvm: -incoming"), "{plain:?}");
    let timed = finish(command.args(["-msg", "timestamp=on"]))?.expect_code(1)?;
    let (time, rest) = timed.stderr.split_once(' ').context("no time")?;
    assert!(time.len() == 27 && time.ends_with('Z'), "{time}");
    assert!(rest.starts_with("kvm: -incoming"), "{rest}");
    Ok(())
}

#[test]
fn what_cannot_be_shared_is_refused() -> Result<()> {
    for (words, why) in [
        (
            ["-nographic", "-monitor", "stdio"].as_slice(),
            "cannot use stdio by multiple character devices",
        ),
        (
            &["-nographic", "-daemonize"],
            "-nographic cannot be used with -daemonize",
        ),
        (
            &["-nodefaults", "-serial", "mon:none"],
            "has nothing that a monitor could share",
        ),
        (
            &[
                "-chardev",
                "stdio,id=a,logfile=l",
                "-mon",
                "a",
                "-serial",
                "none",
            ],
            "logfile cannot be had for a monitor",
        ),
        (
            &[
                "-chardev",
                "stdio,id=a",
                "-mon",
                "a",
                "-serial",
                "chardev:a",
            ],
            "chardev \"a\" not found, or in use already",
        ),
    ] {
        let mut command = pando(&["qemu", "-m", "64M", "-S"])?;
        finish(command.args(words))?
            .expect_code(1)?
            .expect_error(&[why])?;
    }
    Ok(())
}
