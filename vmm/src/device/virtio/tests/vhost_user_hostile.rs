#![forbid(unsafe_code)]
//! Backends that lie, stop in the middle, say nothing, or go away: each is an error that names its socket, in
//! bounded time, and a guest's device that is broken at most.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

use super::driver::{ADDRESS, Driver, VERSION_1};
use super::vhost_user::shared_ram;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::device::virtio::vhost_user::device::VhostUser;
use crate::report::one_line;

/// Longer than any step takes, whatever the backend does.
const LIMIT: Duration = Duration::from_secs(10);
/// Requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;

/// What a backend does when it is asked something.
#[derive(Debug, Clone)]
enum Act {
    /// It answers as it should.
    Right,
    /// It sends these bytes.
    Bytes(Vec<u8>),
    /// It says nothing, and keeps the socket.
    Silence,
    /// It sends a byte now and then.
    Drip,
    /// It closes the socket.
    Close,
}

/// A backend that behaves, but for one request.
struct Peer {
    folder: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn start(request: u32, act: Act) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let thread = thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else {
                return;
            };
            while let Some(asked) = next(&mut stream) {
                let answer = if asked.0 == request {
                    act.clone()
                } else {
                    Act::Right
                };
                if !perform(&mut stream, &asked, &answer) {
                    return;
                }
            }
        });
        Self {
            folder,
            thread: Some(thread),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The next request: its number, whether an answer is wanted, and its body.
fn next(stream: &mut UnixStream) -> Option<(u32, bool, Vec<u8>)> {
    let mut head = [0; 12];
    stream.read_exact(&mut head).ok()?;
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
    let mut body = vec![0; usize::try_from(word(8)).unwrap()];
    stream.read_exact(&mut body).ok()?;
    Some((word(0), word(4) & 8 != 0, body))
}

fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let words = [request, 5, length].map(u32::to_le_bytes);
    [words.concat().as_slice(), body].concat()
}

/// Whether the conversation goes on.
fn perform(
    stream: &mut UnixStream,
    (request, wants, body): &(u32, bool, Vec<u8>),
    act: &Act,
) -> bool {
    match act {
        Act::Close => return false,
        Act::Silence => {
            // Until the other side has had enough.
            let _ = stream.read_to_end(&mut Vec::new());
            return false;
        }
        Act::Drip => {
            let until = Instant::now() + LIMIT;
            while Instant::now() < until && stream.write_all(&[1]).is_ok() {
                thread::sleep(Duration::from_millis(300));
            }
            return false;
        }
        Act::Bytes(bytes) => return stream.write_all(bytes).is_ok(),
        Act::Right => (),
    }
    let answer = match *request {
        GET_FEATURES => (VERSION_1 | 1 << 30 | 1 << 6).to_le_bytes().to_vec(),
        // Answers to all requests, and registers.
        GET_PROTOCOL_FEATURES => (1_u64 << 3 | 1 << 9).to_le_bytes().to_vec(),
        GET_CONFIG => body[..12].iter().copied().chain(config(64, 512)).collect(),
        GET_VRING_BASE => [&body[..4], &[0; 4]].concat(),
        _ if *wants => vec![0; 8],
        _ => return true,
    };
    stream.write_all(&message(*request, &answer)).is_ok()
}

fn config(sectors: u64, block: u32) -> [u8; 60] {
    let mut config = [0; 60];
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    config[20..24].copy_from_slice(&block.to_le_bytes());
    config
}

fn connect(path: &Path) -> Result<VhostUser, String> {
    VhostUser::block(path).map_err(|error| one_line(&error))
}

fn refused(request: u32, act: Act) -> String {
    let peer = Peer::start(request, act);
    let begun = Instant::now();
    let text = connect(&peer.path()).unwrap_err();
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    let path = peer.path().display().to_string();
    assert!(text.contains(&path), "{text}");
    text
}

/// A device of a backend that behaves until the guest sets the device up.
fn driver(peer: &Peer) -> Driver {
    let device = Box::new(connect(&peer.path()).unwrap());
    Driver::of(VirtioPci::new("dev0", 1, ADDRESS, device), shared_ram())
}

#[test]
fn a_backend_that_behaves_is_taken() {
    let mut peer = Peer::start(u32::MAX, Act::Close);
    let mut driver = driver(&peer);
    assert_eq!(driver.offered(), VERSION_1 | 1 << 6);
    assert_eq!(driver.set_up(VERSION_1), 0xf);
    driver.device.worker().pause();
    driver.device.worker().resume();
    assert_eq!(driver.read(20, 1), 0xf);
    drop(driver);
    peer.end();
}

#[test]
fn nobody_who_listens_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none");
    let text = connect(&path).unwrap_err();
    let wanted = format!("failed to connect to '{}': No such file", path.display());
    assert!(text.starts_with(&wanted), "{text}");
    // Somebody who listens and never accepts, with a line that is full.
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let text = connect(&path).unwrap_err();
    assert!(text.contains("failed to connect"), "{text}");
    drop(listener);
}

#[test]
fn what_no_backend_says_is_an_error_with_the_request() {
    let refused_features = |features: u64| {
        let answer = message(GET_FEATURES, &features.to_le_bytes());
        refused(GET_FEATURES, Act::Bytes(answer))
    };
    assert!(refused_features(VERSION_1).contains("too old"));
    assert!(refused_features(1 << 30).contains("legacy devices only"));
    let protocol = message(GET_PROTOCOL_FEATURES, &8_u64.to_le_bytes());
    let text = refused(GET_PROTOCOL_FEATURES, Act::Bytes(protocol));
    assert!(text.contains("serves no disk"), "{text}");
    let with_config = |config: &[u8]| {
        let mut body = [0_u32, 60, 0].map(u32::to_le_bytes).concat();
        body.extend(config);
        refused(GET_CONFIG, Act::Bytes(message(GET_CONFIG, &body)))
    };
    assert!(with_config(&config(64, 3)).contains("blocks of 3 bytes"));
    assert!(with_config(&config(u64::MAX, 512)).contains("no disk has as many"));
    assert!(with_config(&config(64, 512)[..8]).contains("GET_CONFIG"));
    // Registers of another length, or of none.
    for size in [0_u32, 59, 61, u32::MAX] {
        let mut body = [0, size, 0].map(u32::to_le_bytes).concat();
        body.extend(config(64, 512));
        let text = refused(GET_CONFIG, Act::Bytes(message(GET_CONFIG, &body)));
        assert!(text.contains("breaks off at GET_CONFIG"), "{size}: {text}");
    }
    for request in [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_CONFIG] {
        // An answer to something else, one that is too long, one that is none.
        for bytes in [message(3, &[0; 72]), vec![0xff; 100], vec![0xff; 4096]] {
            let text = refused(request, Act::Bytes(bytes));
            assert!(text.contains(" breaks off at "), "{text}");
        }
        let text = refused(request, Act::Close);
        assert!(text.contains(" breaks off at "), "{text}");
    }
}

#[test]
fn a_backend_that_says_nothing_is_not_waited_for() {
    for request in [GET_FEATURES, GET_CONFIG] {
        for act in [Act::Silence, Act::Drip] {
            let text = refused(request, act);
            assert!(text.contains("within 2000 ms"), "{text}");
        }
    }
}

#[test]
fn a_backend_that_fails_later_breaks_the_device_and_nothing_else() {
    let no = message(SET_FEATURES, &1_u64.to_le_bytes());
    for (request, act) in [
        (SET_FEATURES, Act::Bytes(no)),
        (SET_FEATURES, Act::Close),
        (SET_MEM_TABLE, Act::Silence),
        (SET_MEM_TABLE, Act::Bytes(vec![0; 5])),
    ] {
        let peer = Peer::start(request, act);
        let mut driver = driver(&peer);
        let begun = Instant::now();
        driver.set_up(VERSION_1);
        assert_eq!(driver.read(20, 1), 0x4f, "it needs a reset");
        driver.kick();
        driver.device.worker().pause();
        assert!(driver.device.save().is_broken);
        driver.device.worker().resume();
        driver.write(20, 1, 0);
        assert_eq!(driver.read(20, 1), 0);
        assert!(begun.elapsed() < LIMIT);
    }
}

#[test]
fn rings_come_back_whatever_a_backend_says_of_them() {
    let base = |base: u32| {
        let body = [0, base].map(u32::to_le_bytes).concat();
        Act::Bytes(message(GET_VRING_BASE, &body))
    };
    let acts = [
        base(3),
        base(u32::MAX),
        base(1 << 16),
        Act::Close,
        Act::Silence,
    ];
    let give_back = |act| {
        let peer = Peer::start(GET_VRING_BASE, act);
        let mut driver = driver(&peer);
        assert_eq!(driver.set_up(VERSION_1), 0xf);
        let begun = Instant::now();
        driver.device.worker().pause();
        let state = driver.device.save();
        assert!(begun.elapsed() < LIMIT);
        assert!(state.is_broken);
        // What guest memory shows.
        let queue = &state.queues[0];
        assert_eq!((queue.next_available, queue.next_used), (0, 0));
    };
    thread::scope(|scope| {
        for act in acts {
            scope.spawn(move || give_back(act));
        }
    });
}

#[test]
fn a_backend_that_speaks_without_being_asked_is_given_up() {
    let act = Act::Bytes([message(SET_MEM_TABLE, &[0; 8]), vec![7; 40]].concat());
    let peer = Peer::start(SET_MEM_TABLE, act);
    let mut driver = driver(&peer);
    driver.set_up(VERSION_1);
    assert_eq!(driver.read(20, 1), 0x4f);
}

#[test]
fn rings_that_are_not_in_ram_are_the_guests_fault_and_the_backend_lives() {
    let peer = Peer::start(u32::MAX, Act::Close);
    let mut driver = driver(&peer);
    for status in [0, 1, 3] {
        driver.write(20, 1, status);
    }
    driver.write(8, 4, 1);
    driver.write(12, 4, VERSION_1 >> 32);
    driver.write(20, 1, 0xb);
    driver.write(32, 4, 0xffff_0000);
    driver.write(28, 2, 1);
    driver.write(20, 1, 0xf);
    assert_eq!(driver.read(20, 1), 0x4f);
    driver.write(20, 1, 0);
    assert_eq!(driver.set_up(VERSION_1), 0xf);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_make_it_panic(
        request in prop::sample::select(vec![
            GET_FEATURES, SET_FEATURES, SET_MEM_TABLE, GET_PROTOCOL_FEATURES, GET_CONFIG, GET_VRING_BASE,
        ]),
        head in any::<bool>(),
        bytes in prop::collection::vec(any::<u8>(), 12..200),
    ) {
        let bytes = if head { message(request, &bytes) } else { bytes };
        let peer = Peer::start(request, Act::Bytes([bytes, vec![0; 4096]].concat()));
        let Ok(device) = connect(&peer.path()) else {
            return Ok(());
        };
        let mut driver = Driver::of(VirtioPci::new("dev0", 1, ADDRESS, Box::new(device)), shared_ram());
        driver.set_up(VERSION_1);
        driver.device.worker().pause();
        driver.device.save();
    }
}
