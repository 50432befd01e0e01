#![forbid(unsafe_code)]
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::arch::x86_64::layout::{
    BOOT_PARAMS_ADDRESS, GDT_ADDRESS, HIGH_MEMORY_ADDRESS, PAGE_TABLES_ADDRESS,
    PVH_START_INFO_ADDRESS,
};
use crate::memory::guest::RamBacking;
use crate::memory::layout::RamLayout;
use crate::spec::{CpuCount, Identity, SystemTexts, Uuid};

const MIB: u64 = 1 << 20;

/// A machine of this many CPUs; of its RAM only what the tests gave it matters.
fn spec(cpus: u32) -> MachineSpec {
    let ram = BackendSpec::new("ram0", 64 * MIB).unwrap();
    MachineSpec::new(CpuCount::new(cpus).unwrap(), vec![ram]).unwrap()
}

fn machine(bytes: u64) -> GuestRam {
    let backing = RamBacking::anonymous(bytes).unwrap();
    GuestRam::new(RamLayout::new(&[bytes]).unwrap(), vec![backing]).unwrap()
}

fn embedded(bytes: Vec<u8>) -> BootSource {
    BootSource {
        kernel: KernelImage::Embedded {
            name: "test kernel".to_owned(),
            bytes,
        },
        initrd: None,
        append: "console=ttyS0 quiet".to_owned(),
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage with one setup sector and 4 KiB of code, which wants 8 MiB at 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    image[0x1f1] = 1;
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &1_u16.to_le_bytes());
    put(&mut image, 0x238, &64_u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x80_0000_u32.to_le_bytes());
    put(&mut image, 1024, b"protected mode code");
    image
}

/// An ELF64 with one segment of `code` at `address`, and a note if there is a PVH entry.
fn elf(address: u64, code: &[u8], pvh_entry: Option<u32>) -> Vec<u8> {
    let segments = 1 + u16::from(pvh_entry.is_some());
    let mut image = vec![0; 64 + 56 * usize::from(segments)];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2_u16.to_le_bytes());
    put(&mut image, 18, &62_u16.to_le_bytes());
    put(&mut image, 24, &address.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 54, &56_u16.to_le_bytes());
    put(&mut image, 56, &segments.to_le_bytes());
    let mut note = Vec::new();
    if let Some(entry) = pvh_entry {
        for field in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            note.extend_from_slice(&u32::to_le_bytes(field));
        }
        let offset = (image.len() + code.len()) as u64;
        let note_bytes = note.len() as u64;
        segment(&mut image, 120, 4, [offset, 0, note_bytes, note_bytes]);
    }
    let offset = image.len() as u64;
    let bytes = code.len() as u64;
    segment(&mut image, 64, 1, [offset, address, bytes, bytes + 4096]);
    image.extend_from_slice(code);
    image.extend(note);
    image
}

/// Offset in the file, address, bytes in the file, bytes in memory.
fn segment(image: &mut [u8], at: usize, kind: u32, fields: [u64; 4]) {
    let [offset, address, file_bytes, memory_bytes] = fields;
    put(image, at, &kind.to_le_bytes());
    put(image, at + 8, &offset.to_le_bytes());
    put(image, at + 16, &address.to_le_bytes());
    put(image, at + 24, &address.to_le_bytes());
    put(image, at + 32, &file_bytes.to_le_bytes());
    put(image, at + 40, &memory_bytes.to_le_bytes());
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.read(address, &mut bytes).unwrap();
    bytes
}

fn error(ram: &GuestRam, boot: &BootSource) -> String {
    load(ram, boot, &spec(1)).unwrap_err().to_string()
}

#[test]
fn a_machine_that_says_who_it_is_tells_its_guest() {
    let ram = machine(64 * MIB);
    let at = |ram: &GuestRam| {
        let mut found = [0; 5];
        ram.read(crate::arch::x86_64::layout::SMBIOS_ADDRESS, &mut found)
            .unwrap();
        found
    };
    load(&ram, &embedded(bzimage()), &spec(1)).unwrap();
    assert_eq!(at(&ram), [0; 5]);
    let identity = Identity {
        uuid: Some(Uuid([7; 16])),
        system: Some(SystemTexts::default()),
        ..Identity::default()
    };
    let known = spec(1).with_identity(identity).unwrap();
    let ram = machine(64 * MIB);
    load(&ram, &embedded(bzimage()), &known).unwrap();
    assert_eq!(&at(&ram), b"_SM3_");
}

#[test]
fn a_bzimage_is_loaded_at_one_mib_and_told_everything() {
    let ram = machine(64 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    fs::write(&initrd, vec![0x5a; 5000]).unwrap();
    let boot = BootSource {
        initrd: Some(initrd),
        ..embedded(bzimage())
    };
    let entry = load(&ram, &boot, &spec(2)).unwrap();
    assert_eq!(entry.registers, InitialRegisters::linux64(0x10_0200));
    assert_eq!(
        &read::<19>(&ram, HIGH_MEMORY_ADDRESS),
        b"protected mode code"
    );

    let params: [u8; 4096] = read(&ram, BOOT_PARAMS_ADDRESS);
    let u32_at = |at: usize| u32::from_le_bytes(params[at..at + 4].try_into().unwrap());
    assert_eq!(&params[0x202..0x206], b"HdrS");
    assert_eq!(params[0x210], 0xff, "type_of_loader");
    assert_eq!(u32_at(0x70), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(u32_at(0x214), 0x10_0000, "code32_start");
    assert_eq!(u32_at(0x218), 0x3ff_e000, "ramdisk_image");
    assert_eq!(u32_at(0x21c), 5000, "ramdisk_size");
    assert_eq!(read::<2>(&ram, 0x3ff_e000 + 4999), [0x5a, 0]);
    assert_eq!(u32_at(0x228), 0x2_0000, "cmd_line_ptr");
    assert_eq!(&read::<20>(&ram, 0x2_0000), b"console=ttyS0 quiet\0");
    let map = memory_map(&ram.layout(), &|_| false, &[]);
    assert_eq!(usize::from(params[0x1e8]), map.len());
    for (number, range) in map.iter().enumerate() {
        let at = 0x2d0 + 20 * number;
        assert_eq!(params[at..at + 8], range.start.to_le_bytes());
        assert_eq!(params[at + 8..at + 16], range.bytes.to_le_bytes());
        assert_eq!(u32_at(at + 16), range.kind.code());
    }
    assert_eq!(&read::<8>(&ram, 0xe_0000), b"RSD PTR ");
}

#[test]
fn page_tables_map_four_gib_one_to_one() {
    let ram = machine(64 * MIB);
    load(&ram, &embedded(bzimage()), &spec(1)).unwrap();
    for address in [0, 0x10_0200, 0x3ff_ffff, 0xfee0_0000, 0xffff_ffff_u64] {
        let mut table = PAGE_TABLES_ADDRESS;
        for shift in [39, 30] {
            let entry = u64::from_le_bytes(read(&ram, table + (address >> shift & 511) * 8));
            assert_eq!(entry & 0xfff, 3);
            table = entry & !0xfff;
        }
        let entry = u64::from_le_bytes(read(&ram, table + (address >> 21 & 511) * 8));
        assert_eq!(entry & 0xfff, 0x83);
        assert_eq!(entry & !0xfff, address & !0x1f_ffff);
    }
    assert_eq!(read::<8>(&ram, PAGE_TABLES_ADDRESS + 8), [0; 8]);
    let code = u64::from_le_bytes(read(&ram, GDT_ADDRESS + 0x10));
    assert_eq!(code, 0x00af_9b00_0000_ffff);
}

#[test]
fn an_elf_starts_at_its_entry_in_long_mode() {
    let ram = machine(64 * MIB);
    let entry = load(&ram, &embedded(elf(0x20_0000, b"code", None)), &spec(1)).unwrap();
    assert_eq!(entry.registers, InitialRegisters::linux64(0x20_0000));
    assert_eq!(&read::<4>(&ram, 0x20_0000), b"code");
    let params: [u8; 4096] = read(&ram, BOOT_PARAMS_ADDRESS);
    assert_eq!(&params[0x202..0x206], b"HdrS");
    assert_eq!(params[0x70..0x78], 0xe_0000_u64.to_le_bytes());
}

#[test]
fn an_elf_with_a_pvh_note_starts_there_without_paging() {
    let ram = machine(64 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    fs::write(&initrd, b"initrd").unwrap();
    let boot = BootSource {
        initrd: Some(initrd),
        ..embedded(elf(0x20_0000, b"code", Some(0x20_0002)))
    };
    let entry = load(&ram, &boot, &spec(1)).unwrap();
    assert_eq!(entry.registers, InitialRegisters::pvh(0x20_0002));
    let info: [u8; 56] = read(&ram, PVH_START_INFO_ADDRESS);
    let u64_at = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
    assert_eq!(info[..4], 0x336e_c578_u32.to_le_bytes());
    assert_eq!(info[12], 1, "modules");
    assert_eq!(u64_at(24), 0x2_0000, "command line");
    assert_eq!(u64_at(32), 0xe_0000, "rsdp");
    let module: [u8; 16] = read(&ram, u64_at(16));
    assert_eq!(module[..8], 0x3ff_f000_u64.to_le_bytes());
    assert_eq!(module[8..], 6_u64.to_le_bytes());
    let first: [u8; 24] = read(&ram, u64_at(40));
    assert_eq!(first[8..16], 0x9_fc00_u64.to_le_bytes());
    assert_eq!(
        info[48] as usize,
        memory_map(&ram.layout(), &|_| false, &[]).len()
    );
}

#[test]
fn what_is_no_kernel_is_named_with_what_was_expected() {
    let ram = machine(64 * MIB);
    assert_eq!(
        error(&ram, &embedded(b"\x1f\x8b\x08rest".to_vec())),
        "test kernel is no kernel: expected a bzImage (vmlinuz) or a 64-bit x86 ELF (vmlinux), \
         found gzip data (decompress it first)"
    );
    let text = error(&ram, &embedded(b"hello world".to_vec()));
    assert!(
        text.ends_with("found bytes 68 65 6c 6c 6f 20 77 6f"),
        "{text}"
    );
    let text = error(&ram, &embedded(Vec::new()));
    assert!(text.ends_with("found an empty file"), "{text}");
}

#[test]
fn kernels_that_cannot_be_loaded_say_why() {
    let ram = machine(64 * MIB);
    let changed = |at: usize, byte: u8| {
        let mut image = bzimage();
        image[at] = byte;
        error(&ram, &embedded(image))
    };
    assert!(changed(0x236, 0).contains("no 64-bit entry"));
    assert!(changed(0x206, 0x0b).contains("boot protocol 2.0b is older"));
    assert!(changed(0x1f1, 200).contains("truncated at 5120 bytes"));
    assert!(changed(0x24d, 0x20).contains("truncated: 4096 bytes are missing"));
    let mut other_machine = elf(0x20_0000, b"code", None);
    other_machine[18] = 183;
    assert!(error(&ram, &embedded(other_machine)).contains("another machine than x86-64"));
    let low = elf(0x1000, b"code", None);
    assert!(error(&ram, &embedded(low)).contains("cannot be placed"));
    let mut cut = elf(0x20_0000, b"code", None);
    cut.pop();
    assert!(error(&ram, &embedded(cut)).contains("past the end of the file"));
    let outside = elf(0x20_0000, b"code", Some(0x100));
    assert!(error(&ram, &embedded(outside)).contains("entry 0x100 lies outside"));
}

#[test]
fn a_kernel_that_does_not_fit_says_how_much_it_needs() {
    let ram = machine(20 * MIB);
    assert_eq!(
        error(&ram, &embedded(bzimage())),
        "kernel test kernel needs RAM up to 0x1800000 (24 MiB), the machine's low RAM ends at \
         0x1400000: give it more memory"
    );
    let text = error(&ram, &embedded(elf(0x200_0000, b"code", None)));
    assert!(
        text.contains("needs RAM up to 0x2001004 (33 MiB)"),
        "{text}"
    );
}

#[test]
fn an_initrd_that_does_not_fit_says_how_much_is_free() {
    let ram = machine(25 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("initrd");
    fs::File::create(&path).unwrap().set_len(MIB + 1).unwrap();
    let boot = |initrd: &Path| BootSource {
        initrd: Some(initrd.to_owned()),
        ..embedded(bzimage())
    };
    assert_eq!(
        error(&ram, &boot(&path)),
        format!(
            "initrd {} of 1048577 bytes does not fit: 1048576 bytes are free behind the kernel; \
             give the machine more memory",
            path.display()
        )
    );
    fs::write(&path, b"").unwrap();
    assert!(error(&ram, &boot(&path)).ends_with("is empty"));
    let missing = directory.path().join("missing");
    assert!(error(&ram, &boot(&missing)).starts_with("cannot open initrd"));
    assert!(error(&ram, &boot(directory.path())).starts_with("cannot open initrd"));
}

#[test]
fn a_kernel_file_that_cannot_be_opened_is_named() {
    let ram = machine(64 * MIB);
    for path in ["/nonexistent/vmlinuz", "/dev", "/dev/null"] {
        let boot = BootSource {
            kernel: KernelImage::File(path.into()),
            ..embedded(Vec::new())
        };
        assert_eq!(error(&ram, &boot), format!("cannot open kernel {path}"));
    }
}

#[test]
fn command_lines_are_limited_by_the_kernel() {
    let ram = machine(64 * MIB);
    let boot = |append: String| BootSource {
        append,
        ..embedded(bzimage())
    };
    load(&ram, &boot("x".repeat(64)), &spec(1)).unwrap();
    assert_eq!(
        error(&ram, &boot("x".repeat(65))),
        "the kernel's command line has 65 bytes, this kernel takes at most 64"
    );
    assert_eq!(
        error(&ram, &boot("a\0b".to_owned())),
        "the kernel's command line has a zero byte at position 1"
    );
    let elf = BootSource {
        append: "x".repeat(2048),
        ..embedded(elf(0x20_0000, b"code", None))
    };
    assert!(error(&ram, &elf).ends_with("takes at most 2047"));
}

proptest! {
    #[test]
    fn no_bytes_make_the_loader_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = load(&machine(4 * MIB), &embedded(bytes), &spec(1));
    }

    #[test]
    fn no_damage_to_a_kernel_makes_the_loader_panic(
        which in 0..3, changes in prop::collection::vec((0_usize..0x290, any::<u8>()), 1..6),
        bytes: usize,
    ) {
        let mut image = match which {
            0 => bzimage(),
            1 => elf(0x20_0000, b"code", None),
            _ => elf(0x20_0000, b"code", Some(0x20_0000)),
        };
        let length = image.len();
        for (at, byte) in changes {
            image[at % length] = byte;
        }
        image.truncate(if bytes % 4 == 0 { bytes / 4 % length } else { length });
        let _ = load(&machine(32 * MIB), &embedded(image), &spec(1));
    }

    #[test]
    fn program_headers_of_any_content_do_not_panic(
        fields: [u64; 8], small: [u8; 8], kinds: [bool; 2],
    ) {
        let mut image = elf(0x20_0000, b"code", Some(0x20_0000));
        // Half of the fields near what could be right.
        let value = |i: usize| if small[i] & 1 == 0 { u64::from(small[i]) } else { fields[i] };
        for (number, at) in [64, 120].into_iter().enumerate() {
            let i = number * 4;
            let kind = if kinds[number] { 1 } else { 4 };
            segment(&mut image, at, kind, [value(i), value(i + 1), value(i + 2), value(i + 3)]);
        }
        let _ = load(&machine(4 * MIB), &embedded(image), &spec(1));
    }
}
