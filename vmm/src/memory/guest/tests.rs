#![forbid(unsafe_code)]
use super::*;

#[test]
fn reads_give_back_what_was_written_across_a_backend_boundary() {
    let layout = RamLayout::new(&[1 << 20, 1 << 20]).unwrap();
    let backings = vec![
        RamBacking::anonymous(1 << 20).unwrap(),
        RamBacking::anonymous(1 << 20).unwrap(),
    ];
    let ram = GuestRam::new(layout, backings).unwrap();
    let address = (1 << 20) - 3;
    ram.write(address, b"aspen").unwrap();
    let mut back = [0; 5];
    ram.read(address, &mut back).unwrap();
    assert_eq!(&back, b"aspen");
    let error = ram.write((2 << 20) - 1, b"xy").unwrap_err();
    assert!(error.to_string().contains("outside RAM"), "{error}");
}

#[test]
fn a_private_backing_never_writes_its_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8192).unwrap();
    let read_only = File::open(file.path()).unwrap();
    let backing = RamBacking::private(&read_only, 8192).unwrap();
    let ram = GuestRam::new(RamLayout::new(&[8192]).unwrap(), vec![backing]).unwrap();
    ram.write(4096, b"private").unwrap();
    assert!(
        std::fs::read(file.path())
            .unwrap()
            .iter()
            .all(|&byte| byte == 0)
    );
}

#[test]
fn read_only_memory_is_the_file_and_takes_no_writes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [[7; 4096], [8; 4096]].concat()).unwrap();
    let read_only = File::open(file.path()).unwrap();
    let backing = RamBacking::rom(&read_only, 4096, 4096).unwrap();
    let ram = GuestRam::new(RamLayout::new(&[4096]).unwrap(), vec![backing]).unwrap();
    ram.write(0, b"lost").unwrap();
    let mut back = [0; 4];
    ram.read(0, &mut back).unwrap();
    assert_eq!(back, [8; 4]);
}

#[test]
fn every_advice_is_taken() {
    let backing = RamBacking::anonymous(1 << 20).unwrap();
    for advice in [MemoryAdvice::LeaveOutOfDumps, MemoryAdvice::Populate] {
        backing.advise(advice).unwrap();
    }
    // A kernel without KSM knows no merging.
    if let Err(error) = backing.advise(MemoryAdvice::Merge) {
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

#[test]
fn a_backing_of_the_wrong_size_is_refused_by_number() {
    let layout = RamLayout::new(&[8192]).unwrap();
    let error = GuestRam::new(layout, vec![RamBacking::anonymous(4096).unwrap()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "memory backend 0 has 4096 bytes where the machine needs 8192"
    );
}
