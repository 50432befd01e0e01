#![forbid(unsafe_code)]
//! The file `working-set`, byte for byte; `docs/template-format.md` has the table.

use thiserror::Error;

use super::set::{BackendSet, KnownPage, MAX_PAGES, MAX_WEIGHT, WorkingSet};
use crate::image::FrameError;
use crate::image::cursor::{Cursor, Nonsense};
use crate::image::frame::{Frame, HEADER_BYTES};
use crate::page::{PageCount, PageIndex};

const FRAME: Frame = Frame {
    magic: *b"PANDOWS\0",
    version: 1,
};
/// Most memory backends; a machine has fewer.
const MAX_BACKENDS: usize = 64;
/// Longest name of a backend that is written or read, in bytes.
const MAX_ID_BYTES: usize = 255;
/// Bytes of one page's record.
const PAGE_RECORD_BYTES: usize = 8 + 4 + 4 + 4;

/// Why bytes are no working set.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WorkingSetError {
    /// Not a working set, one of another time, or a damaged one.
    #[error("it is no working set that this build wrote")]
    Frame(#[from] FrameError),
    /// A body whose checksum is right but whose content is not: written by something else.
    #[error("it is inconsistent at byte {offset} of its body: {reason}")]
    Body {
        /// Where in the body.
        offset: usize,
        /// What is wrong there.
        reason: &'static str,
    },
}

impl From<Nonsense> for WorkingSetError {
    fn from(Nonsense { offset, reason }: Nonsense) -> Self {
        Self::Body { offset, reason }
    }
}

impl WorkingSet {
    /// The longest file there is, in bytes.
    pub const MAX_FILE_BYTES: usize = HEADER_BYTES
        + 8
        + 8
        + 8
        + 4
        + 4
        + MAX_BACKENDS * (2 + MAX_ID_BYTES + 8 + 8)
        + MAX_PAGES * PAGE_RECORD_BYTES;

    /// The file's bytes. Names of backends longer than 255 bytes are cut, and backends behind the
    /// 64th left out: such a file will not be taken for this template's.
    pub fn encode(&self) -> Vec<u8> {
        let backends = &self.backends[..self.backends.len().min(MAX_BACKENDS)];
        let mut body = Vec::new();
        for number in [self.template_mark, self.runs, self.cut_runs] {
            body.extend(number.to_le_bytes());
        }
        body.extend(self.weight.to_le_bytes());
        let count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
        body.extend(count.to_le_bytes());
        for backend in backends {
            let id = short(&backend.id);
            let length = u16::try_from(id.len()).unwrap_or(u16::MAX);
            body.extend(length.to_le_bytes());
            body.extend(id.as_bytes());
            body.extend(backend.image_pages.get().to_le_bytes());
            body.extend((backend.pages.len() as u64).to_le_bytes());
            for known in &backend.pages {
                body.extend(known.page.get().to_le_bytes());
                for number in [known.hits, known.written, known.rank] {
                    body.extend(number.to_le_bytes());
                }
            }
        }
        FRAME.encode(&body)
    }

    /// Proves and reads what `encode` wrote. Never allocates more than `bytes` can hold.
    pub fn decode(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let mut cursor = Cursor::new(FRAME.body(bytes)?);
        let template_mark = cursor.u64("mark of the template")?;
        let runs = cursor.u64("number of runs")?;
        let cut_runs = cursor.u64("number of cut runs")?;
        let weight = cursor.u32("weight of all runs")?;
        if cut_runs > runs {
            return Err(cursor.wrong("more runs were cut than there were").into());
        }
        if weight > MAX_WEIGHT {
            return Err(cursor.wrong("weight of all runs beyond its limit").into());
        }
        let count = cursor.u32("number of backends")?;
        let mut set = Self {
            template_mark,
            runs,
            cut_runs,
            weight,
            backends: Vec::new(),
        };
        let mut room = MAX_PAGES;
        for _ in 0..count {
            if set.backends.len() == MAX_BACKENDS {
                return Err(cursor.wrong("too many backends").into());
            }
            let backend = read_backend(&mut cursor, weight, room)?;
            if set.backends.iter().any(|other| other.id == backend.id) {
                return Err(cursor.wrong("two backends of one name").into());
            }
            room -= backend.pages.len();
            set.backends.push(backend);
        }
        if !cursor.is_at_end() {
            return Err(cursor.wrong("bytes behind the last backend").into());
        }
        Ok(set)
    }
}

/// The name, or as much of it as is written.
fn short(id: &str) -> &str {
    let most = id.len().min(MAX_ID_BYTES);
    let end = (0..=most).rev().find(|&end| id.is_char_boundary(end));
    &id[..end.unwrap_or(0)]
}

fn read_backend(cursor: &mut Cursor<'_>, weight: u32, room: usize) -> Result<BackendSet, Nonsense> {
    let id = cursor.text("name of a backend")?;
    if id.len() > MAX_ID_BYTES {
        return Err(cursor.wrong("name of a backend beyond its limit"));
    }
    let image_pages = cursor.u64("pages of an image")?;
    if PageCount::new(image_pages).get() != image_pages {
        return Err(cursor.wrong("more pages than an image can have"));
    }
    let count = cursor.u64("number of pages")?;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > room {
        return Err(cursor.wrong("more pages than a working set has"));
    }
    if count > cursor.left() / PAGE_RECORD_BYTES {
        return Err(cursor.wrong("fewer pages than it promises"));
    }
    let mut pages: Vec<KnownPage> = Vec::with_capacity(count);
    for _ in 0..count {
        let known = read_page(cursor, image_pages, weight)?;
        if pages.last().is_some_and(|last| last.page >= known.page) {
            return Err(cursor.wrong("pages that are not in ascending order"));
        }
        pages.push(known);
    }
    Ok(BackendSet {
        id: id.to_owned(),
        image_pages: PageCount::new(image_pages),
        pages,
    })
}

fn read_page(
    cursor: &mut Cursor<'_>,
    image_pages: u64,
    weight: u32,
) -> Result<KnownPage, Nonsense> {
    let page = cursor.u64("a page")?;
    if page >= image_pages {
        return Err(cursor.wrong("a page behind the end of its image"));
    }
    let hits = cursor.u32("hits of a page")?;
    let written = cursor.u32("written hits of a page")?;
    let rank = cursor.u32("rank of a page")?;
    if hits == 0 || hits > weight || written > hits {
        return Err(cursor.wrong("hits that no runs give"));
    }
    Ok(KnownPage {
        page: PageIndex::new(page),
        hits,
        written,
        rank,
    })
}
