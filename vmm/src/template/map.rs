#![forbid(unsafe_code)]
//! An image drawn as a map: what of a template's RAM is data, zero or hole.
//!
//! The image is cut into cells of equally many pages, left to right and top to bottom. A cell
//! shows how much of it is data; where there is none, whether it is zero (allocated on disk) or a
//! hole.

use pando_pager::PageIndex;
use pando_pager::image::{BackendIndex, PageKind};

use super::picture::{self, Panel};

/// How many pages of each kind a cell holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    /// Pages that hold something.
    pub data_pages: u64,
    /// Pages on disk that are all zero.
    pub zero_pages: u64,
    /// Pages that are not on disk.
    pub hole_pages: u64,
}

impl Cell {
    fn pages(self) -> u64 {
        self.data_pages + self.zero_pages + self.hole_pages
    }

    fn glyph(self) -> char {
        match (self.data_pages * 4).div_ceil(self.pages().max(1)) {
            0 if self.zero_pages > 0 => '0',
            0 => '·',
            1 => '░',
            2 => '▒',
            3 => '▓',
            _ => '█',
        }
    }
}

/// A map of an image: `cells` in rows of `columns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageMap {
    /// Cells in a row.
    pub columns: usize,
    /// Pages in a cell; the last cell may have fewer.
    pub cell_pages: u64,
    /// All cells, in the order of the image.
    pub cells: Vec<Cell>,
}

impl ImageMap {
    /// Maps `index` to at most `columns` times `rows` cells.
    pub fn new(index: &BackendIndex, columns: usize, rows: usize) -> Self {
        let pages = index.pages().get();
        let most = (columns * rows).max(1) as u64;
        let cell_pages = pages.div_ceil(most).max(1);
        let cells = (0..pages.div_ceil(cell_pages))
            .map(|cell| {
                let first = cell * cell_pages;
                let mut counts = Cell::default();
                for page in first..(first + cell_pages).min(pages) {
                    match index.kind(PageIndex::new(page)) {
                        PageKind::Data => counts.data_pages += 1,
                        PageKind::Zero => counts.zero_pages += 1,
                        PageKind::Hole => counts.hole_pages += 1,
                    }
                }
                counts
            })
            .collect();
        Self {
            columns: columns.max(1),
            cell_pages,
            cells,
        }
    }

    /// The map as lines of text, each with the byte offset at which it begins.
    pub fn text(&self) -> String {
        let glyphs: Vec<char> = self.cells.iter().map(|cell| cell.glyph()).collect();
        picture::text(&glyphs, self.columns, self.cell_bytes())
    }

    /// The map to be drawn.
    pub fn panel(&self, title: String) -> Panel {
        Panel {
            title,
            legend: vec![
                ("data", "#2f6b3c"),
                ("some data", "#a9cfae"),
                ("zero", "#e3c878"),
                ("hole", "#eceff1"),
            ],
            columns: self.columns,
            cell_bytes: self.cell_bytes(),
            colours: self.cells.iter().map(|cell| colour(*cell)).collect(),
        }
    }

    /// Bytes of a cell.
    pub fn cell_bytes(&self) -> u64 {
        self.cell_pages * pando_pager::PAGE_BYTES
    }
}

/// From pale to dark green by the share of data; sand for zero, grey for holes.
fn colour(cell: Cell) -> &'static str {
    match cell.glyph() {
        '█' => "#2f6b3c",
        '▓' => "#4f8f5b",
        '▒' => "#7db386",
        '░' => "#a9cfae",
        '0' => "#e3c878",
        _ => "#eceff1",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn index() -> BackendIndex {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 4096).unwrap();
        file.write_all_at(&[7; 16 * 4096], 0).unwrap();
        file.write_all_at(&[0; 16 * 4096], 16 * 4096).unwrap();
        file.write_all_at(&[7; 4096], 33 * 4096).unwrap();
        BackendIndex::scan(&file, 64 * 4096, &mut |_, _| ()).unwrap()
    }

    #[test]
    fn every_page_is_in_one_cell() {
        for (columns, rows) in [(1, 1), (4, 1), (5, 3), (64, 1), (100, 100)] {
            let map = ImageMap::new(&index(), columns, rows);
            assert!(map.cells.len() <= columns * rows);
            assert_eq!(map.cells.iter().map(|cell| cell.pages()).sum::<u64>(), 64);
            assert_eq!(
                map.cells.iter().map(|cell| cell.data_pages).sum::<u64>(),
                17
            );
        }
    }

    #[test]
    fn text_and_panel_tell_data_zero_and_hole_apart() {
        let map = ImageMap::new(&index(), 4, 1);
        assert_eq!(map.text().trim(), "0 MiB  █0░·");
        let panel = map.panel("ram0".to_owned());
        assert_eq!(panel.colours, ["#2f6b3c", "#e3c878", "#a9cfae", "#eceff1"]);
    }
}
