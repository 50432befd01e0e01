#![forbid(unsafe_code)]
//! A network device in another process, as far as a thread can be one: it has its own mapping of the guest's
//! memory, by the descriptors that it is sent, and gives every packet back.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::driver::{ADDRESS, BUFFERS, Driver, VERSION_1};
use super::net::{Guest, MAC, MERGE, QUEUE_SIZE};
use super::vhost_user::shared_ram;
use crate::device::virtio::queue::{Chain, VirtQueue};
use crate::device::virtio::rng::device::Rng;
use crate::device::virtio::state::SavedQueue;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::device::virtio::vhost_user::device::VhostUser;
use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::layout::RamLayout;

/// Bytes before each packet: it may be laid over several requests.
const HEAD_BYTES: usize = 12;

/// What was said of a queue.
#[derive(Default)]
struct Told {
    size: u16,
    base: u16,
    places: [u64; 3],
    kick: Option<File>,
    call: Option<File>,
    queue: Option<VirtQueue>,
}

/// A backend that gives packets back.
#[derive(Default)]
struct Echo {
    queues: [Told; 2],
    ram: Option<GuestRam>,
    /// Where the frontend has what is at guest address 0.
    frontend_address: u64,
    /// Whether packets wait until the rings are taken back, and then some.
    is_slow: bool,
    held: Vec<Chain>,
}

impl Echo {
    /// Serves one frontend after the other.
    fn start(path: &Path, frontends: usize, is_slow: bool) -> JoinHandle<usize> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let mut packets = 0;
            for _ in 0..frontends {
                let (stream, _) = listener.accept().unwrap();
                let mut echo = Self {
                    is_slow,
                    ..Self::default()
                };
                packets += echo.serve(stream);
            }
            packets
        })
    }

    fn serve(&mut self, mut stream: UnixStream) -> usize {
        let mut packets = 0;
        loop {
            let kick = self.queues[1].kick.as_ref();
            let mut wait = vec![PollFd::new(&stream, PollFlags::IN)];
            wait.extend(kick.map(|kick| PollFd::new(kick, PollFlags::IN)));
            poll(&mut wait, None).unwrap();
            let is_asked = !wait[0].revents().is_empty();
            if wait.get(1).is_some_and(|kick| !kick.revents().is_empty()) {
                let _ = self.queues[1].kick.as_mut().unwrap().read(&mut [0; 8]);
                packets += self.echo();
            }
            if is_asked && !self.answer(&mut stream) {
                return packets;
            }
        }
    }

    /// Gives back what the guest has sent, where it has room.
    fn echo(&mut self) -> usize {
        let Some(ram) = &self.ram else {
            return 0;
        };
        let [receive, transmit] = &mut self.queues;
        let (Some(room), Some(sent)) = (&mut receive.queue, &mut transmit.queue) else {
            return 0;
        };
        let mut packets = 0;
        while let Some(packet) = sent.pop(ram).unwrap() {
            if self.is_slow {
                self.held.push(packet);
                continue;
            }
            let mut bytes = vec![0; usize::try_from(packet.readable_bytes()).unwrap()];
            packet.read(ram, 0, &mut bytes).unwrap();
            let place = room.pop(ram).unwrap().expect("the test gives room");
            place.write(ram, 0, &bytes).unwrap();
            room.push(ram, &place, u32::try_from(bytes.len()).unwrap())
                .unwrap();
            sent.push(ram, &packet, 0).unwrap();
            packets += 1;
        }
        for queue in [receive, transmit] {
            let call = queue.call.as_mut().unwrap();
            call.write_all(&1_u64.to_ne_bytes()).unwrap();
        }
        packets
    }

    /// Whether there was a request.
    fn answer(&mut self, stream: &mut UnixStream) -> bool {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); 512];
        let mut sent = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &*stream,
            &mut [IoSliceMut::new(&mut head)],
            &mut sent,
            RecvFlags::empty(),
        );
        if got.unwrap().bytes != head.len() {
            return false;
        }
        let mut files: Vec<File> = sent
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => {
                    Some(fds.map(File::from as fn(OwnedFd) -> File))
                }
                _ => None,
            })
            .flatten()
            .collect();
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        stream.read_exact(&mut body).unwrap();
        let (request, wants) = (word(0), word(4) & 8 != 0);
        let number = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
        let state = || {
            let index = usize::from(body[0]);
            (index, u16::from_le_bytes([body[4], body[5]]))
        };
        let mut taken = None;
        let answer = match request {
            1 => Some((VERSION_1 | 1 << 30 | MERGE).to_le_bytes().to_vec()),
            15 => Some(8_u64.to_le_bytes().to_vec()),
            5 => {
                assert_eq!((body[0], files.len()), (1, 1), "one region");
                let (guest, bytes, address, offset) =
                    (number(8), number(16), number(24), number(32));
                assert_eq!(guest, 0);
                let file = files.pop().unwrap();
                let backing = RamBacking::shared_from(&file, offset, bytes).unwrap();
                let layout = RamLayout::new(&[bytes]).unwrap();
                self.ram = Some(GuestRam::new(layout, vec![backing]).unwrap());
                self.frontend_address = address;
                None
            }
            8 => {
                let (index, size) = state();
                self.queues[index].size = size;
                None
            }
            10 => {
                let (index, base) = state();
                self.queues[index].base = base;
                None
            }
            9 => {
                let at = |place: u64| place - self.frontend_address;
                self.queues[usize::from(body[0])].places =
                    [at(number(8)), at(number(24)), at(number(16))];
                None
            }
            12 => {
                self.queues[usize::from(body[0])].kick = files.pop();
                None
            }
            13 => {
                self.queues[usize::from(body[0])].call = files.pop();
                None
            }
            18 => {
                let (index, is_on) = state();
                assert_eq!(is_on, 1);
                self.enable(index);
                None
            }
            11 => {
                let (index, _) = state();
                let queue = self.queues[index].queue.take().unwrap();
                let base = u32::from(queue.next_available());
                let index = u32::try_from(index).unwrap();
                taken = Some((index, queue));
                Some([index, base].map(u32::to_le_bytes).concat())
            }
            _ => None,
        };
        let answer = answer.or_else(|| wants.then(|| vec![0; 8]));
        if let Some(answer) = answer {
            let length = u32::try_from(answer.len()).unwrap();
            let head = [request, 5, length].map(u32::to_le_bytes).concat();
            stream.write_all(&[head, answer].concat()).unwrap();
        }
        self.catch_up(taken);
        true
    }

    /// Does what was left when a ring was taken back.
    fn catch_up(&mut self, taken: Option<(u32, VirtQueue)>) {
        let (Some((1, mut queue)), Some(ram)) = (taken, &self.ram) else {
            return;
        };
        for packet in self.held.drain(..) {
            thread::sleep(Duration::from_millis(50));
            queue.push(ram, &packet, 0).unwrap();
        }
    }

    fn enable(&mut self, index: usize) {
        let told = &mut self.queues[index];
        let [descriptors, driver_ring, device_ring] = told.places;
        let mut queue = VirtQueue::new(index, 256).unwrap();
        let is_queue = queue.restore(&SavedQueue {
            size: told.size,
            is_ready: true,
            has_event_index: false,
            descriptors,
            driver_ring,
            device_ring,
            next_available: told.base,
            next_used: told.base,
            vector: 0,
        });
        assert!(is_queue);
        // As libvhost-user has it, a ring goes on behind what the guest sees as used.
        assert_eq!(
            queue.used_index(self.ram.as_ref().unwrap()),
            Some(told.base)
        );
        told.queue = Some(queue);
    }
}

fn device(path: &Path) -> VirtioPci {
    let net = VhostUser::net(path, MAC.parse().unwrap()).unwrap();
    VirtioPci::new("dev0", 1, ADDRESS, Box::new(net))
}

fn send(guest: &mut Guest, number: u8) {
    let packet = [vec![0; HEAD_BYTES], vec![number; 60]].concat();
    let length = u32::try_from(packet.len()).unwrap();
    let (out, room) = (
        BUFFERS + 0x10000 + u64::from(number) * 0x100,
        BUFFERS + 0x20000 + u64::from(number) * 0x100,
    );
    guest.driver.ram.write(out, &packet).unwrap();
    let before = guest.used(0).len();
    guest.offer(0, &[(room, 0x100, true)]);
    guest.offer(1, &[(out, length, false)]);
    let used = guest.wait(0, before + 1);
    assert_eq!(used[before].1, length);
    assert_eq!(guest.bytes(room, packet.len()), packet);
    guest.wait(1, before + 1);
}

#[test]
fn packets_go_to_another_process_and_come_back_over_pauses_and_a_restore() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let echo = Echo::start(&path, 2, false);
    let mut guest = Guest {
        driver: Driver::of(device(&path), shared_ram()),
        next: [0; 3],
    };
    let offered = guest.driver.offered();
    assert_eq!(offered, VERSION_1 | MERGE | 1 << 5, "its address is ours");
    guest.set_up(MERGE | 1 << 5);
    let address = guest.driver.read(0x2000, 4) | guest.driver.read(0x2004, 2) << 32;
    assert_eq!(address.to_le_bytes()[..6], [2, 0, 0, 0, 0, 7]);
    for number in 0..4 {
        send(&mut guest, number);
        guest.driver.device.worker().pause();
        thread::sleep(Duration::from_millis(1));
        guest.driver.device.worker().resume();
    }
    guest.driver.device.worker().pause();
    let state = guest.driver.device.save();
    let indexes = state
        .queues
        .iter()
        .map(|queue| (queue.next_available, queue.next_used));
    assert_eq!(indexes.collect::<Vec<_>>(), [(4, 4), (4, 4)]);
    guest.driver.device = VirtioPci::new("gone", 2, ADDRESS, Box::new(Rng::default()));
    let mut restored = device(&path);
    restored.restore(&state).unwrap();
    let Guest { driver, next } = guest;
    let mut guest = Guest {
        driver: driver.continued(restored),
        next,
    };
    guest.driver.device.worker().resume();
    for number in 4..u8::try_from(QUEUE_SIZE).unwrap() - 4 {
        send(&mut guest, number);
    }
    drop(guest);
    assert_eq!(echo.join().unwrap(), 12);
}

#[test]
fn a_pause_waits_for_what_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let echo = Echo::start(&path, 1, true);
    let mut guest = Guest {
        driver: Driver::of(device(&path), shared_ram()),
        next: [0; 3],
    };
    guest.set_up(MERGE);
    let packets = [(BUFFERS, 64, false), (BUFFERS + 64, 64, false)];
    guest.offer(1, &packets);
    // It has taken both by then, or the pause waits for it.
    thread::sleep(Duration::from_millis(500));
    assert!(guest.used(1).is_empty());
    guest.driver.device.worker().pause();
    assert_eq!(guest.used(1).len(), 2);
    let state = guest.driver.device.save();
    assert!(!state.is_broken);
    let queue = &state.queues[1];
    assert_eq!((queue.next_available, queue.next_used), (2, 2));
    drop(guest);
    echo.join().unwrap();
}
