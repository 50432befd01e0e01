#![forbid(unsafe_code)]
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, OutputModes, tcgetattr};

use super::*;
use crate::device::bus::PioDevice;
use crate::device::irq::IrqLine;
use crate::device::socket::SocketError;

/// Nothing here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(20);

fn attached(target: SerialTarget) -> (Console, Arc<Mutex<Serial>>) {
    let mut console = Console::open(target).unwrap();
    let serial = Serial::new(IrqLine::new().unwrap(), console.output());
    let serial = Arc::new(Mutex::new(serial));
    console
        .attach(Arc::clone(&serial), Box::new(|| {}))
        .unwrap();
    console.feed().unwrap();
    (console, serial)
}

/// What a guest prints.
fn print(serial: &Mutex<Serial>, text: &[u8]) {
    for byte in text {
        let _ = serial.lock().unwrap().write(0, &[*byte]);
    }
}

/// What a guest reads, polling the line status.
fn receive(serial: &Mutex<Serial>, bytes: usize) -> Vec<u8> {
    let deadline = Instant::now() + HANG;
    let mut received = Vec::new();
    while received.len() < bytes {
        assert!(Instant::now() < deadline, "got {received:?}");
        let mut data = [0];
        let mut uart = serial.lock().unwrap();
        uart.read(5, &mut data);
        if data[0] & 1 == 0 {
            drop(uart);
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        uart.read(0, &mut data);
        received.push(data[0]);
    }
    received
}

fn read_exactly(stream: &mut impl Read, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    stream.read_exact(&mut buffer).unwrap();
    buffer
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + HANG;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn null_swallows_everything() {
    let (console, serial) = attached(SerialTarget::Null);
    print(&serial, b"into the void");
    assert_eq!(console.dropped_bytes(), 0);
    assert_eq!(console.pty_path(), None);
    assert!(console.thread.is_none());
}

#[test]
fn a_file_is_emptied_and_gets_the_output() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.log");
    fs::write(&path, "of an earlier run, and longer").unwrap();
    let (console, serial) = attached(SerialTarget::File(path.clone()));
    print(&serial, b"hello\r\n");
    assert_eq!(fs::read(&path).unwrap(), b"hello\r\n", "at once");
    drop(console);
    assert_eq!(fs::read(&path).unwrap(), b"hello\r\n");
}

#[test]
fn a_file_that_cannot_be_made_is_named() {
    let directory = tempfile::tempdir().unwrap();
    for path in [directory.path().to_owned(), directory.path().join("a/b")] {
        let error = Console::open(SerialTarget::File(path.clone())).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot write serial output to {}", path.display())
        );
    }
}

#[test]
fn a_pty_carries_both_directions_unchanged() {
    let (console, serial) = attached(SerialTarget::Pty);
    let path = console.pty_path().unwrap().to_owned();
    let mut terminal = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    print(&serial, b"login:\n");
    assert_eq!(read_exactly(&mut terminal, 7), b"login:\n");
    terminal.write_all(b"root\r\x03").unwrap();
    assert_eq!(receive(&serial, 6), b"root\r\x03");
}

#[test]
fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_console, serial) = attached(SerialTarget::Fd(theirs.into()));
    let text: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
    (&ours).write_all(&text).unwrap();
    assert_eq!(receive(&serial, text.len()), text);
}

#[test]
fn a_reader_that_never_reads_costs_the_oldest_output_and_no_time() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (console, serial) = attached(SerialTarget::Fd(theirs.into()));
    let mut printed = 0;
    while console.dropped_bytes() < 1000 {
        let mut output = console.output();
        output.write_all(&[b'x'; 4096]).unwrap();
        printed += 4096;
        assert!(printed < 64 << 20, "a socket takes only so much");
    }
    print(&serial, b"the end");
    let dropped = console.dropped_bytes();
    drop(console);
    drop(serial);
    // What the socket had, and what went out while the console was dropped.
    ours.set_nonblocking(true).unwrap();
    let mut received = Vec::new();
    let _ = (&ours).read_to_end(&mut received);
    assert!(received.len() as u64 <= printed + 7 - dropped);
    assert!(received.iter().all(|byte| b"x the end".contains(byte)));
}

#[test]
fn queued_output_goes_out_when_the_reader_goes_on() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (console, _serial) = attached(SerialTarget::Fd(theirs.into()));
    let mut printed: u64 = 0;
    // Fill the socket, then some, but not more than the queue holds.
    let mut output = console.output();
    while output.flush_queue().is_none() {
        output.write_all(&[b'x'; 1024]).unwrap();
        printed += 1024;
    }
    output.write_all(b"last").unwrap();
    ours.set_read_timeout(Some(HANG)).unwrap();
    let received = read_exactly(&mut &ours, usize::try_from(printed).unwrap() + 4);
    assert!(received.ends_with(b"xlast"));
    assert_eq!(console.dropped_bytes(), 0);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let (console, serial) = attached(SerialTarget::Unix(path.clone()));
    print(&serial, b"before anybody came\n");
    let mut first = connect(&path);
    assert_eq!(read_exactly(&mut first, 20), b"before anybody came\n");
    print(&serial, b"live\n");
    assert_eq!(read_exactly(&mut first, 5), b"live\n");
    first.write_all(b"ls\n").unwrap();
    assert_eq!(receive(&serial, 3), b"ls\n");

    let mut second = connect(&path);
    let mut refusal = String::new();
    second.read_to_string(&mut refusal).unwrap();
    assert!(refusal.contains("another client"), "{refusal}");

    drop(first);
    print(&serial, b"");
    let mut third = connect(&path);
    // Whether the console saw the first go before or after, the third is served.
    third.write_all(b"w\n").unwrap();
    assert_eq!(receive(&serial, 2), b"w\n");
    print(&serial, b"to the third\n");
    assert_eq!(read_exactly(&mut third, 13), b"to the third\n");
    drop(console);
    assert!(!path.exists(), "the socket goes with the console");
}

#[test]
fn a_client_that_has_sent_everything_still_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let (_console, serial) = attached(SerialTarget::Unix(path.clone()));
    let mut client = connect(&path);
    client.write_all(b"date\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(receive(&serial, 5), b"date\n");
    std::thread::sleep(Duration::from_millis(20));
    print(&serial, b"today\n");
    assert_eq!(read_exactly(&mut client, 6), b"today\n");
}

#[test]
fn a_socket_without_a_client_keeps_the_newest_output() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let (console, serial) = attached(SerialTarget::Unix(path.clone()));
    console
        .output()
        .write_all(&vec![b'a'; BACKLOG_BYTES])
        .unwrap();
    print(&serial, b"newest");
    assert_eq!(console.dropped_bytes(), 6);
    let mut client = connect(&path);
    let received = read_exactly(&mut client, BACKLOG_BYTES);
    assert!(received.ends_with(b"anewest"));
}

#[test]
fn a_socket_that_is_alive_is_refused_and_its_owner_does_not_notice() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let (_console, serial) = attached(SerialTarget::Unix(path.clone()));
    print(&serial, b"kept");
    let error = Console::open(SerialTarget::Unix(path.clone())).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "socket path {} is in use: a process listens on it; choose another path or end that \
             process",
            path.display()
        )
    );
    assert_eq!(read_exactly(&mut connect(&path), 4), b"kept");
}

#[test]
fn a_socket_left_behind_by_a_killed_process_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    // Closing a listener leaves its path, as a kill does.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let (_console, serial) = attached(SerialTarget::Unix(path.clone()));
    print(&serial, b"alive");
    assert_eq!(read_exactly(&mut connect(&path), 5), b"alive");
}

#[test]
fn of_many_that_find_a_dead_socket_one_wins() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    drop(UnixListener::bind(&path).unwrap());
    let open = || Console::open(SerialTarget::Unix(path.clone()));
    let opened: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(opened.iter().filter(|console| console.is_ok()).count(), 1);
    for error in opened.iter().filter_map(|console| console.as_ref().err()) {
        assert!(
            matches!(error, ConsoleError::Socket(SocketError::InUse { .. })),
            "{error}"
        );
    }
}

#[test]
fn a_path_that_is_something_else_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    fs::write(&path, "precious").unwrap();
    let error = Console::open(SerialTarget::Unix(path.clone())).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{} exists and is no socket: choose another path or remove it",
            path.display()
        )
    );
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let long = directory.path().join("x".repeat(120));
    let error = Console::open(SerialTarget::Unix(long)).unwrap_err();
    assert!(error.to_string().starts_with("cannot listen on socket"));
}

#[test]
fn a_socket_replaced_by_another_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let console = Console::open(SerialTarget::Unix(path.clone())).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(console);
    assert!(path.exists());
}

#[test]
fn dropping_the_console_ends_its_thread() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (console, serial) = attached(SerialTarget::Fd(theirs.into()));
    // Even while input waits for a guest that does not read.
    (&ours).write_all(&[b'x'; 1000]).unwrap();
    wait_until("the FIFO is full", || {
        serial.lock().unwrap().save().receive_fifo.len() == 64
    });
    assert_eq!(Arc::strong_count(&serial), 2);
    drop(console);
    assert_eq!(Arc::strong_count(&serial), 1);
}

#[test]
fn a_console_feeds_one_uart() {
    let (mut console, serial) = attached(SerialTarget::Pty);
    let error = console.attach(serial, Box::new(|| {})).unwrap_err();
    assert_eq!(error.to_string(), "the serial console is attached already");
}

#[test]
fn a_descriptor_that_only_reads_or_only_writes_will_do() {
    let (reader, writer) = std::io::pipe().unwrap();
    let (_console, serial) = attached(SerialTarget::Fd(OwnedFd::from(writer)));
    print(&serial, b"out");
    assert_eq!(read_exactly(&mut &reader, 3), b"out");

    let (reader, mut writer) = std::io::pipe().unwrap();
    let (console, serial) = attached(SerialTarget::Fd(OwnedFd::from(reader)));
    writer.write_all(b"in").unwrap();
    assert_eq!(receive(&serial, 2), b"in");
    print(&serial, b"nowhere");
    drop(writer);
    assert_eq!(console.dropped_bytes(), 0);
}

#[test]
fn a_terminal_is_raw_while_attached_and_the_escape_quits() {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let before = tcgetattr(&terminal).unwrap();

    let console = Console::open(SerialTarget::Null).unwrap();
    let serial = Serial::new(IrqLine::new().unwrap(), console.output());
    let serial = Arc::new(Mutex::new(serial));
    let (quit, on_quit) = mpsc::sync_channel(4);
    let feed = Feed::new(
        Source::Stdin(Arc::new(terminal.try_clone().unwrap())),
        console.output(),
        Arc::clone(&serial),
        Box::new(move || quit.send(()).unwrap()),
    )
    .unwrap();
    let raw = tcgetattr(&terminal).unwrap();
    assert!(
        !raw.local_modes
            .intersects(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO)
    );
    assert!(raw.output_modes.contains(OutputModes::OPOST));

    let thread = std::thread::spawn(move || feed.run());
    rustix::io::write(&master, b"ls\x03\x01\x01\x01x").unwrap();
    assert_eq!(receive(&serial, 4), b"ls\x03\x01");
    on_quit.recv_timeout(HANG).unwrap();
    console.output().stop();
    thread.join().unwrap();
    let after = tcgetattr(&terminal).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.input_modes, before.input_modes);
}
