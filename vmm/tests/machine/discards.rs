#![forbid(unsafe_code)]
//! What a guest reads where its memory was discarded, as a balloon has it discarded: zero, or what was there.

use std::fs::File;

use pando_pager::image::{BackendIndex, Image};
use pando_pager::{Pager, PagerOptions, Serving};
use pando_vmm::memory::discard::{DiscardError, DiscardSource, Discards};
use pando_vmm::memory::guest::{GuestRam, RamBacking};

use crate::program::COUNTER;
use crate::support::{RAM_BYTES, anonymous_ram, boot_on, spec};

/// A file whose guest has counted to 4, and clone memory that is served from it.
fn clone_ram(discards_to_zero: bool) -> (tempfile::NamedTempFile, Pager<Serving>, GuestRam) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(RAM_BYTES).unwrap();
    let shared = RamBacking::shared(file.as_file(), RAM_BYTES).unwrap();
    let template = GuestRam::new(spec(1).layout(), vec![shared]).unwrap();
    template
        .write(COUNTER.into(), &4_u32.to_le_bytes())
        .unwrap();
    drop(template);
    let again = File::open(file.path()).unwrap();
    let index = BackendIndex::unsummed(&again, 0, RAM_BYTES).unwrap();
    let image = Image::part_of(again, file.path(), "ram", index, 0).unwrap();
    let mut pager = Pager::new(PagerOptions::default()).unwrap();
    let mut memory = pager.attach(image).unwrap();
    if discards_to_zero {
        pager.allow_discards(std::iter::once(&mut memory)).unwrap();
    }
    let pager = pager.serve().unwrap();
    let backings = vec![RamBacking::Paged(memory)];
    let ram = GuestRam::new(spec(1).layout(), backings).unwrap();
    (file, pager, ram)
}

/// Has a guest count, takes the page of the count away, and has it count on; the letters that it prints.
fn counts(ram: GuestRam, expected: Discards, letters: [&str; 4]) {
    assert_eq!(ram.gate().backends()[0].discards, expected);
    let (machine, mut wire) = boot_on(1, ram);
    let ram = machine.shared_ram();
    let machine = machine.resume().unwrap();
    wire.expect("R");
    let [first, second, third, fourth] = letters;
    wire.ask(b'c', first);
    wire.ask(b'c', second);
    for letter in [third, fourth] {
        let discarded = ram.discard(DiscardSource::Balloon, COUNTER.into(), 4096);
        let is_refused = matches!(discarded, Err(DiscardError::Refused(_)));
        assert_eq!(is_refused, expected == Discards::Refused, "{discarded:?}");
        assert!(is_refused || discarded.is_ok(), "{discarded:?}");
        wire.ask(b'c', letter);
    }
    machine.handle().stop("it has counted");
    machine.wait();
}

#[test]
fn a_guest_reads_zero_where_its_own_memory_was_discarded() {
    counts(anonymous_ram(), Discards::Allowed, ["B", "C", "B", "B"]);
}

#[test]
fn a_clones_guest_reads_what_it_had_where_a_discard_was_refused() {
    let (_file, pager, ram) = clone_ram(false);
    counts(ram, Discards::Refused, ["F", "G", "H", "I"]);
    pager.stop().unwrap();
}

#[test]
fn a_clones_guest_reads_zero_and_never_the_template_where_that_was_asked_for() {
    let (file, pager, ram) = clone_ram(true);
    counts(ram, Discards::Zero, ["F", "G", "B", "B"]);
    pager.stop().unwrap();
    let mut template = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(file.as_file(), &mut template, COUNTER.into())
        .unwrap();
    assert_eq!(template, 4_u32.to_le_bytes());
}
