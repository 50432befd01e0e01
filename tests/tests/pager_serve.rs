#![forbid(unsafe_code)]
//! `pando pager serve`: a pager for VMMs that it does not trust.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pando_pager::image::BackendIndex;
use pando_pager::{Image, Registration};
use pando_tests::command::{HANG, Running, eventually, finish, pando};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::memory::layout::RamLayout;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with, sockopt,
};
use rustix::process::{PidfdFlags, Signal, getpid, pidfd_open};
use serde_json::{Value, json};

const PAGES: u64 = 64;

/// A file of guest RAM whose every page but the last has its number in it, and a pager that serves it.
struct Served {
    running: Running,
    socket: PathBuf,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (file, socket) = (dir.path().join("ram"), dir.path().join("pager.sock"));
        let mut ram = File::create(&file)?;
        for page in 0..PAGES - 1 {
            ram.write_all(&[u8::try_from(page)? + 1; 4096])?;
        }
        ram.set_len(PAGES * 4096)?;
        let mut command = pando(&["pager", "serve", "--socket"])?;
        command.arg(&socket).arg("--image").arg(&file);
        let mut running = Running::start(&mut command)?;
        running.wait_stderr("serving at")?;
        Ok(Self {
            running,
            socket,
            file,
            _dir: dir,
        })
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.running.pid())).map_or(0, Iterator::count)
    }

    /// Fails unless the pager is back at so many descriptors, and still serves.
    fn is_as_before(&self, descriptors: usize) -> Result<()> {
        eventually("the pager has let go of all", || {
            self.descriptors() == descriptors
        })?;
        let guest = Guest::new(&self.file)?;
        let peer = Peer::new(&self.socket)?;
        peer.attach(&guest, 1)?;
        guest.reads_right()
    }
}

/// Memory of this process as a VMM has it.
struct Guest {
    registration: Registration,
    ram: GuestRam,
}

impl Guest {
    fn new(file: &Path) -> Result<Self> {
        let bytes = PAGES * 4096;
        let index = BackendIndex::scan(&File::open(file)?, bytes, &mut |_, _| ())?;
        let image = Image::open(file, "ram", index)?;
        let mut registration = Registration::new()?;
        let memory = registration.map(&image)?;
        let ram = GuestRam::new(RamLayout::new(&[bytes])?, vec![RamBacking::Paged(memory)])?;
        Ok(Self { registration, ram })
    }

    fn region(&self) -> Value {
        let region = self.registration.regions()[0];
        json!({"image": 0, "address": region.address, "first_page": 0, "pages": region.pages.count().get()})
    }

    /// Touches every page, on a thread of its own: what is not served sleeps.
    fn reads_right(self) -> Result<()> {
        let (done, answer) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            let mut wrong = None;
            for page in 0..PAGES {
                let expected = if page == PAGES - 1 { 0 } else { page + 1 };
                let read = self.ram.read(page * 4096, &mut bytes);
                if read.is_err() || bytes.iter().any(|&byte| u64::from(byte) != expected) {
                    wrong.get_or_insert(page);
                }
            }
            let _ = done.send(wrong);
        });
        match answer.recv_timeout(HANG) {
            Ok(None) => Ok(()),
            Ok(Some(page)) => bail!("page {page} is wrong"),
            Err(_) => bail!("it still waits for a page"),
        }
    }
}

fn pidfd() -> Result<OwnedFd> {
    Ok(pidfd_open(getpid(), PidfdFlags::empty())?)
}

/// A connection to the pager.
struct Peer(OwnedFd);

impl Peer {
    fn new(socket: &Path) -> Result<Self> {
        let ours = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        connect(&ours, &SocketAddrUnix::new(socket)?)?;
        sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(HANG))?;
        Ok(Self(ours))
    }

    fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>], flags: SendFlags) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ensure!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let flags = flags | SendFlags::NOSIGNAL;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
        Ok(())
    }

    fn order(&self, order: &Value, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        self.send(
            order.to_string().as_bytes(),
            descriptors,
            SendFlags::empty(),
        )
    }

    /// The next message; `None` when the pager has closed the connection.
    fn hear(&self) -> Result<Option<Value>> {
        let mut bytes = vec![0; 1 << 16];
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(&self.0, slices, &mut Default::default(), RecvFlags::empty()) {
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            received => received?.bytes,
        };
        if received == 0 {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&bytes[..received])?))
    }

    fn attach(&self, guest: &Guest, client: u64) -> Result<()> {
        let order = json!({"attach": {"client": client, "regions": [guest.region()]}});
        self.order(&order, &[guest.registration.as_fd(), pidfd()?.as_fd()])?;
        let answer = self.hear()?.context("hung up")?;
        ensure!(answer["attached"]["client"] == client, "{answer}");
        Ok(())
    }

    /// Fails unless an order is refused, for this reason, and the connection stays.
    fn refuses(&self, order: &Value, descriptors: &[BorrowedFd<'_>], why: &str) -> Result<()> {
        self.order(order, descriptors)?;
        let answer = self.hear()?.context("hung up")?;
        let said = answer["refused"]["why"].as_str().unwrap_or_default();
        ensure!(said.contains(why), "no {why:?} in {answer}");
        Ok(())
    }

    /// Fails unless the pager says this and hangs up.
    fn is_dropped(&self, why: &str) -> Result<()> {
        let answer = self.hear()?.context("hung up without a word")?;
        let said = answer["closing"]["why"].as_str().unwrap_or_default();
        ensure!(said.contains(why), "no {why:?} in {answer}");
        ensure!(self.hear()?.is_none(), "it is still connected");
        Ok(())
    }
}

#[test]
fn memory_of_another_program_is_served_forgotten_and_let_go() -> Result<()> {
    let served = Served::new()?;
    let before = served.descriptors();
    let peer = Peer::new(&served.socket)?;
    let (one, two) = (Guest::new(&served.file)?, Guest::new(&served.file)?);
    peer.attach(&one, 1)?;
    peer.attach(&two, 2)?;
    one.reads_right()?;
    peer.order(
        &json!({"forget": {"client": 2, "runs": [{"image": 0, "first_page": 0, "pages": 4}]}}),
        &[],
    )?;
    let answer = peer.hear()?.context("hung up")?;
    ensure!(answer["forgotten"]["client"] == 2, "{answer}");
    two.reads_right()?;
    peer.order(&json!({"detach": {"client": 2}}), &[])?;
    drop(peer);
    served.is_as_before(before)?;
    let socket = served.socket.clone();
    served.running.signal(Signal::TERM)?;
    served.running.finish()?.expect_code(0)?;
    assert!(!socket.exists(), "the socket is removed");
    Ok(())
}

#[test]
fn a_pager_that_comes_after_another_wakes_who_waits() -> Result<()> {
    let mut served = Served::new()?;
    let guest = Guest::new(&served.file)?;
    let order = json!({"attach": {"client": 1, "wake": true, "regions": [guest.region()]}});
    let uffd = guest.registration.as_fd().try_clone_to_owned()?;
    let peer = Peer::new(&served.socket)?;
    peer.attach(&guest, 1)?;
    served.running.signal(Signal::STOP)?;
    let reading = thread::spawn(move || guest.reads_right());
    thread::sleep(Duration::from_millis(20));
    served.running.child.kill()?;
    served.running.child.wait()?;
    // The one that was killed left its socket.
    let mut command = pando(&["pager", "serve", "--socket"])?;
    command.arg(&served.socket).arg("--image").arg(&served.file);
    let mut next = Running::start(&mut command)?;
    next.wait_stderr("serving at")?;
    let peer = Peer::new(&served.socket)?;
    peer.order(&order, &[uffd.as_fd(), pidfd()?.as_fd()])?;
    let answer = peer.hear()?.context("hung up")?;
    ensure!(answer["attached"]["client"] == 1, "{answer}");
    reading
        .join()
        .map_err(|_| anyhow::anyhow!("the reader panicked"))?
}

#[test]
fn what_cannot_be_served_is_refused_by_name() -> Result<()> {
    let served = Served::new()?;
    let before = served.descriptors();
    let (guest, other) = (Guest::new(&served.file)?, Guest::new(&served.file)?);
    let peer = Peer::new(&served.socket)?;
    let (uffd, pidfd) = (guest.registration.as_fd(), pidfd()?);
    let null = File::open("/dev/null")?;
    let right = [uffd, pidfd.as_fd()];
    let attach = |regions: Value| json!({"attach": {"client": 1, "regions": regions}});
    let good = attach(json!([guest.region()]));
    peer.refuses(&good, &[], "0 descriptors")?;
    peer.refuses(&good, &[uffd], "1 descriptors")?;
    peer.refuses(&good, &[uffd, pidfd.as_fd(), null.as_fd()], "3 descriptors")?;
    peer.refuses(&good, &[null.as_fd(), pidfd.as_fd()], "no userfaultfd")?;
    peer.refuses(&good, &[uffd, null.as_fd()], "no pidfd")?;
    let change = |field: &str, value: Value| {
        let mut region = guest.region();
        region[field] = value;
        attach(json!([region]))
    };
    let address = guest.registration.regions()[0].address;
    peer.refuses(&attach(json!([])), &right, "no regions")?;
    peer.refuses(&change("image", json!(1)), &right, "no image 1")?;
    peer.refuses(&change("first_page", json!(1)), &right, "has 64 pages")?;
    peer.refuses(&change("pages", json!(u64::MAX)), &right, "beyond")?;
    peer.refuses(&change("pages", json!(0)), &right, "no pages")?;
    peer.refuses(&change("address", json!(address + 1)), &right, "begin")?;
    peer.refuses(&change("address", json!(u64::MAX - 4095)), &right, "beyond")?;
    let over = attach(json!([guest.region(), guest.region()]));
    peer.refuses(&over, &right, "lie over each other")?;
    let forget = json!({"forget": {"client": 5, "runs": []}});
    peer.refuses(&forget, &[], "no client 5")?;
    peer.refuses(&forget, &[null.as_fd()], "1 descriptors")?;
    // None of that has hurt.
    peer.attach(&other, 9)?;
    peer.attach(&guest, 1)?;
    peer.refuses(&good, &right, "client 1 is served already")?;
    guest.reads_right()?;
    other.reads_right()?;
    drop(peer);
    served.is_as_before(before)
}

#[test]
fn a_peer_that_cannot_be_understood_is_dropped_and_told_why() -> Result<()> {
    let served = Served::new()?;
    let before = served.descriptors();
    let bystander = Peer::new(&served.socket)?;
    let guest = Guest::new(&served.file)?;
    bystander.attach(&guest, 1)?;
    let good = json!({"attach": {"client": 1, "regions": [guest.region()]}}).to_string();
    for bytes in [
        b"\xff\x00garbage".as_slice(),
        b"{}",
        b"[[[[[[[[",
        br#"{"detach": {"client": -1}}"#,
        br#"{"detach": {"client": 1, "more": 2}}"#,
        &good.as_bytes()[..good.len() / 2],
    ] {
        let peer = Peer::new(&served.socket)?;
        peer.send(bytes, &[], SendFlags::empty())?;
        peer.is_dropped("damaged")?;
    }
    let peer = Peer::new(&served.socket)?;
    peer.send(&vec![b' '; 150_000], &[], SendFlags::empty())?;
    peer.is_dropped("exceeds the limit")?;
    let null = File::open("/dev/null")?;
    for count in [5, 60] {
        let peer = Peer::new(&served.socket)?;
        peer.send(
            good.as_bytes(),
            &vec![null.as_fd(); count],
            SendFlags::empty(),
        )?;
        peer.is_dropped("descriptors")?;
    }
    let peer = Peer::new(&served.socket)?;
    peer.send(&[], &[], SendFlags::empty())?;
    ensure!(peer.hear()?.is_none(), "an empty message is no message");
    guest.reads_right()?;
    drop(bystander);
    served.is_as_before(before)
}

#[test]
fn floods_and_peers_that_never_read_hold_nobody_up() -> Result<()> {
    let served = Served::new()?;
    let before = served.descriptors();
    let flood = json!({"forget": {"client": 5, "runs": []}}).to_string();
    // Each is refused, which nobody reads: the pager takes no more of them then.
    let mut floods = Vec::new();
    for _ in 0..4 {
        let peer = Peer::new(&served.socket)?;
        let mut silent = 0;
        while silent < 20 {
            match peer.send(flood.as_bytes(), &[], SendFlags::DONTWAIT) {
                Ok(()) => silent = 0,
                Err(_) => {
                    silent += 1;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        floods.push(peer);
    }
    let peer = Peer::new(&served.socket)?;
    let guest = Guest::new(&served.file)?;
    peer.attach(&guest, 1)?;
    guest.reads_right()?;
    // One that has clients and does not read: they are served all the same.
    let deaf = Guest::new(&served.file)?;
    let order = json!({"attach": {"client": 1, "regions": [deaf.region()]}});
    let silent = Peer::new(&served.socket)?;
    silent.order(&order, &[deaf.registration.as_fd(), pidfd()?.as_fd()])?;
    deaf.reads_right()?;
    // More connections than there may be: the last are told so.
    let mut crowd = Vec::new();
    for _ in 0..70 {
        crowd.push(Peer::new(&served.socket)?);
    }
    let last = crowd.last().context("no peer")?;
    last.is_dropped("64 peers")?;
    drop((floods, crowd, silent, peer));
    served.is_as_before(before)
}

#[test]
fn what_cannot_be_served_at_all_is_said_at_the_start() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let serve = |image: &Path| -> Result<_> {
        let mut command = pando(&["pager", "serve", "--socket"])?;
        finish(command.arg(&socket).arg("--image").arg(image))
    };
    serve(&dir.path().join("absent"))?
        .expect_code(1)?
        .expect_error(&["cannot open memory file", "absent"])?;
    let odd = dir.path().join("odd");
    fs::write(&odd, [1; 5000])?;
    serve(&odd)?.expect_code(1)?.expect_error(&["5000 bytes"])?;
    serve(dir.path())?
        .expect_code(4)?
        .expect_error(&["manifest"])?;
    fs::write(&socket, "a file")?;
    fs::write(&odd, [1; 8192])?;
    serve(&odd)?
        .expect_code(1)?
        .expect_error(&["cannot bind socket"])?;
    assert_eq!(fs::read(&socket)?, b"a file", "it is left alone");
    Ok(())
}
