#![forbid(unsafe_code)]
//! Whatever comes in on a monitor: the machine goes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Result, ensure};
use pando_tests::command::HANG;
use pando_tests::qemu::{QemuVm, Qmp};
use serde_json::json;

fn start(dir: &Path) -> Result<QemuVm> {
    let words = ["-m", "64M", "-kernel", "embedded"].map(str::to_owned);
    let vm = QemuVm::start(dir, "a", &words)?;
    vm.serial()?.ready()?;
    Ok(vm)
}

/// The guest answers, and so does the monitor.
fn goes_on(vm: &mut QemuVm) -> Result<()> {
    assert_eq!(vm.serial()?.ask("e 2a")?, "ok e 2a");
    assert_eq!(vm.qmp.status()?, "running");
    Ok(())
}

fn desc(qmp: &mut Qmp, line: &str) -> Result<String> {
    let answer = qmp.line(line)?;
    Ok(answer["error"]["desc"]
        .as_str()
        .unwrap_or("none")
        .to_owned())
}

#[test]
fn what_is_wrong_with_a_message_is_said_as_qemu_says_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path())?;
    for (line, expected) in [
        (
            r#"{"execute":"nope"}"#,
            "The command nope has not been found",
        ),
        (
            r#"{"execute":"query-status","arguments":{"x":1}}"#,
            "Parameter 'x' is unexpected",
        ),
        (
            r#"{"execute":"query-status","foo":1}"#,
            "QMP input member 'foo' is unexpected",
        ),
        ("[1]", "QMP input must be a JSON object"),
        (
            r#"{"execute":5}"#,
            "QMP input member 'execute' must be a string",
        ),
        (r#"{"arguments":{}}"#, "QMP input lacks member 'execute'"),
        (r#"{"execute": }"#, "JSON parse error, expecting value"),
        (
            r#"{"execute":"qmp_capabilities"}"#,
            "Capabilities negotiation is already complete, command ignored",
        ),
        (
            r#"{"execute":"closefd","arguments":{}}"#,
            "Parameter 'fdname' is missing",
        ),
        ("hello", "JSON parse error, invalid keyword 'hello'"),
    ] {
        assert_eq!(desc(&mut vm.qmp, line)?, expected, "{line}");
    }
    let answer = vm
        .qmp
        .line(r#"{"execute":"query-status","id":{"a":[1]}}"#)?;
    assert_eq!(answer["id"], json!({"a": [1]}));
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn commands_before_the_negotiation_and_out_of_band() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path())?;
    // The next client of the same monitor.
    drop(std::mem::replace(
        &mut vm.qmp,
        Qmp::connect(&dir.path().join("a.qmp"))?,
    ));
    let qmp = &mut vm.qmp;
    assert!(qmp.receive()?["QMP"]["version"]["qemu"]["major"].is_number());
    assert_eq!(
        desc(qmp, r#"{"execute":"query-status"}"#)?,
        "Expecting capabilities negotiation with 'qmp_capabilities'"
    );
    assert_eq!(
        qmp.refused("qmp_capabilities", &json!({"enable": ["oob"]}))?,
        "Capability oob not available"
    );
    qmp.ok("qmp_capabilities", &json!({}))?;
    assert_eq!(
        desc(qmp, r#"{"exec-oob":"query-status"}"#)?,
        "QMP input member 'exec-oob' is unexpected"
    );
    // Several in one write, in pieces, over lines.
    qmp.send(b"{\"execute\":\"query-name\",\"id\":1}{\"execute\":\n\"query-status\",")?;
    qmp.send(b"'id':2}\r\n")?;
    assert_eq!(qmp.answer()?["id"], 1);
    assert_eq!(qmp.answer()?["id"], 2);
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn malformed_json_before_the_negotiation_is_answered_and_forgotten() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path())?;
    drop(std::mem::replace(
        &mut vm.qmp,
        Qmp::connect(&dir.path().join("a.qmp"))?,
    ));
    vm.qmp.receive()?;
    for (line, expected) in [
        (
            r#"{"execute"}"#,
            "JSON parse error, missing : in object pair",
        ),
        ("}", "JSON parse error, expecting value"),
        (
            r#"{"execute":"qmp_capabilities","arguments":[]}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}"#,
            "Parameter 'enable' does not accept value 'x'",
        ),
        (
            r#"{"execute":"quit"}"#,
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        ),
    ] {
        assert_eq!(desc(&mut vm.qmp, line)?, expected, "{line}");
    }
    // A line that is too long is no negotiation either.
    let long = format!("[\"{}\"]", "x".repeat(1 << 20));
    assert_eq!(desc(&mut vm.qmp, &long)?, "QMP input must be a JSON object");
    vm.qmp.ok("qmp_capabilities", &json!({}))?;
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn garbage_and_endless_lines() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path())?;
    let long = format!(
        r#"{{"execute":"query-status","id":"{}"}}"#,
        "x".repeat(1 << 20)
    );
    assert_eq!(vm.qmp.line(&long)?["return"]["status"], "running");
    let garbage: Vec<u8> = (0..64_u8 << 1)
        .cycle()
        .skip(11)
        .step_by(3)
        .take(1 << 16)
        .collect();
    vm.qmp.send(&garbage)?;
    vm.qmp.send(b"\"}\n]\n{{{{\n\n")?;
    // Whatever was made of that, a line of its own is understood again in the end.
    vm.qmp
        .send(b"\n}}}}\n{\"execute\":\"query-name\",\"id\":\"end\"}\n")?;
    while vm.qmp.answer()?["id"] != "end" {}
    let endless = vec![b'['; 5 << 20];
    vm.qmp.send(&endless)?;
    vm.qmp
        .send(b"\n{\"execute\":\"query-name\",\"id\":\"end\"}\n")?;
    while vm.qmp.answer()?["id"] != "end" {}
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn the_monitor_for_people_takes_endless_lines_and_garbage() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("people");
    let second = format!("unix:{},server=on,wait=off", path.display());
    let words = ["-m", "64M", "-kernel", "embedded", "-monitor", &second].map(str::to_owned);
    let mut vm = QemuVm::start(dir.path(), "a", &words)?;
    vm.serial()?.ready()?;
    let mut people = UnixStream::connect(&path)?;
    people.set_read_timeout(Some(HANG))?;
    // What comes in is taken whether or not anybody has read the answers.
    people.write_all(&vec![b'x'; 1 << 20])?;
    people.write_all(b"\r\n\xff\xfe\0\x1b[A\r\nfrob\r\ninfo status\r\n")?;
    let mut said = String::new();
    let mut piece = [0; 4096];
    while !said.contains("VM status: running") {
        let count = people.read(&mut piece)?;
        ensure!(count > 0, "the monitor is gone: {said}");
        said.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
    assert!(said.contains("the line is too long"), "{said}");
    assert!(said.contains("unknown command: 'frob'"), "{said}");
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn a_hundred_clients_come_and_go_in_the_middle_of_things() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("second");
    let second = format!("unix:{},server=on,wait=off", path.display());
    let words = ["-m", "64M", "-kernel", "embedded", "-qmp", &second].map(str::to_owned);
    let mut vm = QemuVm::start(dir.path(), "a", &words)?;
    vm.serial()?.ready()?;
    for number in 0..100 {
        let mut client = Qmp::connect(&path)?;
        match number % 5 {
            // Before the greeting, in the middle of a message, before the answer, before the negotiation.
            0 => (),
            1 => client.send(b"{\"execute\":\"qmp_cap")?,
            2 => client
                .send(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-qmp-schema\"}\n")?,
            3 => assert!(client.receive()?["QMP"].is_object()),
            // Nothing of those before is left: neither half a message nor a negotiation.
            _ => {
                assert!(client.receive()?["QMP"].is_object());
                assert_eq!(
                    desc(&mut client, r#"{"execute":"query-status"}"#)?,
                    "Expecting capabilities negotiation with 'qmp_capabilities'"
                );
                client.ok("qmp_capabilities", &json!({}))?;
                assert_eq!(client.status()?, "running");
            }
        }
    }
    goes_on(&mut vm)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn a_hundred_clients_wait_their_turn() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path())?;
    let path = dir.path().join("a.qmp");
    let mut crowd = Vec::new();
    for _ in 0..100 {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_nonblocking(true)?;
        let _ = stream.write(b"hello\n");
        crowd.push(stream);
    }
    // One client at a time: they are not even greeted.
    goes_on(&mut vm)?;
    let mut byte = [0];
    assert!(
        crowd
            .iter_mut()
            .all(|stream| stream.read(&mut byte).is_err())
    );
    drop(crowd);
    vm.quit()?;
    Ok(())
}

#[test]
fn a_client_that_does_not_read_misses_events_and_holds_up_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("greedy");
    let second = format!("unix:{},server=on,wait=off", path.display());
    let words = ["-m", "64M", "-kernel", "embedded", "-qmp", &second].map(str::to_owned);
    let mut vm = QemuVm::start(dir.path(), "a", &words)?;
    vm.serial()?.ready()?;
    let mut greedy = Qmp::open(&path)?;
    // Until the answers fill its socket, and its requests the other way too.
    greedy.stall(b"{\"execute\":\"query-qmp-schema\"}\n")?;
    for _ in 0..600 {
        vm.qmp.ok("stop", &json!({}))?;
        vm.qmp.ok("cont", &json!({}))?;
    }
    goes_on(&mut vm)?;
    let stops = vm
        .qmp
        .event_names()
        .into_iter()
        .filter(|name| *name == "STOP");
    assert_eq!(stops.count(), 600);
    let finished = vm.quit()?;
    assert!(
        finished.stderr.contains("events were dropped"),
        "{}",
        finished.stderr
    );
    Ok(())
}
