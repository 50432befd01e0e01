#![forbid(unsafe_code)]
//! Rings as a backend is told of them: where they are in this process, by which it finds them in its own
//! mapping of guest memory.

use std::os::fd::AsRawFd;

use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::VhostUserError;
use crate::device::virtio::queue::{Ring, VirtQueue};
use crate::memory::guest::GuestRam;

/// A ring that is handed over.
#[derive(Clone)]
pub(super) struct HandedRing {
    /// Number of its queue.
    pub(super) queue: usize,
    /// How many entries it has.
    pub(super) size: u16,
    /// The next request to take.
    pub(super) base: u16,
    /// Where its parts are.
    pub(super) places: VringConfigData,
}

/// All rings that the guest has set up.
pub(super) fn handed(
    queues: &[VirtQueue],
    ram: &GuestRam,
) -> Result<Vec<HandedRing>, VhostUserError> {
    let queues = queues.iter().enumerate();
    let ready = queues.filter(|(_, queue)| queue.is_ready());
    ready
        .map(|(number, queue)| hand(number, queue, ram))
        .collect()
}

fn hand(number: usize, queue: &VirtQueue, ram: &GuestRam) -> Result<HandedRing, VhostUserError> {
    let fault = |reason: &str| VhostUserError::Ring {
        queue: number,
        reason: reason.to_owned(),
    };
    if !queue.is_valid(ram) {
        return Err(fault("its rings are not in RAM"));
    }
    let size = queue.size();
    let entries = usize::from(size);
    // In one piece: a backend maps each piece of memory where it likes.
    let place = |ring: Ring, bytes: usize| {
        let address = GuestAddress(queue.ring(ring));
        let memory = ram.as_vm_memory();
        let slice = memory.get_slice(address, bytes);
        slice
            .map(|slice| slice.ptr_guard().as_ptr() as u64)
            .map_err(|_| fault("a ring lies in two pieces of memory"))
    };
    Ok(HandedRing {
        queue: number,
        size,
        base: queue.next_available(),
        places: VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: place(Ring::Descriptors, entries * 16)?,
            avail_ring_addr: place(Ring::Driver, entries * 2 + 6)?,
            used_ring_addr: place(Ring::Device, entries * 8 + 6)?,
            log_addr: None,
        },
    })
}

/// Guest memory as a backend is told of it.
pub(super) struct HandedMemory {
    /// The pieces.
    pub(super) regions: Vec<VhostUserMemoryRegionInfo>,
    /// Their files: the pieces have only the numbers of these.
    _files: Vec<FileOffset>,
}

/// All guest memory, with the files that it is in; or where there is some that is in none.
pub(super) fn memory(ram: &GuestRam) -> Result<HandedMemory, u64> {
    let memory = ram.as_vm_memory();
    let (mut regions, mut files) = (Vec::new(), Vec::new());
    for region in memory.iter() {
        let guest_address = region.start_addr().raw_value();
        let file = region.file_offset().ok_or(guest_address)?;
        regions.push(VhostUserMemoryRegionInfo {
            guest_phys_addr: guest_address,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: file.start(),
            mmap_handle: file.file().as_raw_fd(),
        });
        files.push(file.clone());
    }
    Ok(HandedMemory {
        regions,
        _files: files,
    })
}
