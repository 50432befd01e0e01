//! A template on disk and a model of it.
#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "each test file uses a part of this"
)]

pub(crate) mod shared;
pub(crate) mod sys;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use pando_pager::image::{BackendIndex, Image};
use pando_pager::source::faulty::{FaultPlan, Faulty};
use pando_pager::{CloneMemory, Idle, IoMode, Pager, PagerOptions, Serving};

pub(crate) const PAGE: usize = 4096;

/// Every way the pager can take; each test of its behaviour runs over all of them.
pub(crate) const MODES: [IoMode; 3] = [IoMode::Uring, IoMode::UringPoll, IoMode::Pread];

/// What page `page` of every test template holds, when it holds data.
pub(crate) fn content(page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let mut word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for slot in bytes.chunks_exact_mut(8) {
        slot.copy_from_slice(&word.to_le_bytes());
        word = word.rotate_left(5).wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
    bytes
}

/// Which pages of the template have data.
pub(crate) type HasData = fn(u64) -> bool;

pub(crate) struct Template {
    directory: tempfile::TempDir,
    pub(crate) pages: u64,
    pub(crate) has_data: HasData,
}

impl Template {
    pub(crate) fn new(pages: u64, has_data: HasData) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let template = Self {
            directory,
            pages,
            has_data,
        };
        let file = File::create(template.path()).unwrap();
        file.set_len(pages * 4096).unwrap();
        for page in (0..pages).filter(|&page| has_data(page)) {
            file.write_all_at(&content(page), page * 4096).unwrap();
        }
        template
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("ram.mem")
    }

    /// For tests that damage it.
    pub(crate) fn writable(&self) -> File {
        File::options().write(true).open(self.path()).unwrap()
    }

    pub(crate) fn index(&self) -> BackendIndex {
        let file = File::open(self.path()).unwrap();
        BackendIndex::scan(&file, self.pages * 4096, &mut |_, _| ()).unwrap()
    }

    pub(crate) fn image(&self) -> Image {
        Image::open(&self.path(), "ram", self.index()).unwrap()
    }

    /// What a clone must see.
    pub(crate) fn expected(&self, page: u64) -> [u8; PAGE] {
        if (self.has_data)(page) {
            content(page)
        } else {
            [0; PAGE]
        }
    }

    pub(crate) fn serve(
        &self,
        options: PagerOptions,
        plan: FaultPlan,
    ) -> (Pager<Serving>, CloneMemory) {
        let (pager, memory) = self.attach(options, plan);
        (pager.serve().unwrap(), memory)
    }

    pub(crate) fn attach(
        &self,
        options: PagerOptions,
        plan: FaultPlan,
    ) -> (Pager<Idle>, CloneMemory) {
        let pager = Pager::new(options).unwrap();
        let mut pager = pager.with_source(|inner| Box::new(Faulty::new(inner, plan)));
        let memory = pager.attach(self.image()).unwrap();
        (pager, memory)
    }
}

pub(crate) fn options(io: IoMode) -> PagerOptions {
    PagerOptions {
        template: "test".to_owned(),
        io,
        ..PagerOptions::default()
    }
}

/// A small reproducible source of page numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}
