#![forbid(unsafe_code)]
//! An ELF64 executable of one segment (System V ABI, "ELF-64 Object File Format", 1.5).

/// Offset of the segment in the file: page aligned, as loaders expect.
const SEGMENT_OFFSET: usize = 0x1000;
const EHDR_BYTES: u16 = 64;
const PHDR_BYTES: u16 = 56;

/// Wraps `segment`, to be loaded at `address` and entered at `entry`.
pub(super) fn wrap(segment: &[u8], address: u64, entry: u64) -> Vec<u8> {
    let mut file = Vec::with_capacity(segment.len() + SEGMENT_OFFSET);
    // e_ident: magic, 64-bit, little endian, version 1, System V.
    file.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend_from_slice(&2_u16.to_le_bytes()); // e_type: executable
    file.extend_from_slice(&62_u16.to_le_bytes()); // e_machine: x86-64
    file.extend_from_slice(&1_u32.to_le_bytes()); // e_version
    file.extend_from_slice(&entry.to_le_bytes()); // e_entry
    file.extend_from_slice(&u64::from(EHDR_BYTES).to_le_bytes()); // e_phoff
    file.extend_from_slice(&0_u64.to_le_bytes()); // e_shoff: no sections
    file.extend_from_slice(&0_u32.to_le_bytes()); // e_flags
    for half in [EHDR_BYTES, PHDR_BYTES, 1, 0, 0, 0] {
        // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&1_u32.to_le_bytes()); // p_type: load
    file.extend_from_slice(&7_u32.to_le_bytes()); // p_flags: read, write, execute
    let bytes = segment.len() as u64;
    // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    for word in [
        SEGMENT_OFFSET as u64,
        address,
        address,
        bytes,
        bytes,
        0x1000,
    ] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.resize(SEGMENT_OFFSET, 0);
    file.extend_from_slice(segment);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
    use std::io::Cursor;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn the_loader_puts_the_segment_where_the_header_says() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let file = wrap(b"aspen", 0x8000, 0x8003);
        let loaded = Elf::load(&memory, None, &mut Cursor::new(file), None).unwrap();
        assert_eq!(loaded.kernel_load, GuestAddress(0x8003));
        assert_eq!(loaded.kernel_end, 0x8005);
        assert!(
            !matches!(loaded.pvh_boot_cap, PvhBootCapability::PvhEntryPresent(_)),
            "entered in 64-bit mode"
        );
        let mut back = [0; 5];
        memory.read_slice(&mut back, GuestAddress(0x8000)).unwrap();
        assert_eq!(&back, b"aspen");
    }
}
