#![forbid(unsafe_code)]
//! What `pando` serves to Prometheus, asked for as Prometheus does.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};

use crate::command::Running;

/// The address of the metrics, from what a program that was just started says on standard error.
pub fn address(running: &mut Running) -> Result<String> {
    let line = running.wait_stderr("metrics: http://")?;
    line.strip_prefix("metrics: http://")
        .and_then(|rest| rest.strip_suffix("/metrics"))
        .map(str::to_owned)
        .with_context(|| format!("no address in {line:?}"))
}

/// Everything that is served there now.
pub fn scrape(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.to_owned())
}

/// The sum over all series of a family; `None` when it has none.
pub fn sum(exposition: &str, family: &str) -> Option<f64> {
    exposition
        .lines()
        .filter(|line| {
            line.strip_prefix(family)
                .is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .reduce(|sum, value| sum + value)
}
