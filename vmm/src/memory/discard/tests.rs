#![forbid(unsafe_code)]
//! What a gate lets through, and what is there afterwards.

use std::os::unix::fs::FileExt;

use super::*;
use crate::memory::guest::RamBacking;
use crate::memory::layout::RamLayout;

fn gate() -> DiscardGate {
    let backend = |id: &str, discards| BackendDiscards {
        id: id.to_owned(),
        discards,
    };
    DiscardGate::new(vec![
        backend("pc.ram", Discards::Refused),
        backend("own", Discards::Allowed),
        backend("zeroed", Discards::Zero),
    ])
}

#[test]
fn every_refusal_counts_and_says_who_wanted_what_of_which_memory() {
    let gate = gate();
    for round in 1..=3 {
        let refusal = gate.ask(DiscardSource::Balloon, 0, 256).unwrap_err();
        let text = refusal.to_string();
        assert!(text.starts_with("discard by balloon: ram_block_discard_range: Discarding RAM with readonly files is not supported"));
        assert!(text.contains("memory backend pc.ram"), "{text}");
        assert_eq!(gate.refused(DiscardSource::Balloon), 256 * round);
    }
    assert_eq!(
        gate.ask(DiscardSource::Balloon, 1, 1),
        Ok(Discards::Allowed)
    );
    assert_eq!(gate.ask(DiscardSource::Balloon, 2, 1), Ok(Discards::Zero));
    assert_eq!(gate.refused(DiscardSource::Balloon), 768);
    assert_eq!(gate.refused(DiscardSource::FreePageReporting), 0);
    assert!(gate.ask(DiscardSource::Postcopy, 3, 1).is_err(), "unknown");
}

#[test]
fn who_cannot_do_without_is_refused_early_or_known() {
    let gate = gate();
    let holder = |backend| DiscardHolder {
        device: "vm0".to_owned(),
        source: DiscardSource::VirtioMem,
        backend,
    };
    assert!(gate.require(holder(0)).is_err());
    assert_eq!(gate.refused(DiscardSource::VirtioMem), 1);
    gate.require(holder(1)).unwrap();
    assert_eq!(gate.holders(1), [holder(1)]);
    assert!(gate.holders(0).is_empty());
    gate.remove(1);
    assert!(gate.holders(1).is_empty());
}

#[test]
fn discarded_pages_read_as_zero_and_others_stay() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * PAGE_BYTES).unwrap();
    let shared = RamBacking::shared(&file, 4 * PAGE_BYTES).unwrap();
    let backings = vec![RamBacking::anonymous(4 * PAGE_BYTES).unwrap(), shared];
    let layout = RamLayout::new(&[4 * PAGE_BYTES, 4 * PAGE_BYTES]).unwrap();
    let ram = GuestRam::new(layout, backings).unwrap();
    for page in 0..8 {
        ram.write(page * PAGE_BYTES + 5, b"leaf").unwrap();
    }
    let discard = |page: u64, pages: u64| {
        ram.discard(
            DiscardSource::Balloon,
            page * PAGE_BYTES,
            pages * PAGE_BYTES,
        )
    };
    discard(3, 3).unwrap();
    for page in 0..8 {
        let mut back = [0; 4];
        ram.read(page * PAGE_BYTES + 5, &mut back).unwrap();
        let expected = if (3..6).contains(&page) {
            [0; 4]
        } else {
            *b"leaf"
        };
        assert_eq!(back, expected, "page {page}");
    }
    // The file is the memory: it has a hole.
    let mut bytes = [1; 4];
    file.read_exact_at(&mut bytes, PAGE_BYTES + 5).unwrap();
    assert_eq!(bytes, [0; 4]);
    for (address, bytes) in [
        (1, PAGE_BYTES),
        (0, 5),
        (0, 0),
        (7 * PAGE_BYTES, 2 * PAGE_BYTES),
        (u64::MAX - 4095, 4096),
    ] {
        let refused = ram.discard(DiscardSource::Balloon, address, bytes);
        assert!(
            matches!(refused, Err(DiscardError::Outside { .. })),
            "{address:#x}"
        );
    }
}

#[test]
fn memory_of_a_template_is_as_it_was() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [7; 8192]).unwrap();
    let read_only = std::fs::File::open(file.path()).unwrap();
    let backing = RamBacking::private(&read_only, 8192).unwrap();
    let ram = GuestRam::new(RamLayout::new(&[8192]).unwrap(), vec![backing]).unwrap();
    ram.write(0, b"own").unwrap();
    let refused = ram.discard(DiscardSource::Balloon, 0, 8192);
    assert!(matches!(refused, Err(DiscardError::Refused(_))));
    assert_eq!(ram.gate().refused(DiscardSource::Balloon), 2);
    let mut back = [0; 4];
    ram.read(0, &mut back).unwrap();
    assert_eq!(&back, b"own\x07");
}
