#![forbid(unsafe_code)]
//! Virtio devices under a guest that does anything: the first byte says which device, the rest is what the
//! guest does, step by step. Whatever that was, the device is as good as new after a reset.

use std::fs::File;
use std::io;
use std::sync::Arc;

use pando_vmm::device::pci::bus::PciFunction;
use pando_vmm::device::pci::msix::{Message, MessageSink};
use pando_vmm::device::virtio::balloon::backend::BalloonPort;
use pando_vmm::device::virtio::balloon::device::Balloon;
use pando_vmm::device::virtio::block::backend::Disk;
use pando_vmm::device::virtio::block::device::Block;
use pando_vmm::device::virtio::block::document::{Document, DocumentPort};
use pando_vmm::device::virtio::console::backend::ConsolePort;
use pando_vmm::device::virtio::console::device::Console;
use pando_vmm::device::virtio::device::VirtioDevice;
use pando_vmm::device::virtio::limit::{HostClock, Limiter};
use pando_vmm::device::virtio::mem::device::Mem;
use pando_vmm::device::virtio::net::backend::NetPort;
use pando_vmm::device::virtio::net::device::Net;
use pando_vmm::device::virtio::rng::device::Rng;
use pando_vmm::device::virtio::transport::pci::VirtioPci;
use pando_vmm::device::virtio::vsock::backend::VsockPort;
use pando_vmm::device::virtio::vsock::device::Vsock;
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::memory::layout::{Placed, RamLayout};
use pando_vmm::spec::{
    BalloonParts, ConsoleParts, DiskAccess, Limits, MacAddress, MemParts, PortParts, Rate,
};

const RAM_BYTES: u64 = 1 << 20;
const ADDRESS: u64 = 0xc000_8000;
/// Rings of queue N are at N times this and 64 KiB.
const RINGS: u64 = 0x1_0000;
const QUEUE_STEP: u64 = 0x4000;
const QUEUE_SIZE: u64 = 16;
/// Where requests have their bytes.
const BUFFERS: u64 = 0x8_0000;
const VERSION_1: u64 = 1 << 32;
/// A disk's guest says when writes are to be durable: several are done at once.
const FLUSH: u64 = 1 << 9;
/// A console's guest takes control messages.
const MULTIPORT: u64 = 1 << 1;
const IMAGE_BYTES: u64 = 64 << 10;
/// How many kinds of devices there are.
const KINDS: u8 = 11;
/// Memory that grows and shrinks, and where.
const GROWING: u8 = 10;
const MODULE: Placed = Placed {
    guest_address: 4 << 30,
    bytes: 16 << 20,
};

/// Nobody hears it.
struct Silence;

impl MessageSink for Silence {
    fn send(&self, _: Message) -> io::Result<()> {
        Ok(())
    }
}

/// The rest of an input.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn word(&mut self) -> Option<u64> {
        self.take().map(u16::from_le_bytes).map(u64::from)
    }

    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// How many steps there are that a guest can take: registers, configuration, memory, a request, a head, a
/// notification, a set-up, a pause, and being saved and restored.
const STEPS: u8 = 9;

struct Guest {
    device: VirtioPci,
    ram: Arc<GuestRam>,
    kind: u8,
    image: File,
    queues: u64,
    available: [u16; 64],
    descriptor: [u64; 64],
}

fn device(kind: u8, image: &File) -> Option<Box<dyn VirtioDevice>> {
    let disk = |access| {
        let image = image.try_clone().ok()?;
        let folder = std::env::temp_dir();
        let disk = Disk::from_file(image, "image".as_ref(), access, &folder).ok()?;
        Some(Block::new(disk, "aspen"))
    };
    let block = |block: Option<Block>| block.map(|block| Box::new(block) as Box<dyn VirtioDevice>);
    match kind {
        0 => Some(Box::new(Rng::default())),
        1 => block(disk(DiskAccess::Write)),
        2 => block(disk(DiskAccess::Snapshot)),
        3 => block(disk(DiskAccess::Read)),
        4 => {
            let port = DocumentPort::default();
            port.put(vec![7; 1000]);
            Some(Box::new(Document::new(port)))
        }
        5 => Some(Box::new(Net::new(MacAddress::DEFAULT, NetPort::default()))),
        6 => {
            let port = |number, is_console| PortParts {
                number: Some(number),
                is_console,
                ..PortParts::default()
            };
            let parts = ConsoleParts {
                ports: vec![port(0, true), port(1, false)],
            };
            Some(Box::new(Console::new(&parts, ConsolePort::default())))
        }
        7 => {
            let limits = Limits {
                bytes: None,
                requests: Rate::new(Some(100), Some(2), "requests").ok()?,
            };
            let limiter = Limiter::new(&limits, Arc::new(HostClock::default()));
            block(disk(DiskAccess::Write).map(|disk| disk.with_limiter(limiter)))
        }
        GROWING => {
            let parts = MemParts {
                requested_bytes: 8 << 20,
                guest_address: Some(MODULE.guest_address),
                bytes: MODULE.bytes,
                ..MemParts::default()
            };
            Some(Box::new(Mem::new(&parts, None)))
        }
        8 => Some(Box::new(Vsock::new(3, VsockPort::default()))),
        _ => {
            let parts = BalloonParts {
                deflate_on_oom: true,
                free_page_reporting: true,
            };
            let port = BalloonPort::default();
            port.set_target(100);
            Some(Box::new(Balloon::new(parts, port)))
        }
    }
}

impl Guest {
    fn new(kind: u8) -> Option<Self> {
        let image = tempfile::tempfile().ok()?;
        image.set_len(IMAGE_BYTES).ok()?;
        let mut layout = RamLayout::new(&[RAM_BYTES]).ok()?;
        let mut backings = vec![RamBacking::anonymous(RAM_BYTES).ok()?];
        if kind == GROWING {
            layout = layout.with_modules(&[MODULE]).ok()?;
            backings.push(RamBacking::anonymous(MODULE.bytes).ok()?);
        }
        let ram = Arc::new(GuestRam::new(layout, backings).ok()?);
        let made = device(kind, &image)?;
        let queues = made.device_type().queues.len() as u64;
        let guest = Self {
            device: VirtioPci::new("dev0", 1, ADDRESS, made),
            ram,
            kind,
            image,
            queues,
            available: [0; 64],
            descriptor: [0; 64],
        };
        guest.connect();
        Some(guest)
    }

    fn connect(&self) {
        self.device
            .connect(Arc::clone(&self.ram), Arc::new(Silence));
        self.device.worker().resume();
    }

    fn write(&mut self, offset: u64, bytes: usize, value: u64) {
        let value = value.to_le_bytes();
        let _ = self.device.write_memory(offset, &value[..bytes]);
    }

    fn read(&mut self, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.device.read_memory(offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    /// As a driver does; the status at its end.
    fn set_up(&mut self, features: u64) -> u64 {
        self.device.write_config(4, &[6, 0]);
        for status in [0, 1, 3] {
            self.write(20, 1, status);
        }
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(12, 4, features >> (32 * half));
        }
        self.write(20, 1, 0xb);
        for queue in 0..self.queues {
            self.write(22, 2, queue);
            self.write(24, 2, QUEUE_SIZE);
            let rings = RINGS + queue * QUEUE_STEP;
            for (register, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
                self.write(register, 4, rings + offset);
                self.write(register + 4, 4, 0);
            }
            self.write(28, 2, 1);
        }
        self.write(20, 1, 0xf);
        (self.available, self.descriptor) = ([0; 64], [0; 64]);
        self.read(20, 1)
    }

    /// Offers a request of any form in a queue.
    fn offer(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let queue = u64::from(bytes.byte()?) % self.queues;
        let pieces = bytes.byte()? % 5 + 1;
        let at = usize::try_from(queue).ok()?;
        let head = self.descriptor[at];
        for number in 0..pieces {
            let (place, length) = (bytes.word()?, bytes.word()?);
            let is_writable = u64::from(bytes.byte()? & 1);
            let next = (self.descriptor[at] + 1) % QUEUE_SIZE;
            let flags = u64::from(number + 1 < pieces) | is_writable << 1;
            let high = length | flags << 32 | next << 48;
            let entry = RINGS + queue * QUEUE_STEP + self.descriptor[at] * 16;
            // Now and then behind RAM.
            let address = BUFFERS + place * 9;
            let descriptor = [address.to_le_bytes(), high.to_le_bytes()].concat();
            self.ram.write(entry, &descriptor).ok()?;
            self.descriptor[at] = next;
        }
        self.make_available(queue, head)
    }

    fn make_available(&mut self, queue: u64, head: u64) -> Option<()> {
        let at = usize::try_from(queue).ok()?;
        let ring = RINGS + queue * QUEUE_STEP + 0x1000;
        let slot = u64::from(self.available[at]) % QUEUE_SIZE;
        let head = u16::try_from(head).ok()?;
        self.ram
            .write(ring + 4 + slot * 2, &head.to_le_bytes())
            .ok()?;
        self.available[at] = self.available[at].wrapping_add(1);
        self.ram
            .write(ring + 2, &self.available[at].to_le_bytes())
            .ok()
    }

    /// Takes one step; nothing where the input ends.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        match bytes.byte()? % STEPS {
            0 => {
                let (offset, length) = (bytes.word()?, usize::from(bytes.byte()? % 8 + 1));
                let value = bytes.long()?;
                self.write(offset, length, value);
                self.read(offset, length);
            }
            1 => {
                let (offset, value) = (usize::from(bytes.byte()?), bytes.take::<4>()?);
                self.device.write_config(offset, &value);
                self.device.read_config(offset, &mut [0; 4]);
            }
            2 => {
                let (place, content) = (bytes.word()?, bytes.take::<8>()?);
                self.ram.write(RINGS + place * 8, &content).ok()?;
            }
            3 => self.offer(bytes)?,
            4 => {
                let queue = u64::from(bytes.byte()?) % self.queues;
                let head = bytes.word()?;
                self.make_available(queue, head)?;
            }
            5 => {
                let queue = u64::from(bytes.byte()?);
                self.write(0x3000 + queue * 4, 2, queue);
            }
            6 => {
                let features = bytes.long()?;
                self.set_up(features | VERSION_1);
            }
            7 => {
                self.device.worker().pause();
                self.device.worker().resume();
            }
            _ => self.save_and_restore()?,
        }
        Some(())
    }

    /// Another device goes on with what this one had.
    fn save_and_restore(&mut self) -> Option<()> {
        self.device.worker().pause();
        let state = self.device.save();
        let mut again = VirtioPci::new("dev0", 1, ADDRESS, device(self.kind, &self.image)?);
        again.restore(&state).expect("a device takes its own state");
        self.device = again;
        self.connect();
        Some(())
    }

    /// A device that went through anything can be set up again.
    fn is_as_good_as_new(&mut self) {
        self.device.worker().pause();
        self.device.worker().resume();
        let end = RINGS + self.queues * QUEUE_STEP;
        for at in (RINGS..end).step_by(0x1000) {
            self.ram.write(at, &[0; 0x1000]).expect("rings are in RAM");
        }
        assert_eq!(self.set_up(VERSION_1), 0xf);
        for queue in 0..self.queues {
            self.write(0x3000 + queue * 4, 2, queue);
        }
        self.device.worker().pause();
        assert_eq!(self.read(20, 1), 0xf, "its queues are empty and right");
    }
}

/// Takes a guest.
pub fn run(data: &[u8]) {
    let Some((kind, content)) = crate::parts::kind(data, KINDS) else {
        return;
    };
    let Some(mut guest) = Guest::new(kind) else {
        return;
    };
    let more = match kind {
        1..=3 | 7 => FLUSH,
        6 => MULTIPORT,
        _ => 0,
    };
    guest.set_up(VERSION_1 | more);
    let mut bytes = Bytes(content);
    while guest.step(&mut bytes).is_some() {}
    guest.is_as_good_as_new();
    if matches!(kind, 2 | 3) {
        // Nobody but a disk that is written writes its image.
        let facts = guest.image.metadata().expect("the image is open");
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&facts), 0);
    }
}

/// A request that reads a sector, one that writes one, and what there is beside.
pub fn seeds() -> Vec<Vec<u8>> {
    let piece = |place: u16, length: u16, is_writable: u8| {
        let [a, b] = place.to_le_bytes();
        let [c, d] = length.to_le_bytes();
        vec![a, b, c, d, is_writable]
    };
    let request = |queue: u8, pieces: &[Vec<u8>]| {
        let count = u8::try_from(pieces.len()).unwrap_or(1) - 1;
        [&[3, queue, count][..], &pieces.concat(), &[5, queue]].concat()
    };
    let read = request(0, &[piece(0, 16, 0), piece(100, 512, 1), piece(300, 1, 1)]);
    let write = request(0, &[piece(0, 16, 0), piece(100, 512, 0), piece(300, 1, 1)]);
    let room = request(0, &[piece(0, 256, 1)]);
    let packet = request(1, &[piece(0, 64, 0)]);
    // Two are under way at once.
    let both = [&read[..read.len() - 2], &write].concat();
    let again = vec![7, 8];
    let plug = |kind: u16, block: u64, count: u16| {
        // Step 2 writes eight bytes at that many times eight behind the rings.
        let put = |place: u64, word: u64| {
            let place = u16::try_from((BUFFERS - RINGS) / 8 + place).unwrap_or(0);
            [&[2][..], &place.to_le_bytes(), &word.to_le_bytes()].concat()
        };
        let ask = request(0, &[piece(0, 24, 0), piece(100, 10, 1)]);
        let address = MODULE.guest_address + block * (2 << 20);
        [
            put(0, kind.into()),
            put(1, address),
            put(2, count.into()),
            ask,
        ]
        .concat()
    };
    let grow = [
        plug(0, 1, 3),
        plug(3, 0, 8),
        plug(1, 2, 1),
        vec![8],
        plug(2, 0, 0),
    ]
    .concat();
    (0..KINDS)
        .map(|kind| {
            let steps = [
                &read[..],
                &write,
                &room,
                &packet,
                &both,
                &again,
                &grow,
                &[6],
                &[0; 8],
            ]
            .concat();
            crate::parts::of(kind, &steps)
        })
        .collect()
}

/// What steps are made of.
pub fn words() -> Vec<String> {
    ["\u{3}\0\u{2}", "\u{5}\0", "\u{7}\u{8}"]
        .map(str::to_owned)
        .to_vec()
}
