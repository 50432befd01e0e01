#![forbid(unsafe_code)]
//! Runs one command in a Linux guest of the rig, over the Unix socket of its COM1.
//!
//! `say SOCKET COMMAND...` prints what the command prints and exits as it does; 124 when no answer
//! comes in time, 125 when there is nobody to ask. `SAY_LIMIT` is the time in seconds (default 60).
//! The protocol is the one of `tests/rig/l2-init.sh`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

const TIMED_OUT: u8 = 124;
const NOBODY: u8 = 125;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let Some(socket) = words.next() else {
        eprintln!("say: usage: say SOCKET COMMAND...");
        return ExitCode::from(NOBODY);
    };
    let command = words.collect::<Vec<_>>().join(" ");
    let seconds = std::env::var("SAY_LIMIT")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(60);
    match say(
        &socket,
        &command,
        Instant::now() + Duration::from_secs(seconds),
    ) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("say: {socket}: {error}");
            let late = matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            );
            ExitCode::from(if late { TIMED_OUT } else { NOBODY })
        }
    }
}

/// Asks, prints the answer, and gives the command's exit status.
fn say(socket: &str, command: &str, deadline: Instant) -> std::io::Result<u8> {
    let mut stream = connect(socket, deadline)?;
    // The guest's console keeps older answers: this one is known by an id nobody used before.
    let nanos = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let id = format!("q{}x{}", std::process::id(), nanos.subsec_nanos());
    stream.write_all(format!("{id} {command}\n").as_bytes())?;
    let (output, end) = (format!("{id}: "), format!("{id}= "));
    let mut answer = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        answer.get_ref().set_read_timeout(Some(left))?;
        // What was read before a timeout is lost, and so is the answer: both end the program.
        if answer.read_until(b'\n', &mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if let Some(printed) = text.strip_prefix(&output) {
            println!("{printed}");
        } else if let Some(status) = text.strip_prefix(&end) {
            return Ok(status.trim().parse().unwrap_or(u8::MAX));
        }
    }
}

/// Connects, waiting for a socket that is not there yet.
fn connect(socket: &str, deadline: Instant) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)),
            other => return other,
        }
    }
}
