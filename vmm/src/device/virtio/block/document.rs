#![forbid(unsafe_code)]
//! A disk of a machine's own that tells its guest who it is. What is on it is known when the machine begins:
//! a clone's is another than its template's, and of another size, by which the guest sees that it is to look.

use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::backend::Disk;
use super::device::{Block, QUEUE_SIZE};
use super::request::SECTOR_BYTES;
use super::state::BlockState;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

/// The serial number by which a guest finds it (`/dev/disk/by-id/virtio-pando-document`).
pub const DOCUMENT_SERIAL: &str = "pando-document";
/// Most bytes on it: it is memory of the clone's process.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;

static TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_BLOCK.to_le_bytes()[0] as u16,
    kind: "document",
    version: 1,
    pci_class: 0x01_0000,
    queues: &[QUEUE_SIZE],
};

/// Where a document is put that its device takes when the machine begins.
#[derive(Debug, Clone, Default)]
pub struct DocumentPort(Arc<Mutex<Option<Vec<u8>>>>);

impl DocumentPort {
    /// Puts a document there.
    pub fn put(&self, content: Vec<u8>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(content);
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    }
}

/// A document.
#[derive(Debug)]
pub struct Document {
    block: Block,
    port: DocumentPort,
    /// The size that the guest knows, in sectors.
    sectors: u64,
    /// Whether the guest was saved with another document.
    is_restored: bool,
    generation: u8,
}

impl Document {
    /// A document without content; it takes that of `port` when the machine begins.
    pub fn new(port: DocumentPort) -> Self {
        let disk = Disk::of_bytes(padded(Vec::new(), 1));
        Self {
            sectors: disk.bytes() / SECTOR_BYTES,
            block: Block::new(disk, DOCUMENT_SERIAL),
            port,
            is_restored: false,
            generation: 0,
        }
    }
}

/// Whole sectors, at least so many, with zeros behind the content.
fn padded(mut content: Vec<u8>, least_sectors: u64) -> Vec<u8> {
    content.truncate(MAX_DOCUMENT_BYTES);
    let sectors = (content.len() as u64).div_ceil(SECTOR_BYTES);
    let bytes = sectors.max(least_sectors) * SECTOR_BYTES;
    content.resize(usize::try_from(bytes).unwrap_or(content.len()), 0);
    content
}

impl VirtioDevice for Document {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn config(&self) -> &[u8] {
        self.block.config()
    }

    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        self.block.process(queue, request, ram)
    }

    fn generation(&self) -> u8 {
        self.generation
    }

    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        let Some(content) = self.port.take() else {
            return Ok(false);
        };
        let mut content = padded(content, 1);
        if self.is_restored && content.len() as u64 == self.sectors * SECTOR_BYTES {
            // Linux tells its programs of a disk whose size is another, and of nothing else.
            content = padded(content, self.sectors + 1);
        }
        let disk = Disk::of_bytes(content);
        self.sectors = disk.bytes() / SECTOR_BYTES;
        self.block = Block::new(disk, DOCUMENT_SERIAL);
        self.generation = self.generation.wrapping_add(1);
        Ok(self.is_restored)
    }

    fn save(&self) -> Vec<u8> {
        self.block.save()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let BlockState { sectors, .. } = BlockState::decode(state)?;
        let most = MAX_DOCUMENT_BYTES as u64 / SECTOR_BYTES + 1;
        if !(1..=most).contains(&sectors) {
            return Err(VirtioStateError::new(format!(
                "a document of {sectors} sectors: it has 1 to {most}"
            )));
        }
        self.sectors = sectors;
        self.is_restored = true;
        self.block = Block::new(Disk::of_bytes(padded(Vec::new(), sectors)), DOCUMENT_SERIAL);
        Ok(())
    }
}
