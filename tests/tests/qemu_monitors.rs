#![forbid(unsafe_code)]
//! The ways to a monitor and to COM1, descriptors that come with a message, and files of options.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use pando_tests::command::{Running, eventually, finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, make_template, memory, words};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

#[test]
fn a_monitor_on_tcp_a_terminal_and_a_chardev() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let tcp = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let path = dir.path().join("named");
    let chardev = format!("socket,id=c,path={},server,nowait", path.display());
    let mut command = pando(&["qemu", "-nodefaults", "-m", "64M", "-S", "-qmp", &tcp])?;
    command.args([
        "-chardev",
        &chardev,
        "-mon",
        "chardev=c,mode=control,pretty=on",
    ]);
    command.args(["-serial", "pty"]);
    let mut running = Running::start(&mut command)?;
    let terminal = running.wait_stderr("char device redirected to /dev/pts/")?;
    assert!(terminal.ends_with("(label serial0)"), "{terminal}");
    let mut stream = None;
    eventually("it listens", || {
        stream = TcpStream::connect(("127.0.0.1", port)).ok();
        stream.is_some()
    })?;
    let mut reader = BufReader::new(stream.context("no connection")?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    assert!(line.starts_with("{\"QMP\": {"), "{line}");
    eventually("the other is there", || path.exists())?;
    let mut named = BufReader::new(UnixStream::connect(&path)?);
    named
        .get_mut()
        .write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}")?;
    let mut text = String::new();
    while named.read_line(&mut text)? > 0 {}
    assert!(text.contains("\n    \"return\": {}"), "{text}");
    assert_eq!(running.wait()?, Some(0));
    assert!(!path.exists(), "the socket stays");
    Ok(())
}

#[test]
fn a_state_goes_through_descriptors() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), 8)?;
    let mut clone_words = memory("template", CLONE);
    clone_words.extend(words(&["-incoming", "defer"]));
    let mut clone = QemuVm::start(dir.path(), "c", &clone_words)?;
    assert_eq!(
        clone.qmp.refused("getfd", &json!({"fdname": "state"}))?,
        "No file descriptor supplied via SCM_RIGHTS"
    );
    let state = File::open(dir.path().join("state"))?;
    let message = b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"state\"}}\n";
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [state.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(
        clone.qmp.socket(),
        &[IoSlice::new(message)],
        &mut ancillary,
        SendFlags::empty(),
    )?;
    assert_eq!(sent, message.len());
    assert_eq!(clone.qmp.answer()?, json!({"return": {}}));
    clone.qmp.capability("x-ignore-shared")?;
    assert!(
        clone
            .qmp
            .refused("migrate-incoming", &json!({"uri": "fd:other"}))?
            .contains("'other' has not been found")
    );
    clone
        .qmp
        .ok("migrate-incoming", &json!({"uri": "fd:state"}))?;
    assert_eq!(clone.qmp.migrated()?["status"], "completed");
    clone.quit()?;
    // A file that the program was started with.
    let script = "exec \"$0\" qemu -nodefaults -S \"$@\" -incoming fd:7 -qmp stdio 7<state";
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", script])
        .arg(pando(&["x"])?.get_program())
        .args(memory("template", CLONE))
        .current_dir(dir.path())
        .stdin(std::process::Stdio::piped());
    let mut running = Running::start(&mut command)?;
    let mut stdin = running.child.stdin.take().context("no standard input")?;
    stdin.write_all(
        b"{'execute':'qmp_capabilities'}{'execute':'query-migrate'}{'execute':'quit'}",
    )?;
    let finished = running.finish()?.expect_code(0)?;
    assert!(
        finished.stdout.contains("\"status\": \"completed\""),
        "{}",
        finished.stdout
    );
    Ok(())
}

#[test]
fn options_from_a_file_and_as_json() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::write(
        dir.path().join("config"),
        "# a template\n[object \"ram\"]\n  qom-type = \"memory-backend-file\"\n  mem-path = \"file\"\n  size = \"64M\"\n  \
         share = \"on\"\n[machine]\n  type = \"q35\"\n  memory-backend = \"ram\"\n[memory]\n  size = \"64M\"\n",
    )?;
    let mut vm = QemuVm::start(dir.path(), "a", &words(&["-readconfig", "config", "-S"]))?;
    let backends = vm.qmp.ok("query-memdev", &json!({}))?;
    assert_eq!(
        (&backends[0]["id"], &backends[0]["share"]),
        (&json!("ram"), &Value::Bool(true))
    );
    vm.quit()?;
    let object = r#"{"qom-type": "memory-backend-file", "id": "ram", "mem-path": "file", "size": 67108864, "readonly": true, "rom": "off"}"#;
    let json = words(&[
        "-m",
        "64M",
        "-object",
        object,
        "-machine",
        "q35,memory-backend=ram",
        "-S",
    ]);
    let mut vm = QemuVm::start(dir.path(), "b", &json)?;
    let get = json!({"path": "/objects/ram", "property": "readonly"});
    assert_eq!(vm.qmp.ok("qom-get", &get)?, true);
    vm.quit()?;
    fs::write(dir.path().join("bad"), "[object \"ram\"]\n  size\n")?;
    let mut wrong = pando(&["qemu", "-readconfig", "bad"])?;
    let wrong = finish(wrong.current_dir(dir.path()))?.expect_code(1)?;
    assert_eq!(wrong.stderr, "pando: bad:2: parse error\n");
    Ok(())
}

#[test]
fn a_socket_that_is_in_use_is_refused_and_one_that_is_dead_is_replaced() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let first = QemuVm::start(dir.path(), "a", &words(&["-m", "64M", "-S"]))?;
    let taken = format!(
        "unix:{},server=on,wait=off",
        dir.path().join("a.qmp").display()
    );
    let mut second = pando(&["qemu", "-nodefaults", "-m", "64M", "-S", "-qmp", &taken])?;
    finish(&mut second)?
        .expect_code(1)?
        .expect_error(&["Failed to bind socket to", "Address already in use"])?;
    first.running.signal(rustix::process::Signal::KILL)?;
    let mut running = first.running;
    running.wait()?;
    assert!(dir.path().join("a.qmp").exists());
    let again = QemuVm::start(dir.path(), "a", &words(&["-m", "64M", "-S"]))?;
    again.quit()?;
    Ok(())
}
