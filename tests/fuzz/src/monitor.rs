#![forbid(unsafe_code)]
//! Monitors: what a client sends, through the server with its limits and its negotiation, to the
//! commands of a machine that waits for a state and so needs no KVM.
//!
//! The first byte is the monitor: 0 QMP, 1 QMP with indented answers, 2 for people.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use pando_vmm::qemu::hmp;
use pando_vmm::qemu::line::arguments;
use pando_vmm::qemu::line::chardev::Chardev;
use pando_vmm::qemu::line::wanted::{self, MonitorOption};
use pando_vmm::qemu::qmp::commands::{self, COMMANDS};
use pando_vmm::qemu::qmp::json::Reader;
use pando_vmm::qemu::qmp::port::{Ask, Port, Reply};
use pando_vmm::qemu::qmp::server;
use pando_vmm::qemu::vm::{Plan, Vm};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;

use crate::{parts, scratch};

/// Takes what a client sends.
pub fn run(data: &[u8]) {
    let Some((kind, stream)) = parts::kind(data, 3) else {
        return;
    };
    scratch::enter();
    cut_anywhere(stream);
    let option = MonitorOption {
        chardev: Chardev::Null,
        id: "m".to_owned(),
        control: kind < 2,
        pretty: kind == 1,
    };
    let answers = converse(&option, stream);
    if kind == 0 {
        for line in answers
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
        {
            serde_json::from_slice::<Value>(line).expect("each line of an answer is JSON");
        }
    }
    scratch::clean();
}

/// However a stream is cut, the values in it are the same.
fn cut_anywhere(stream: &[u8]) {
    let whole = values(stream, stream.len().max(1));
    assert_eq!(
        whole,
        values(stream, 1),
        "cut into bytes it says something else"
    );
}

fn values(stream: &[u8], cut_bytes: usize) -> Vec<Result<Value, String>> {
    let mut reader = Reader::default();
    let mut values = Vec::new();
    for piece in stream.chunks(cut_bytes) {
        reader.push(piece);
        while let Some(value) = reader.next_value() {
            values.push(value);
        }
    }
    values
}

/// What the monitor answers to all of it.
fn converse(option: &MonitorOption, stream: &[u8]) -> Vec<u8> {
    let (input, mut output) = (file(stream), file(b""));
    let port = Arc::new(Port::new().expect("an eventfd can be had"));
    let mut vm = machine(OWN_RAM, &["-incoming", "defer"]).expect("the machine is right");
    vm.bus().add(Arc::clone(&port));
    let vm = RefCell::new(vm);
    server::serve(option, port, (input.as_fd(), output.as_fd()), |ask| {
        answer(&mut vm.borrow_mut(), ask);
        true
    });
    let mut answers = Vec::new();
    let read = output
        .rewind()
        .and_then(|()| output.read_to_end(&mut answers));
    read.expect("memory can be read");
    answers
}

fn answer(vm: &mut Vm, ask: Ask) {
    match ask {
        Ask::Qmp(mut request, _, reply) => {
            request.arguments.values_mut().for_each(tame);
            let result = commands::execute(vm, &request.command, request.arguments);
            let events = vm.bus().sent();
            let _ = reply.send(Reply { result, events });
        }
        Ask::Hmp(line, reply) => {
            let _ = reply.send(hmp::execute(vm, &scratch::tame(&line)));
        }
    }
}

/// No path of a command leads out of the scratch directory, or to more than a page.
fn tame(value: &mut Value) {
    match value {
        Value::String(text) => *text = scratch::tame(text),
        Value::Array(items) => items.iter_mut().for_each(tame),
        Value::Object(members) => members.values_mut().for_each(tame),
        Value::Null | Value::Bool(_) | Value::Number(_) => (),
    }
}

/// A machine of 4 MiB on a backend `ram`, with further options; it is not made before there is a state.
pub(crate) fn machine(backend: &str, more: &[&str]) -> Option<Vm> {
    let words: Vec<String> = ["-nodefaults", "-S", "-m", "4M", "-object", backend]
        .iter()
        .chain(&["-machine", "memory-backend=ram"])
        .chain(more)
        .map(|&word| word.to_owned())
        .collect();
    let arguments = arguments(&words, &mut |_| Err(String::new())).ok()?;
    let plan = Plan::new(wanted::read(&arguments).ok()?).ok()?;
    Vm::new(plan, Box::new(|_| ())).ok()
}

/// RAM without a file.
pub(crate) const OWN_RAM: &str = "memory-backend-ram,id=ram,size=4M";

/// A file in memory, at its beginning.
pub(crate) fn file(content: &[u8]) -> File {
    let fd = memfd_create("input", MemfdFlags::CLOEXEC).expect("memory can be had");
    let mut file = File::from(fd);
    let written = file.write_all(content).and_then(|()| file.rewind());
    written.expect("memory can be written");
    file
}

/// Each command once, and what is wrong in each way.
pub fn seeds() -> Vec<Vec<u8>> {
    const HELLO: &str = "{\"execute\":\"qmp_capabilities\"}\n";
    let mut seeds: Vec<Vec<u8>> = COMMANDS
        .iter()
        .map(|command| {
            let name = command.name;
            let arguments = ARGUMENTS.iter().find(|(known, _)| *known == name);
            let arguments = arguments.map_or("{}", |(_, arguments)| *arguments);
            let line = format!("{{\"execute\":\"{name}\",\"arguments\":{arguments},\"id\":1}}\n");
            parts::of(0, [HELLO, &line].concat().as_bytes())
        })
        .collect();
    seeds.extend(STREAMS.iter().map(|stream| parts::of(0, stream.as_bytes())));
    let pretty = [HELLO, "{'execute':'query-status'}"].concat();
    seeds.push(parts::of(1, pretty.as_bytes()));
    seeds.extend(
        hmp::COMMANDS
            .iter()
            .map(|(line, _)| parts::of(2, format!("{line}\r\n").as_bytes())),
    );
    seeds.extend(LINES.iter().map(|line| parts::of(2, line.as_bytes())));
    seeds
}

const ARGUMENTS: &[(&str, &str)] = &[
    (
        "object-add",
        r#"{"qom-type":"memory-backend-file","id":"a","size":4096,"mem-path":"f","share":true}"#,
    ),
    ("object-del", r#"{"id":"a"}"#),
    ("qom-list", r#"{"path":"/objects/ram"}"#),
    ("qom-get", r#"{"path":"/objects/ram","property":"size"}"#),
    (
        "qom-set",
        r#"{"path":"/objects/ram","property":"merge","value":true}"#,
    ),
    ("getfd", r#"{"fdname":"f"}"#),
    ("closefd", r#"{"fdname":"f"}"#),
    ("balloon", r#"{"value":1}"#),
    ("migrate", r#"{"uri":"file:s,offset=0x1000"}"#),
    (
        "migrate-incoming",
        r#"{"channels":[{"channel-type":"main","addr":{"transport":"file","filename":"s","offset":0}}],"exit-on-error":false}"#,
    ),
    ("migrate-continue", r#"{"state":"pre-switchover"}"#),
    (
        "migrate-set-capabilities",
        r#"{"capabilities":[{"capability":"events","state":true},{"capability":"x-ignore-shared","state":true}]}"#,
    ),
    (
        "migrate-set-parameters",
        r#"{"max-bandwidth":1,"mode":"normal"}"#,
    ),
    ("human-monitor-command", r#"{"command-line":"info status"}"#),
];

const STREAMS: &[&str] = &[
    "{\"execute\":\"query-status\"}\n",
    "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}{\"exec-oob\":\"stop\",\"id\":[7]}",
    "[1, -2, 3.5e1, true, null, \"\\u00e9\\ud83c\\udf33\\n\"] 'x' {\"a\": \"never ends\n{}\n",
    "hello {\"execute\": } \"\\q\" }]",
    "[[[[[[[[{\"a\":{\"b\":[]}}]]]]]]]]",
];

const LINES: &[&str] = &[
    "migrate -d file:s\nmigrate_incoming file:s\nmigrate_set_capability events on\r\n",
    "info\nfrob\n\n?\n",
];

/// Commands and their words.
pub fn words() -> Vec<String> {
    let names = COMMANDS.iter().map(|command| command.name.to_owned());
    let arguments = COMMANDS
        .iter()
        .flat_map(|command| command.args)
        .map(|arg| format!("\"{}\":", arg.name));
    let lines = hmp::COMMANDS.iter().map(|(line, _)| format!("{line}\n"));
    let backend = [
        "qom-type",
        "memory-backend-file",
        "memory-backend-ram",
        "size",
        "mem-path",
    ];
    let path = [
        "/objects/",
        "/machine",
        "file:",
        "fd:",
        ",offset=",
        "prealloc",
        "\\u",
        "execute",
    ];
    names
        .chain(arguments)
        .chain(lines)
        .chain(backend.iter().chain(&path).map(|&word| word.to_owned()))
        .collect()
}
