#![forbid(unsafe_code)]
//! The host's end of connections: programs that reach a guest, and that it reaches.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::vsock_guest::{Guest, Packet, REQUEST, RESPONSE};

/// Longer than anything here takes.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// A folder of sockets, and programs that use them.
pub(super) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(super) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A program that wants to reach a port of the guest.
    pub(super) fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    /// A program that the guest reaches at a port.
    pub(super) fn listen(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("v_{port}"));
        UnixListener::bind(path).unwrap()
    }
}

pub(super) fn read(stream: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    stream.read_exact(&mut data).unwrap();
    data
}

/// Whether the other end has closed.
pub(super) fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 16]) {
        Ok(0) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}

/// A connection that the host asked for and got; the guest's port is 52.
pub(super) fn connected(host: &Host, guest: &mut Guest) -> (UnixStream, (u32, u32)) {
    let mut stream = host.connect(52);
    let request = guest.receive();
    assert_eq!((request.op, request.ports.1), (REQUEST, 52));
    let ports = (52, request.ports.0);
    guest.send(&Packet::new(RESPONSE, ports));
    let line = format!("OK {}\n", ports.1);
    assert_eq!(read(&mut stream, line.len()), line.as_bytes());
    (stream, ports)
}

/// A connection that the guest asked for and got; the host's port is 99.
pub(super) fn dialled(listener: &UnixListener, guest: &mut Guest) -> (UnixStream, (u32, u32)) {
    let ports = (1025, 99);
    guest.send(&Packet::new(REQUEST, ports));
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(guest.receive().op, RESPONSE);
    (stream, ports)
}
