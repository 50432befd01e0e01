#![forbid(unsafe_code)]
//! Both ends of connections between a guest of the rig and its host.
//!
//! In the guest: `vsock answer PORT` listens and answers each line with its context ID and the line; `vsock
//! call PORT TEXT` sends a line to the host and prints the answer; `vsock hold PORT` connects to the host,
//! says `connected`, and how that ended. On the host: `vsock dial SOCKET PORT TEXT` sends a line to the
//! guest and prints the answer; `vsock host SOCKET` listens and answers each line with `host` and the line.
//!
//! At the socket of a port, on the host: `vsock tell SOCKET TEXT` sends a line and prints the answer; `vsock
//! hear SOCKET` prints what comes until its end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream, get_local_cid};

/// How long an end may be missing, and how long an answer may take.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match *words.as_slice() {
        ["answer", port] => number(port).and_then(answer),
        ["call", port, text] => number(port).and_then(|port| call(port, text)),
        ["hold", port] => number(port).and_then(hold),
        ["dial", socket, port, text] => number(port).and_then(|port| dial(socket, port, text)),
        ["host", socket] => host(socket),
        ["tell", socket, text] => come(socket).and_then(|stream| ask(&stream, text)),
        ["hear", socket] => come(socket).and_then(|stream| hear(&stream)),
        _ => Err(io::Error::other(
            "usage: vsock answer PORT | call PORT TEXT | hold PORT | dial SOCKET PORT TEXT | host SOCKET | \
             tell SOCKET TEXT | hear SOCKET",
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(io::Error::other)
}

/// Answers each line until the other end sends no more.
fn echo<S>(stream: &S, word: impl Fn() -> io::Result<String>) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let mut to = stream;
        to.write_all(format!("{} {line}", word()?).as_bytes())?;
        line.clear();
    }
    Ok(())
}

/// Sends a line and prints the one that comes back.
fn ask<S>(stream: &S, text: &str) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let mut to = stream;
    to.write_all(format!("{text}\n").as_bytes())?;
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    print!("{line}");
    Ok(())
}

fn answer(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    for stream in listener.incoming() {
        let stream = stream?;
        // One that ends badly is nobody else's business.
        thread::spawn(move || echo(&stream, || get_local_cid().map(|cid| cid.to_string())));
    }
    Ok(())
}

fn call(port: u32, text: &str) -> io::Result<()> {
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    stream.set_read_timeout(Some(LIMIT))?;
    ask(&stream, text)
}

fn hold(port: u32) -> io::Result<()> {
    let mut stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
    ask(&stream, "hold")?;
    println!("connected");
    let end = match stream.read(&mut [0]) {
        Ok(bytes) => format!("{bytes} bytes"),
        Err(error) => format!("{:?}", error.kind()),
    };
    println!("gone: {end}");
    Ok(())
}

/// The guest may not be there yet, or not listen yet.
fn dial(socket: &str, port: u32, text: &str) -> io::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match dial_once(socket, port) {
            Ok(stream) => return ask(&stream, text),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(100)),
        }
    }
}

fn dial_once(socket: &str, port: u32) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut to = &stream;
    to.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // No byte behind the line: it is the guest's.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        (&stream).read_exact(&mut byte)?;
        line.extend(byte);
    }
    if line.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other(
            String::from_utf8_lossy(&line).into_owned(),
        ))
    }
}

/// Connects to a socket, which may not be there yet.
fn come(socket: &str) -> io::Result<UnixStream> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(100)),
        }
    }
}

/// Each piece is printed when it comes.
fn hear(stream: &UnixStream) -> io::Result<()> {
    let (mut from, mut to) = (stream, io::stdout());
    let mut bytes = [0; 4096];
    loop {
        let length = from.read(&mut bytes)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&bytes[..length])?;
        to.flush()?;
    }
}

fn host(socket: &str) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || echo(&stream, || Ok("host".to_owned())));
    }
    Ok(())
}
