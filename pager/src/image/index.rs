#![forbid(unsafe_code)]
//! Which pages of a RAM file are data, zero or hole, and what each chunk must hash to.

use super::ImageError;
use super::cursor::Cursor;
use super::frame::Frame;
use crate::page::{PageCount, PageIndex, PageRange};

/// Pages of one chunk, the unit of checksums and of first reads: 16 KiB. The last chunk of an
/// image may have fewer.
pub const CHUNK_PAGES: u64 = 4;

const FRAME: Frame = Frame {
    magic: *b"PANDOIDX",
    version: 1,
};

const PAGES_PER_WORD: u64 = 32;
const CHUNKS_PER_WORD: u64 = PAGES_PER_WORD / CHUNK_PAGES;
/// High bit of each two-bit kind: set for data only, as kind 3 does not exist.
const DATA_BITS: u64 = 0xaaaa_aaaa_aaaa_aaaa;

/// Number of a chunk in an image, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(u64);

impl ChunkIndex {
    /// Chunk number `index`.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The chunk that holds `page`.
    pub const fn containing(page: PageIndex) -> Self {
        Self(page.get() / CHUNK_PAGES)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Its pages in an image of `pages` pages.
    pub fn pages(self, pages: PageCount) -> PageRange {
        PageRange::single(PageIndex::new(self.0.saturating_mul(CHUNK_PAGES)))
            .aligned(CHUNK_PAGES, pages)
    }
}

/// What the template has for one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Bytes that must be read.
    Data,
    /// Allocated in the file, and all its bytes are zero.
    Zero,
    /// Not allocated in the file: never written, zero.
    Hole,
}

impl PageKind {
    const fn code(self) -> u64 {
        match self {
            Self::Hole => 0,
            Self::Zero => 1,
            Self::Data => 2,
        }
    }
}

/// One RAM file: the kind of every page (two bits), and the xxh3-64 of every chunk with data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendIndex {
    pages: PageCount,
    kinds: Vec<u64>,
    /// Checksums before each word of `kinds`.
    ranks: Vec<u64>,
    checksums: Vec<u64>,
    data_pages: u64,
    zero_pages: u64,
    /// Whether chunks with data have checksums.
    is_summed: bool,
}

impl BackendIndex {
    /// Whether it knows what its data must hash to. One without is never written to a file.
    pub fn is_summed(&self) -> bool {
        self.is_summed
    }

    /// Joins kinds and checksums; the reason when they do not belong together.
    pub(super) fn from_parts(
        pages: PageCount,
        kinds: Vec<u64>,
        checksums: Vec<u64>,
    ) -> Result<Self, &'static str> {
        let (index, chunks) = Self::from_kinds(pages, kinds)?;
        if chunks != checksums.len() as u64 {
            return Err("checksums do not match the chunks with data");
        }
        Ok(Self {
            checksums,
            is_summed: true,
            ..index
        })
    }

    /// Counts kinds; an index without checksums, and how many chunks have data.
    fn from_kinds(pages: PageCount, kinds: Vec<u64>) -> Result<(Self, u64), &'static str> {
        if kinds.len() as u64 != pages.get().div_ceil(PAGES_PER_WORD) {
            return Err("page kinds do not cover the pages");
        }
        let (mut data_pages, mut zero_pages, mut chunks) = (0, 0, 0);
        let mut ranks = Vec::with_capacity(kinds.len());
        for &word in &kinds {
            let (high, low) = (word & DATA_BITS, word & !DATA_BITS);
            if high & (low << 1) != 0 {
                return Err("page kind 3 does not exist");
            }
            ranks.push(chunks);
            data_pages += u64::from(high.count_ones());
            zero_pages += u64::from(low.count_ones());
            chunks += chunks_with_data(word);
        }
        let used = pages.get() % PAGES_PER_WORD;
        if used != 0 && kinds.last().is_some_and(|word| word >> (2 * used) != 0) {
            return Err("page kinds behind the last page");
        }
        let index = Self {
            pages,
            kinds,
            ranks,
            checksums: Vec::new(),
            data_pages,
            zero_pages,
            is_summed: false,
        };
        Ok((index, chunks))
    }

    /// All pages of the file.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// What the file has for `page`. A page behind the end counts as a hole.
    pub fn kind(&self, page: PageIndex) -> PageKind {
        let Ok(word) = usize::try_from(page.get() / PAGES_PER_WORD) else {
            return PageKind::Hole;
        };
        let shift = 2 * (page.get() % PAGES_PER_WORD);
        match self.kinds.get(word).map_or(0, |word| word >> shift & 3) {
            0 => PageKind::Hole,
            1 => PageKind::Zero,
            _ => PageKind::Data,
        }
    }

    /// How many pages are of one kind.
    pub fn count(&self, kind: PageKind) -> PageCount {
        PageCount::new(match kind {
            PageKind::Data => self.data_pages,
            PageKind::Zero => self.zero_pages,
            PageKind::Hole => self.pages.get() - self.data_pages - self.zero_pages,
        })
    }

    /// The file from front to back as runs of one kind.
    pub fn runs(&self) -> impl Iterator<Item = (PageRange, PageKind)> + '_ {
        let mut at = PageIndex::default();
        std::iter::from_fn(move || {
            if at.get() >= self.pages.get() {
                return None;
            }
            let kind = self.kind(at);
            let start = at;
            let whole = kind.code() * !DATA_BITS;
            while at.get() < self.pages.get() && self.kind(at) == kind {
                let aligned = at.get() % PAGES_PER_WORD == 0;
                let word = usize::try_from(at.get() / PAGES_PER_WORD).ok();
                // Whole words of one kind are skipped at once: most of an image is hole.
                let skip = aligned && word.and_then(|word| self.kinds.get(word)) == Some(&whole);
                at = at.plus(if skip { PAGES_PER_WORD } else { 1 });
            }
            at = at.min(PageIndex::new(self.pages.get()));
            Some((PageRange::between(start, at), kind))
        })
    }

    /// The xxh3-64 of all bytes of `chunk`, if it has a data page.
    pub fn checksum(&self, chunk: ChunkIndex) -> Option<u64> {
        let word = usize::try_from(chunk.get() / CHUNKS_PER_WORD).ok()?;
        let bits = *self.kinds.get(word)? & DATA_BITS;
        let shift = 8 * (chunk.get() % CHUNKS_PER_WORD);
        if bits >> shift & 0xff == 0 {
            return None;
        }
        let before = chunks_with_data(bits & ((1 << shift) - 1));
        let rank = usize::try_from(self.ranks[word] + before).ok()?;
        self.checksums.get(rank).copied()
    }
}

fn chunks_with_data(word: u64) -> u64 {
    let data = word & DATA_BITS;
    data.to_le_bytes()
        .iter()
        .map(|&byte| u64::from(byte != 0))
        .sum()
}

/// Collects kinds and checksums from front to back.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pages: u64,
    kinds: Vec<u64>,
    checksums: Vec<u64>,
}

impl Builder {
    /// Appends one page.
    pub(super) fn page(&mut self, kind: PageKind) {
        let shift = 2 * (self.pages % PAGES_PER_WORD);
        if shift == 0 {
            self.kinds.push(0);
        }
        if let Some(word) = self.kinds.last_mut() {
            *word |= kind.code() << shift;
        }
        self.pages += 1;
    }

    /// Appends `count` holes.
    pub(super) fn holes(&mut self, count: u64) {
        self.pages += count;
        let words = self.pages.div_ceil(PAGES_PER_WORD);
        self.kinds
            .resize(usize::try_from(words).unwrap_or(usize::MAX), 0);
    }

    /// Appends the checksum of the next chunk with data.
    pub(super) fn checksum(&mut self, checksum: u64) {
        self.checksums.push(checksum);
    }

    /// Appends `count` pages with data.
    pub(super) fn data(&mut self, count: u64) {
        (0..count).for_each(|_| self.page(PageKind::Data));
    }

    /// The index without checksums; the reason if it cannot be.
    pub(super) fn build_unsummed(self) -> Result<BackendIndex, &'static str> {
        BackendIndex::from_kinds(PageCount::new(self.pages), self.kinds).map(|(index, _)| index)
    }

    /// The index; the reason if pages and checksums disagree.
    pub(super) fn build(self) -> Result<BackendIndex, &'static str> {
        BackendIndex::from_parts(PageCount::new(self.pages), self.kinds, self.checksums)
    }
}

/// `pages.idx`: the indexes of all backends of a template, by id, in the machine's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    backends: Vec<(String, BackendIndex)>,
}

impl Index {
    /// An index of these backends. Ids longer than 65535 bytes are cut when encoded.
    pub fn new(backends: Vec<(String, BackendIndex)>) -> Self {
        Self { backends }
    }

    /// The backends in order.
    pub fn backends(&self) -> &[(String, BackendIndex)] {
        &self.backends
    }

    /// Takes the backends out, in order.
    pub fn into_backends(self) -> Vec<(String, BackendIndex)> {
        self.backends
    }

    /// The file's bytes: header, then per backend the id, the number of pages, kinds, checksums.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let count = u32::try_from(self.backends.len()).unwrap_or(u32::MAX);
        body.extend_from_slice(&count.to_le_bytes());
        for (id, backend) in &self.backends {
            let length = u16::try_from(id.len()).unwrap_or(u16::MAX);
            body.extend_from_slice(&length.to_le_bytes());
            body.extend_from_slice(&id.as_bytes()[..usize::from(length)]);
            let sums = backend.checksums.len() as u64;
            let numbers = [backend.pages.get(), sums];
            for number in numbers
                .iter()
                .chain(&backend.kinds)
                .chain(&backend.checksums)
            {
                body.extend_from_slice(&number.to_le_bytes());
            }
        }
        FRAME.encode(&body)
    }

    /// Proves and reads what `encode` wrote. Never allocates more than `bytes` can hold.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        let body = FRAME.body(bytes)?;
        let mut cursor = Cursor::new(body);
        let count = cursor.u32("number of backends")?;
        let mut backends = Vec::new();
        for _ in 0..count {
            let id = cursor.text("backend id")?.to_owned();
            let pages = cursor.u64("number of pages")?;
            let sums = cursor.u64("number of checksums")?;
            let kinds = cursor.words(pages.div_ceil(PAGES_PER_WORD), "page kinds")?;
            let checksums = cursor.words(sums, "checksums")?;
            let backend = BackendIndex::from_parts(PageCount::new(pages), kinds, checksums)
                .map_err(|reason| cursor.wrong(reason))?;
            backends.push((id, backend));
        }
        if !cursor.is_at_end() {
            return Err(cursor.wrong("bytes behind the last backend").into());
        }
        Ok(Self { backends })
    }
}

#[cfg(test)]
pub(crate) mod tests;
