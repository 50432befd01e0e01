#![forbid(unsafe_code)]
//! Kernel images, loaded into RAM of 4 MiB. RAM is made once: what an image left there is never read.

use std::cell::OnceCell;

use pando_vmm::arch::x86_64::boot::{BootSource, KernelImage, load};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::spec::{BackendSpec, CpuCount, MachineSpec};

const RAM_BYTES: u64 = 4 << 20;

thread_local! {
    static MACHINE: OnceCell<(MachineSpec, GuestRam)> = const { OnceCell::new() };
}

/// Takes an image.
pub fn run(data: &[u8]) {
    let boot = BootSource {
        kernel: KernelImage::Embedded {
            name: "k".to_owned(),
            bytes: data.to_vec(),
        },
        initrd: None,
        append: "console=ttyS0".to_owned(),
    };
    MACHINE.with(|machine| {
        let (spec, ram) = machine.get_or_init(make);
        let _ = load(ram, &boot, spec).map_err(|error| error.to_string());
    });
}

fn make() -> (MachineSpec, GuestRam) {
    let backend = BackendSpec::new("ram", RAM_BYTES).expect("a backend can be so small");
    let cpus = CpuCount::new(1).expect("there is one CPU");
    let spec = MachineSpec::new(cpus, vec![backend]).expect("the machine is right");
    let backing = RamBacking::anonymous(RAM_BYTES).expect("memory can be had");
    let ram = GuestRam::new(spec.layout(), vec![backing]).expect("the memory fits");
    (spec, ram)
}

/// A bzImage and ELFs with and without a PVH note.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        bzimage(),
        elf(None),
        elf(Some(0x10_0000)),
        b"\x1f\x8b".to_vec(),
    ]
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + 0x400];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20f_u16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x1000_u32.to_le_bytes());
    put(&mut image, 0x236, &1_u16.to_le_bytes());
    put(&mut image, 0x238, &2047_u32.to_le_bytes());
    put(&mut image, 0x258, &0x10_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x1000_u32.to_le_bytes());
    image
}

fn elf(pvh_entry: Option<u32>) -> Vec<u8> {
    let mut image = vec![0; 0x200];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    for (at, number) in [(16, 2_u16), (18, 62), (52, 64), (54, 56), (56, 2)] {
        put(&mut image, at, &number.to_le_bytes());
    }
    put(&mut image, 20, &1_u32.to_le_bytes());
    put(&mut image, 24, &0x10_0000_u64.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    segment(&mut image, 64, 1, [0x100, 0x10_0000, 16, 0x1000]);
    if let Some(entry) = pvh_entry {
        segment(&mut image, 120, 4, [0x180, 0, 20, 20]);
        for (at, number) in [(0x180, 4), (0x184, 4), (0x188, 18), (0x190, entry)] {
            put(&mut image, at, &number.to_le_bytes());
        }
        put(&mut image, 0x18c, b"Xen\0");
    }
    image
}

/// A program header: offset, address, bytes in the file and in memory.
fn segment(image: &mut [u8], at: usize, kind: u32, [offset, address, file, memory]: [u64; 4]) {
    put(image, at, &kind.to_le_bytes());
    for (place, number) in [(8, offset), (24, address), (32, file), (40, memory)] {
        put(image, at + place, &number.to_le_bytes());
    }
}

/// Marks in images.
pub fn words() -> Vec<String> {
    let words = ["HdrS", "ELF", "Xen"];
    words.map(str::to_owned).to_vec()
}
