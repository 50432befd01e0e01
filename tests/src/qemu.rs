#![forbid(unsafe_code)]
//! `pando qemu` as a person runs it, and a QMP client of the plainest kind.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::command::{Finished, HANG, Running, eventually, pando};

/// A QMP connection.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came, oldest first.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects; the greeting is what the first call gets.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(HANG))?;
        Ok(Self {
            reader: BufReader::new(stream),
            events: Vec::new(),
        })
    }

    /// Connects and negotiates.
    pub fn open(path: &Path) -> Result<Self> {
        let mut qmp = Self::connect(path)?;
        let greeting = qmp.receive()?;
        ensure!(greeting["QMP"].is_object(), "no greeting: {greeting}");
        qmp.ok("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.reader.get_mut().write_all(bytes)?)
    }

    /// Sends `bytes` again and again, and reads nothing, until no more goes.
    pub fn stall(&mut self, bytes: &[u8]) -> Result<()> {
        let stream = self.reader.get_mut();
        stream.set_write_timeout(Some(Duration::from_millis(500)))?;
        let start = Instant::now();
        loop {
            match stream.write_all(bytes) {
                Ok(()) => ensure!(start.elapsed() < HANG, "everything is taken"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The socket, to send what no text can say.
    pub fn socket(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// The next message, whatever it is.
    pub fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "the monitor is gone");
        serde_json::from_str(&line).with_context(|| format!("no JSON: {line}"))
    }

    /// The next message that is no event.
    pub fn answer(&mut self) -> Result<Value> {
        loop {
            let message = self.receive()?;
            if message.get("event").is_none() {
                return Ok(message);
            }
            self.events.push(message);
        }
    }

    /// Sends a line and takes its answer.
    pub fn line(&mut self, line: &str) -> Result<Value> {
        self.send(format!("{line}\n").as_bytes())?;
        self.answer()
    }

    /// A command; the whole answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.line(&json!({"execute": command, "arguments": arguments}).to_string())
    }

    /// A command that must be done; what it returns.
    pub fn ok(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let answer = self.execute(command, arguments)?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => bail!("{command}: {answer}"),
        }
    }

    /// A command that must be refused; how.
    pub fn refused(&mut self, command: &str, arguments: &Value) -> Result<String> {
        let answer = self.execute(command, arguments)?;
        let desc = answer["error"]["desc"].as_str();
        desc.map(str::to_owned)
            .with_context(|| format!("{command} was done: {answer}"))
    }

    /// What `query-status` says.
    pub fn status(&mut self) -> Result<String> {
        let status = self.ok("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Switches a migration capability on.
    pub fn capability(&mut self, name: &str) -> Result<()> {
        let list = json!([{"capability": name, "state": true}]);
        self.ok("migrate-set-capabilities", &json!({"capabilities": list}))?;
        Ok(())
    }

    /// Waits for the end of a migration and returns what `query-migrate` says then.
    pub fn migrated(&mut self) -> Result<Value> {
        let start = Instant::now();
        loop {
            let answer = self.ok("query-migrate", &json!({}))?;
            if matches!(
                answer["status"].as_str(),
                Some("completed" | "failed" | "cancelled")
            ) {
                return Ok(answer);
            }
            ensure!(start.elapsed() < HANG, "migration hangs: {answer}");
        }
    }

    /// Waits until a device is deleted, as its event says; takes the events until then.
    pub fn deleted(&mut self, id: &str) -> Result<Vec<Value>> {
        let told =
            |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
        while !self.events.iter().any(told) {
            let message = self.receive()?;
            self.events.push(message);
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Names of the events that came.
    pub fn event_names(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| event["event"].as_str())
            .collect()
    }
}

/// A machine that was started by QEMU's options, in a directory of its own.
#[derive(Debug)]
pub struct QemuVm {
    /// The process.
    pub running: Running,
    /// Its monitor.
    pub qmp: Qmp,
    serial: PathBuf,
}

/// The options for memory on `file` in a machine of 64 MiB; `how` is what follows its size.
pub fn memory(file: &str, how: &str) -> Vec<String> {
    let object = format!("memory-backend-file,id=pc.ram,mem-path={file},size=64M,{how}");
    let words = [
        "-m",
        "64M",
        "-object",
        &object,
        "-machine",
        "q35,memory-backend=pc.ram",
    ];
    words.map(str::to_owned).to_vec()
}

/// What makes memory that of a clone.
pub const CLONE: &str = "share=off,readonly=on,rom=off";

impl QemuVm {
    /// Starts `pando qemu` in `dir`, with a monitor and COM1 on sockets that begin with `name`.
    pub fn start(dir: &Path, name: &str, words: &[String]) -> Result<Self> {
        let (monitor, serial) = (
            dir.join(format!("{name}.qmp")),
            dir.join(format!("{name}.com1")),
        );
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
        command.current_dir(dir).args(words).args([
            "-qmp",
            &socket(&monitor),
            "-serial",
            &socket(&serial),
        ]);
        let mut running = Running::start(&mut command)?;
        // A socket may be there that is dead.
        eventually("the monitor is there", || {
            UnixStream::connect(&monitor).is_ok() || !matches!(running.child.try_wait(), Ok(None))
        })?;
        match Qmp::open(&monitor) {
            Ok(qmp) => Ok(Self {
                running,
                qmp,
                serial,
            }),
            Err(error) => {
                let finished = running.finish()?;
                bail!("{error:#}: {:?} {}", finished.code, finished.stderr)
            }
        }
    }

    /// Connects to COM1.
    pub fn serial(&self) -> Result<Serial> {
        let stream = UnixStream::connect(&self.serial)?;
        stream.set_read_timeout(Some(HANG))?;
        Ok(Serial(BufReader::new(stream)))
    }

    /// Ends it by `quit`; what it left.
    pub fn quit(mut self) -> Result<Finished> {
        self.qmp.ok("quit", &json!({}))?;
        self.running.finish()?.expect_code(0)
    }
}

/// COM1 of a machine that runs the built-in guest.
#[derive(Debug)]
pub struct Serial(BufReader<UnixStream>);

impl Serial {
    /// Reads a line.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "COM1 is gone");
        Ok(line.trim_end().to_owned())
    }

    /// Waits until the guest is ready.
    pub fn ready(&mut self) -> Result<()> {
        while self.line()? != "pando guest ready" {}
        Ok(())
    }

    /// Sends what the guest reads.
    pub fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    /// Sends a command to the built-in guest and returns its answer.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.0
            .get_mut()
            .write_all(format!("{command}\n").as_bytes())?;
        self.line()
    }

    /// Whether the guest's pages hold what [`write()`] with this salt put there.
    pub fn holds(&mut self, pages: u64, salt: u64) -> Result<bool> {
        let answer = self.ask(&format!(
            "v {FIRST_PAGE:x} {pages:x} {pages:x} 0 0 {salt:x}"
        ))?;
        ensure!(answer.starts_with("ok v"), "{answer}");
        Ok(answer.starts_with(&format!("ok v {pages:x} 0 ")))
    }
}

/// Makes a template of the built-in guest in `dir`: RAM in `template`, the state in `state`. The guest
/// has written `pages` pages with salt 7 first.
pub fn make_template(dir: &Path, pages: u64) -> Result<()> {
    let mut words = memory("template", "share=on");
    words.extend(["-kernel", "embedded"].map(str::to_owned));
    let mut vm = QemuVm::start(dir, "template", &words)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    let answer = serial.ask(&write(pages, 7))?;
    ensure!(answer.starts_with("ok w"), "{answer}");
    vm.qmp.ok("stop", &json!({}))?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    let end = vm.qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    ensure!(vm.qmp.status()? == "postmigrate");
    vm.quit()?;
    Ok(())
}

/// First page of the memory that the built-in guest gives to data in these tests: 16 MiB.
const FIRST_PAGE: u64 = 0x1000;

/// The command to write a word into each of `pages` pages.
pub fn write(pages: u64, salt: u64) -> String {
    format!("w {FIRST_PAGE:x} {pages:x} {pages:x} 0 0 {salt:x}")
}

/// Words of a command line.
pub fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|&word| word.to_owned()).collect()
}

/// An empty image of 1 MiB; gives its path.
pub fn image(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    File::create(&path)?.set_len(1 << 20)?;
    Ok(path.display().to_string())
}

/// A machine of 64 MiB with the built-in guest, which is ready for commands.
pub fn ready(dir: &Path, more: &[&str]) -> Result<(QemuVm, Serial)> {
    let mut all = words(&["-m", "64M", "-kernel", "embedded"]);
    all.extend(words(more));
    let vm = QemuVm::start(dir, "a", &all)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    Ok((vm, serial))
}
