#![forbid(unsafe_code)]
//! Where logs go: standard error, so that output stays a program's.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging to standard error: warnings, more with each `-v`, or as `PANDO_LOG` says (in the
/// form of `tracing_subscriber::EnvFilter`, for instance `pando_pager=debug`).
pub fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .with_env_var("PANDO_LOG")
        .from_env_lossy();
    // A second call, as in tests, finds a subscriber in place: logs already go somewhere.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .try_init();
}
