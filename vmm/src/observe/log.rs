#![forbid(unsafe_code)]
//! Where logs go: standard error, so that output stays a program's.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::{Mutex, PoisonError, RwLock};

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
    start_with(verbosity, "");
}

/// Starts logging to a file, or to standard error where there is none; `filter` adds to warnings, in
/// the form of `PANDO_LOG`.
pub fn start_to(path: Option<&Path>, filter: &str) -> io::Result<()> {
    let asked = std::env::var("PANDO_LOG").unwrap_or_default();
    let all = format!("warn,metrics_exporter_prometheus=error,{filter},{asked}");
    let filter = EnvFilter::builder().parse_lossy(all.trim_end_matches(','));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .log_internal_errors(false)
        .event_format(Marked);
    // A second call, as in tests, finds a subscriber in place: logs already go somewhere.
    let _ = match path {
        Some(path) => builder
            .with_writer(Mutex::new(File::create(path)?))
            .try_init(),
        None => builder.with_writer(io::stderr).try_init(),
    };
    Ok(())
}

/// Starts logging in the process of a clone: each line begins with the clone's number, whichever
/// thread wrote it, because all clones share the supervisor's standard error.
pub fn start_clone(verbosity: u8, clone: u64) {
    start_with(verbosity, &format!("clone={clone} "));
}

/// Starts logging in the root process of a template.
pub fn start_root(verbosity: u8) {
    start_with(verbosity, "root ");
}

/// Starts logging in the pager process of a supervisor.
pub fn start_pager(verbosity: u8) {
    start_with(verbosity, "pager ");
}

/// Logs from now on as a fork that is no clone yet.
pub fn become_shell(id: u64) {
    set_mark(&format!("shell={id} "));
}

/// Logs from now on as a clone, in a process that logs already.
pub fn become_clone(clone: u64) {
    set_mark(&format!("clone={clone} "));
}

/// What each line of this process begins with.
static MARK: RwLock<String> = RwLock::new(String::new());

fn set_mark(mark: &str) {
    mark.clone_into(&mut MARK.write().unwrap_or_else(PoisonError::into_inner));
}

fn start_with(verbosity: u8, mark: &str) {
    set_mark(mark);
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
        .event_format(Marked)
        .try_init();
}

/// The usual form of a line behind a mark.
struct Marked;

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
        writer.write_str(&MARK.read().unwrap_or_else(PoisonError::into_inner))?;
        Format::default()
            .with_target(false)
            .format_event(context, writer, event)
    }
}

/// This moment in UTC, `2026-01-31T12:00:00.000000Z`.
pub fn timestamp() -> String {
    use tracing_subscriber::fmt::format::Writer;
    use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
    let mut text = String::new();
    // Writing to memory does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}
