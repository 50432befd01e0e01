#![forbid(unsafe_code)]
//! Where logs go: standard error, so that output stays a program's.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging to standard error: warnings, more with each `-v`, or as `PANDO_LOG` says (in the
/// form of `tracing_subscriber::EnvFilter`, for instance `pando_pager=debug`).
///
/// A standard error that is gone loses its lines and nothing else.
pub fn start(verbosity: u8) {
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
        .with_target(false)
        .try_init();
}
