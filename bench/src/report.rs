#![forbid(unsafe_code)]
//! What a benchmark prints: an aligned table for people, JSON for programs; both with the host and
//! with the marks at which the clock starts and stops.

use std::io::{self, Write};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, TableComponent, presets};
use serde::Serialize;

use crate::host::Host;
use crate::stats::Summary;

/// A benchmark's result.
#[derive(Debug, Serialize)]
pub(crate) struct Report<T> {
    /// Which benchmark.
    pub(crate) benchmark: &'static str,
    /// Version of the tool.
    pub(crate) version: &'static str,
    /// Where it ran.
    pub(crate) host: Host,
    /// When the clock starts and stops, and what lies between.
    pub(crate) marks: Vec<String>,
    /// The figures, as the benchmark defines them.
    pub(crate) results: T,
    /// The same for people.
    #[serde(skip)]
    pub(crate) tables: Vec<TextTable>,
}

impl<T: Serialize> Report<T> {
    /// A report without tables.
    pub(crate) fn new(benchmark: &'static str, host: Host, results: T) -> Self {
        Self {
            benchmark,
            version: env!("CARGO_PKG_VERSION"),
            host,
            marks: Vec::new(),
            results,
            tables: Vec::new(),
        }
    }

    /// Prints to standard output.
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let mut out = io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut out, self)?;
            writeln!(out)?;
        } else {
            write!(out, "{}", self.text())?;
        }
        Ok(())
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n\n", self.host);
        for mark in &self.marks {
            text.push_str(&format!("{mark}\n"));
        }
        for table in &self.tables {
            text.push_str(&format!("\n{}\n{}\n", table.title, table.table));
        }
        text
    }
}

/// A titled table with aligned columns.
#[derive(Debug)]
pub(crate) struct TextTable {
    title: String,
    table: Table,
}

impl TextTable {
    /// A table with these column heads.
    pub(crate) fn new(title: impl Into<String>, heads: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_style(TableComponent::HeaderLines, '─');
        table.set_header(heads.to_vec());
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        Self {
            title: title.into(),
            table,
        }
    }

    /// A table of [`Summary`]s, one a row.
    pub(crate) fn of_summaries(title: impl Into<String>) -> Self {
        Self::new(
            title,
            &[
                "",
                "samples",
                "min",
                "p50",
                "p50 interval (95 %)",
                "p90",
                "p99",
                "max",
                "mad",
            ],
        )
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.table.add_row(cells);
    }

    /// Adds a row to a table made by [`TextTable::of_summaries`].
    pub(crate) fn summary(&mut self, name: &str, summary: &Summary) {
        let (low, high) = summary.p50_interval_ns;
        self.row(vec![
            name.to_owned(),
            summary.samples.to_string(),
            time(summary.min_ns),
            time(summary.p50_ns),
            format!("{} .. {}", time(low), time(high)),
            time(summary.p90_ns),
            time(summary.p99_ns),
            time(summary.max_ns),
            time(summary.mad_ns),
        ]);
    }
}

/// A time with three significant digits and its unit.
pub(crate) fn time(nanoseconds: u64) -> String {
    let ns = nanoseconds as f64;
    for (scale, unit) in [(1e9, "s"), (1e6, "ms"), (1e3, "µs")] {
        if ns >= scale {
            return significant(ns / scale, unit);
        }
    }
    format!("{nanoseconds} ns")
}

/// A size with three significant digits and its unit; it may be negative (memory was freed).
pub(crate) fn size(bytes: f64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let scale = f64::from(1_u32 << shift);
        if bytes.abs() >= scale {
            return significant(bytes / scale, unit);
        }
    }
    format!("{bytes:.0} B")
}

/// A ratio with two decimals.
pub(crate) fn ratio(value: f64) -> String {
    format!("{value:.2} x")
}

fn significant(value: f64, unit: &str) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_and_sizes_have_three_digits_and_a_unit() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.00 µs"),
            (15_720, "15.7 µs"),
            (2_700_000, "2.70 ms"),
            (150_400_000, "150 ms"),
            (99_960_000, "100 ms"),
            (3_000_000_000, "3.00 s"),
        ] {
            assert_eq!(time(nanoseconds), text);
        }
        assert_eq!(size(512.0 * 1024.0), "512 KiB");
        assert_eq!(size(1.5 * 1048576.0), "1.50 MiB");
        assert_eq!(size(-2048.0), "-2.00 KiB");
        assert_eq!(size(3.0), "3 B");
    }

    #[test]
    fn rows_are_aligned() {
        let mut table = TextTable::of_summaries("title");
        for micros in [1, 10_000] {
            let summary = Summary::of(&[Duration::from_micros(micros)]).unwrap();
            table.summary("name", &summary);
        }
        let text = table.table.to_string();
        let widths: Vec<usize> = text.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|&width| width == widths[0]), "{text}");
        assert!(text.contains("10.0 ms"), "{text}");
    }
}
