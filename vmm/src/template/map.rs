#![forbid(unsafe_code)]
//! An image drawn as a map: what of a template's RAM is data, zero or hole.
//!
//! The image is cut into cells of equally many pages, left to right and top to bottom. A cell
//! shows how much of it is data; where there is none, whether it is zero (allocated on disk) or a
//! hole.

use std::fmt::Write;

use pando_pager::PageIndex;
use pando_pager::image::{BackendIndex, PageKind};

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
        let mut text = String::new();
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            let mib = self.row_mib(row);
            let line: String = cells.iter().map(|cell| cell.glyph()).collect();
            let _ = writeln!(text, "{mib:>7} MiB  {line}");
        }
        text
    }

    /// Bytes of a cell.
    pub fn cell_bytes(&self) -> u64 {
        self.cell_pages * pando_pager::PAGE_BYTES
    }

    /// First byte of a row of cells, in MiB.
    fn row_mib(&self, row: usize) -> u64 {
        ((row * self.columns) as u64 * self.cell_bytes()) >> 20
    }

    fn rows(&self) -> usize {
        self.cells.len().div_ceil(self.columns)
    }
}

/// Side of a cell in a picture, in pixels.
const SIDE: usize = 10;
/// Room for the offsets on the left.
const LEFT: usize = 80;
/// Room for title and legend above a map.
const TOP: usize = 64;

/// Maps as one picture, one below the other, each with its title.
pub fn svg(panels: &[(String, &ImageMap)]) -> String {
    let height = |map: &ImageMap| TOP + map.rows() * SIDE + 20;
    let width = panels
        .iter()
        .map(|(_, map)| LEFT + map.columns * SIDE + 20)
        .max()
        .unwrap_or(0);
    let total: usize = panels.iter().map(|(_, map)| height(map)).sum();
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{total}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let mut top = 0;
    for (title, map) in panels {
        let _ = writeln!(picture, "<g transform=\"translate(0 {top})\">");
        panel(&mut picture, title, map);
        picture.push_str("</g>\n");
        top += height(map);
    }
    picture.push_str("</svg>\n");
    picture
}

fn panel(picture: &mut String, title: &str, map: &ImageMap) {
    let _ = writeln!(
        picture,
        "<text x=\"{LEFT}\" y=\"22\" font-size=\"15\" fill=\"#1f2933\">{}</text>",
        escape(title)
    );
    let legend = [
        ("data", "#2f6b3c"),
        ("some data", "#a9cfae"),
        ("zero", "#e3c878"),
        ("hole", "#eceff1"),
    ];
    for (place, (name, colour)) in legend.iter().enumerate() {
        let x = LEFT + place * 90;
        let _ = writeln!(
            picture,
            "<rect x=\"{x}\" y=\"34\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"43\" fill=\"#1f2933\">{name}</text>",
            x + 15
        );
    }
    for (row, cells) in map.cells.chunks(map.columns).enumerate() {
        let y = TOP + row * SIDE;
        if row % 4 == 0 {
            let _ = writeln!(
                picture,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#52606d\">{} MiB</text>",
                LEFT - 8,
                y + 9,
                map.row_mib(row)
            );
        }
        for (column, cell) in cells.iter().enumerate() {
            let x = LEFT + column * SIDE;
            let fill = colour(*cell);
            let _ = writeln!(
                picture,
                "<rect x=\"{x}\" y=\"{y}\" width=\"9\" height=\"9\" fill=\"{fill}\"/>"
            );
        }
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
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
    fn text_and_picture_tell_data_zero_and_hole_apart() {
        let map = ImageMap::new(&index(), 4, 1);
        assert_eq!(map.text().trim(), "0 MiB  █0░·");
        let picture = svg(&[("a < b".to_owned(), &map), ("c".to_owned(), &map)]);
        assert!(picture.contains("a &lt; b") && picture.contains("#2f6b3c"));
        assert_eq!(picture.matches("<svg").count(), 1);
    }
}
