#![forbid(unsafe_code)]
//! Where logs go: standard error, so that output stays a program's.

use std::fmt;
use std::io::IsTerminal;

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Starts logging to standard error: warnings, more with each `-v`, or as `PANDO_LOG` says (in the
/// form of `tracing_subscriber::EnvFilter`, for instance `pando_pager=debug`).
///
/// A standard error that is gone loses its lines and nothing else.
pub fn start(verbosity: u8) {
    start_with(verbosity, Marked(String::new()));
}

/// Starts logging in the process of a clone: each line begins with the clone's number, whichever
/// thread wrote it, because all clones share the supervisor's standard error.
pub fn start_clone(verbosity: u8, clone: u64) {
    start_with(verbosity, Marked(format!("clone={clone} ")));
}

fn start_with(verbosity: u8, format: Marked) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The exporter warns of each reader that goes away early.
    let default = format!("{level},metrics_exporter_prometheus=error");
    let asked = std::env::var("PANDO_LOG").unwrap_or_default();
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .parse_lossy(if asked.is_empty() { default } else { asked });
    // A second call, as in tests, finds a subscriber in place: logs already go somewhere.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .event_format(format)
        .try_init();
}

/// The usual form of a line behind a mark.
struct Marked(String);

impl<S, N> FormatEvent<S, N> for Marked
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str(&self.0)?;
        Format::default()
            .with_target(false)
            .format_event(context, writer, event)
    }
}
