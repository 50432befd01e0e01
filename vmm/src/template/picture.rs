#![forbid(unsafe_code)]
//! Maps as a picture: cells in rows, one map below the other, each with title and legend.

use std::fmt::Write;

/// One map, ready to be drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// What the colours mean: name and colour.
    pub legend: Vec<(&'static str, &'static str)>,
    /// Cells in a row.
    pub columns: usize,
    /// Bytes of a cell, for the offsets on the left.
    pub cell_bytes: u64,
    /// The colour of each cell, left to right and top to bottom.
    pub colours: Vec<&'static str>,
}

/// Side of a cell in pixels.
const SIDE: usize = 10;
/// Room for the offsets on the left.
const LEFT: usize = 80;
/// Room for title and legend above a map.
const TOP: usize = 64;
/// Room for one name of the legend.
const NAME: usize = 120;

impl Panel {
    fn height(&self) -> usize {
        TOP + self.colours.len().div_ceil(self.columns.max(1)) * SIDE + 20
    }

    fn width(&self) -> usize {
        let names = self.legend.len() * NAME;
        LEFT + (self.columns * SIDE).max(names) + 20
    }

    fn draw(&self, picture: &mut String) {
        let _ = writeln!(
            picture,
            "<text x=\"{LEFT}\" y=\"22\" font-size=\"15\" fill=\"#1f2933\">{}</text>",
            escape(&self.title)
        );
        for (place, (name, colour)) in self.legend.iter().enumerate() {
            let x = LEFT + place * NAME;
            let _ = writeln!(
                picture,
                "<rect x=\"{x}\" y=\"34\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"43\" fill=\"#1f2933\">{}</text>",
                x + 15,
                escape(name)
            );
        }
        for (row, colours) in self.colours.chunks(self.columns.max(1)).enumerate() {
            let y = TOP + row * SIDE;
            if row % 4 == 0 {
                let _ = writeln!(
                    picture,
                    "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#52606d\">{} MiB</text>",
                    LEFT - 8,
                    y + 9,
                    row_mib(row, self.columns, self.cell_bytes)
                );
            }
            for (column, fill) in colours.iter().enumerate() {
                let x = LEFT + column * SIDE;
                let _ = writeln!(
                    picture,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"9\" height=\"9\" fill=\"{fill}\"/>"
                );
            }
        }
    }
}

/// First byte of a row of cells, in MiB.
pub fn row_mib(row: usize, columns: usize, cell_bytes: u64) -> u64 {
    ((row * columns) as u64 * cell_bytes) >> 20
}

/// Glyphs of cells as lines of text, each with the byte offset at which it begins.
pub fn text(glyphs: &[char], columns: usize, cell_bytes: u64) -> String {
    let mut text = String::new();
    for (row, glyphs) in glyphs.chunks(columns.max(1)).enumerate() {
        let mib = row_mib(row, columns, cell_bytes);
        let line: String = glyphs.iter().collect();
        let _ = writeln!(text, "{mib:>7} MiB  {line}");
    }
    text
}

/// Panels as one picture.
pub fn svg(panels: &[Panel]) -> String {
    let width = panels.iter().map(Panel::width).max().unwrap_or(0);
    let total: usize = panels.iter().map(Panel::height).sum();
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{total}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let mut top = 0;
    for panel in panels {
        let _ = writeln!(picture, "<g transform=\"translate(0 {top})\">");
        panel.draw(&mut picture);
        picture.push_str("</g>\n");
        top += panel.height();
    }
    picture.push_str("</svg>\n");
    picture
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_are_one_picture_with_texts_that_cannot_break_it() {
        let panel = |title: &str| Panel {
            title: title.to_owned(),
            legend: vec![("data", "#2f6b3c")],
            columns: 4,
            cell_bytes: 1 << 20,
            colours: vec!["#2f6b3c"; 6],
        };
        let picture = svg(&[panel("a < b"), panel("c")]);
        assert!(picture.contains("a &lt; b") && picture.contains("0 MiB"));
        assert_eq!(picture.matches("<svg").count(), 1);
        assert_eq!(picture.matches("width=\"9\"").count(), 12);
    }

    #[test]
    fn rows_say_where_they_begin() {
        let text = text(&['a', 'b', 'c'], 2, 1 << 20);
        assert_eq!(text, "      0 MiB  ab\n      2 MiB  c\n");
    }
}
