#![forbid(unsafe_code)]
//! The device: fills what it is given.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::backend::{Entropy, PIECE_BYTES};
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

/// Most bytes that one request gets: a guest that wants more asks again.
const MAX_BYTES: u64 = 64 << 10;

static TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_RNG.to_le_bytes()[0] as u16,
    kind: "virtio-rng",
    version: 1,
    // No class fits (PCI code and id assignment, base class 0).
    pci_class: 0x00_ff00,
    queues: &[64],
};

/// A source of entropy.
#[derive(Debug, Default)]
pub struct Rng {
    entropy: Entropy,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn process(&mut self, _queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        let wanted = request.writable_bytes().min(MAX_BYTES);
        let mut done = 0;
        while done < wanted {
            let mut piece = [0; PIECE_BYTES];
            let length = usize::try_from(wanted - done).map_or(PIECE_BYTES, |n| n.min(PIECE_BYTES));
            let part = piece.get_mut(..length).unwrap_or_default();
            let filled = match self.entropy.fill(part) {
                Ok(filled @ 1..) => filled,
                Ok(0) => break,
                Err(error) => {
                    tracing::warn!("no entropy for the guest: {error}");
                    break;
                }
            };
            let bytes = part.get(..filled).unwrap_or_default();
            if request.write(ram, done, bytes).is_err() {
                // The guest named memory that it has not.
                break;
            }
            done += filled as u64;
        }
        u32::try_from(done).unwrap_or(u32::MAX)
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        if state.is_empty() {
            Ok(())
        } else {
            Err(VirtioStateError::new("entropy has no state of its own"))
        }
    }
}
