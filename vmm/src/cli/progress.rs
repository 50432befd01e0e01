#![forbid(unsafe_code)]
//! Progress of long work: a bar or a line on a terminal, nothing in a pipe.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over `total` steps of `unit`.
pub fn bar(total: u64, unit: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!(
        "{{prefix:>9}} [{{bar:32.green}}] {{pos}}/{{len}} {unit} {{wide_msg}}"
    ));
    with_style(ProgressBar::with_draw_target(Some(total), target()), style)
}

/// A bar over `total` bytes.
pub fn byte_bar(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>9} [{bar:32.green}] {binary_bytes}/{binary_total_bytes} {wide_msg}",
    );
    with_style(ProgressBar::with_draw_target(Some(total), target()), style)
}

/// A line that shows that something goes on, and what it last said.
pub fn spinner(prefix: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>9} {spinner} {elapsed} {wide_msg}");
    let bar = with_style(ProgressBar::with_draw_target(None, target()), style).with_prefix(prefix);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn target() -> ProgressDrawTarget {
    // Draws only where standard error is a terminal.
    ProgressDrawTarget::stderr()
}

fn with_style(
    bar: ProgressBar,
    style: Result<ProgressStyle, indicatif::style::TemplateError>,
) -> ProgressBar {
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}
