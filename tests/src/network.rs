#![forbid(unsafe_code)]
//! Network namespaces with taps, which go with what holds them. They need root, as taps do.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// A network namespace that has a name.
#[derive(Debug)]
pub struct Namespace {
    /// Its name, as `ip netns` has it.
    pub name: String,
}

fn ip(words: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new("ip").args(words).output().context("no ip")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words:?}: {error}");
    Ok(output.stdout)
}

impl Namespace {
    /// Makes one; its name ends with `end`.
    pub fn new(end: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("pando-{}-{number}{end}", std::process::id());
        Self::named(name)
    }

    /// Makes one of this name.
    pub fn named(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        Ok(Self { name })
    }

    /// Makes a tap, up.
    pub fn tap(&self, tap: &str) -> Result<()> {
        let inside = ["-n", &self.name];
        ip(&[&inside[..], &["tuntap", "add", "dev", tap, "mode", "tap"]].concat())?;
        ip(&[&inside[..], &["link", "set", tap, "up"]].concat())?;
        Ok(())
    }

    /// Whether somebody is attached to a tap.
    pub fn is_attached(&self, tap: &str) -> bool {
        let shown = ip(&["-n", &self.name, "-j", "link", "show", tap]);
        let link: Option<Value> = shown
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        let flags = link.as_ref().and_then(|link| link[0]["flags"].as_array());
        flags.is_some_and(|flags| flags.iter().any(|flag| flag == "LOWER_UP"))
    }

    /// This thread, and what it starts from now on, is in the namespace.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(format!("/run/netns/{}", self.name))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // One that is gone needs no more.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}
