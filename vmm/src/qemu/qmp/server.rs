#![forbid(unsafe_code)]
//! A monitor's thread: one client at a time, its requests one after the other. A client that does
//! not read holds up this thread and nothing else.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::json;
use super::message::{self, Class, QmpError};
use super::port::{Ask, Port, Reply};
use crate::qemu::line::wanted::MonitorOption;
use crate::qemu::link::Link;

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Descriptors that can come with one message.
const MAX_FDS: usize = 8;
/// Stack of a monitor's thread: values inside each other are parsed by recursion.
const STACK_BYTES: usize = 8 << 20;
/// Most bytes of a line for people.
const MAX_LINE_BYTES: usize = 64 << 10;

/// A monitor that was started.
#[derive(Debug)]
pub struct Monitor {
    /// Its events.
    pub port: Arc<Port>,
    /// Says when the thread has ended.
    pub ended: Receiver<()>,
}

/// Starts a monitor on an open link; what it is asked goes to `requests`, made a message by `wrap`.
pub fn start<T: Send + 'static>(
    option: &MonitorOption,
    link: Link,
    requests: Sender<T>,
    wrap: fn(Ask) -> T,
) -> io::Result<Monitor> {
    let port = Arc::new(Port::new()?);
    let (done, ended) = bounded(1);
    let server = Server {
        control: option.control,
        pretty: option.pretty,
        port: Arc::clone(&port),
        ask: move |ask| requests.send(wrap(ask)).is_ok(),
    };
    thread::Builder::new()
        .name("monitor".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            server.run(link);
            let _ = done.send(());
        })?;
    Ok(Monitor { port, ended })
}

/// Serves one client on this thread, until it goes. What it asks goes to `ask`, which says whether
/// there is anybody to answer.
pub fn serve(
    option: &MonitorOption,
    port: Arc<Port>,
    (input, output): (BorrowedFd<'_>, BorrowedFd<'_>),
    ask: impl Fn(Ask) -> bool,
) {
    let server = Server {
        control: option.control,
        pretty: option.pretty,
        port,
        ask,
    };
    server.serve(input, output, false);
}

struct Server<A> {
    control: bool,
    pretty: bool,
    port: Arc<Port>,
    ask: A,
}

/// A connected client.
struct Client<'a> {
    input: BorrowedFd<'a>,
    output: BorrowedFd<'a>,
    is_socket: bool,
    negotiated: bool,
    reader: json::Reader,
    line: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// What a wait was ended by.
struct Ready {
    events: bool,
    input: bool,
}

impl<A: Fn(Ask) -> bool> Server<A> {
    fn run(&self, link: Link) {
        match link {
            Link::Null | Link::File(_) => (),
            Link::Stdio => {
                let (input, output) = (io::stdin(), io::stdout());
                self.serve(input.as_fd(), output.as_fd(), false);
            }
            Link::Pty(pty) => self.serve(pty.master.as_fd(), pty.master.as_fd(), false),
            Link::Stream(stream) => self.serve(stream.as_fd(), stream.as_fd(), true),
            Link::Listener(listener, mut first) => {
                while !self.port.is_closing() {
                    if let Some(client) = first.take().or_else(|| listener.accept()) {
                        self.serve(client.as_fd(), client.as_fd(), true);
                        continue;
                    }
                    self.wait(listener.as_fd());
                }
            }
        }
    }

    fn wait(&self, input: BorrowedFd<'_>) -> Ready {
        let mut fds = [
            PollFd::new(&*self.port, PollFlags::IN),
            PollFd::from_borrowed_fd(input, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => Ready {
                events: !fds[0].revents().is_empty(),
                input: !fds[1].revents().is_empty(),
            },
            Err(_) => Ready {
                events: false,
                input: false,
            },
        }
    }

    /// Serves one client until it goes, or this process ends.
    fn serve(&self, input: BorrowedFd<'_>, output: BorrowedFd<'_>, is_socket: bool) {
        let mut client = Client {
            input,
            output,
            is_socket,
            negotiated: false,
            reader: json::Reader::default(),
            line: Vec::new(),
            fds: Vec::new(),
        };
        let hello = if self.control {
            message::write(&message::greeting(), self.pretty)
        } else {
            hmp_hello()
        };
        if client.send(&hello).is_ok() {
            // However it ended: the next client is another one.
            let _ = self.converse(&mut client);
        }
        self.port.listen(false);
    }

    fn converse(&self, client: &mut Client<'_>) -> Result<(), Errno> {
        loop {
            let ready = self.wait(client.input);
            if ready.events {
                self.send_events(client, u64::MAX)?;
            }
            if self.port.is_closing() {
                return Ok(());
            }
            if !ready.input {
                continue;
            }
            let bytes = client.receive()?;
            if bytes.is_empty() {
                return Ok(());
            }
            if self.control {
                self.take_values(client, &bytes)?;
            } else {
                self.take_lines(client, &bytes)?;
            }
        }
    }

    fn send_events(&self, client: &mut Client<'_>, number: u64) -> Result<(), Errno> {
        for event in self.port.take(number) {
            client.send(&message::write(&event, self.pretty))?;
        }
        Ok(())
    }

    fn take_values(&self, client: &mut Client<'_>, bytes: &[u8]) -> Result<(), Errno> {
        client.reader.push(bytes);
        while let Some(value) = client.reader.next_value() {
            let (id, reply) = match value {
                Ok(value) => {
                    let received = message::receive(value);
                    let reply = match received.request {
                        Ok(request) => self.one(client, request),
                        Err(error) => here(Err(error)),
                    };
                    (received.id, reply)
                }
                Err(why) => (None, here(Err(QmpError::generic(why)))),
            };
            // What happened while it was done comes first, and what came of it behind.
            self.send_events(client, reply.events)?;
            let answer = message::answer(id, reply.result);
            client.send(&message::write(&answer, self.pretty))?;
        }
        Ok(())
    }

    fn one(&self, client: &mut Client<'_>, request: message::Request) -> Reply {
        if client.negotiated && request.command != "qmp_capabilities" {
            let fds = std::mem::take(&mut client.fds);
            let (reply, answer) = bounded(1);
            return if (self.ask)(Ask::Qmp(request, fds, reply)) {
                answer.recv().ok()
            } else {
                None
            }
            .unwrap_or_else(|| here(Err(QmpError::generic("the machine has ended"))));
        }
        here(self.own(client, &request))
    }

    /// What the monitor answers by itself.
    fn own(
        &self,
        client: &mut Client<'_>,
        request: &message::Request,
    ) -> Result<serde_json::Value, QmpError> {
        let not_found = |desc: String| QmpError::of(Class::CommandNotFound, desc);
        match (request.command.as_str(), client.negotiated) {
            ("qmp_capabilities", false) => {
                super::commands::negotiate(&request.arguments)?;
                client.negotiated = true;
                self.port.listen(true);
                Ok(serde_json::json!({}))
            }
            ("qmp_capabilities", true) => Err(not_found(
                "Capabilities negotiation is already complete, command ignored".to_owned(),
            )),
            _ => Err(not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
            )),
        }
    }

    fn take_lines(&self, client: &mut Client<'_>, bytes: &[u8]) -> Result<(), Errno> {
        client.line.extend(bytes);
        while let Some(end) = client
            .line
            .iter()
            .position(|byte| matches!(byte, b'\n' | b'\r'))
        {
            let line: Vec<u8> = client.line.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).trim().to_owned();
            let (reply, answer) = bounded(1);
            if line.is_empty() {
                continue;
            }
            if !(self.ask)(Ask::Hmp(line, reply)) {
                return Ok(());
            }
            let mut text = answer.recv().unwrap_or_default();
            text.push_str(PROMPT);
            client.send(text.as_bytes())?;
        }
        if client.line.len() > MAX_LINE_BYTES {
            client.line.clear();
            client.send(b"the line is too long\r\n(qemu) ")?;
        }
        Ok(())
    }
}

/// An answer that no machine was asked for.
fn here(result: Result<serde_json::Value, QmpError>) -> Reply {
    Reply {
        result,
        events: u64::MAX,
    }
}

const PROMPT: &str = "(qemu) ";

fn hmp_hello() -> Vec<u8> {
    let (major, minor, micro) = message::QEMU_VERSION;
    format!(
        "QEMU {major}.{minor}.{micro} monitor ({}) - type 'help' for more information\r\n{PROMPT}",
        message::PACKAGE
    )
    .into_bytes()
}

impl Client<'_> {
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match rustix::io::write(self.output, bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => (),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// What has come; nothing at the end of the stream.
    fn receive(&mut self) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; READ_BYTES];
        let count = if self.is_socket {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                self.input,
                &mut [io::IoSliceMut::new(&mut buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                    // Only what comes with a command is of use.
                    let surplus = self.fds.len().saturating_sub(MAX_FDS);
                    self.fds.drain(..surplus);
                }
            }
            received.bytes
        } else {
            rustix::io::read(self.input, &mut buffer)?
        };
        buffer.truncate(count);
        Ok(buffer)
    }
}
