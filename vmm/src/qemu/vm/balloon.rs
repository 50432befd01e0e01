#![forbid(unsafe_code)]
//! The balloon as monitors see it: its size, what the guest says of its memory, and the event.

use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded, never};
use serde_json::{Map, Value, json};

use super::Vm;
use crate::device::virtio::balloon::backend::{BalloonPort, STATS};
use crate::memory::layout::PAGE_BYTES;
use crate::qemu::qmp::message::{Class, QmpError};
use crate::spec::BalloonParts;

/// The longest time between two questions to a guest.
const MAX_INTERVAL_SECONDS: i64 = u32::MAX as i64;

/// What monitors want of the balloon, in whichever machine.
#[derive(Debug)]
pub(super) struct Balloon {
    /// The way to it, of the machine of the moment.
    port: Option<BalloonPort>,
    /// How many pages it is to have, once somebody has said so.
    target_pages: Option<u32>,
    interval: Duration,
    /// Tells that its size has changed.
    pub(super) changes: Receiver<()>,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            port: None,
            target_pages: None,
            interval: Duration::ZERO,
            changes: never(),
        }
    }
}

impl Vm {
    /// Finds the balloon of the machine of the moment and tells it what is wanted of it.
    pub(super) fn meet_balloon(&mut self) {
        let handle = self.held.handle();
        // A machine that ends at this moment has none.
        let port = handle.and_then(|handle| handle.balloon().ok().flatten());
        let wishes = &mut self.balloon;
        wishes.changes = never();
        if let Some(port) = &port {
            if let Some(pages) = port.restored_target_pages() {
                // A reset makes another machine, of which as much is wanted.
                wishes.target_pages = Some(pages);
            } else if let Some(pages) = wishes.target_pages {
                port.set_target(pages);
            }
            if !wishes.interval.is_zero() {
                port.set_interval(wishes.interval);
            }
            let (sender, changes) = bounded(1);
            // Full: it will be looked at anyway.
            port.on_change(Box::new(move |_| {
                let _ = sender.try_send(());
            }));
            wishes.changes = changes;
        }
        wishes.port = port;
    }

    /// The balloon's size has changed.
    pub(super) fn balloon_changed(&mut self) {
        let data = json!({"actual": self.actual_bytes()});
        self.pace("BALLOON_CHANGE", "", data);
    }

    /// Sends an event, or keeps it until it may be sent.
    pub(super) fn pace(&mut self, event: &'static str, about: &str, data: Value) {
        if let Some(data) = self.paced.take(event, about, data, Instant::now()) {
            self.bus.send(event, Some(data));
        }
    }

    /// Sends the events that have waited long enough.
    pub(super) fn send_due(&mut self) {
        for (event, data) in self.paced.due(Instant::now()) {
            self.bus.send(event, Some(data));
        }
    }

    fn balloon_parts(&self) -> Option<&BalloonParts> {
        let mut devices = self.plan.spec.devices().iter();
        devices.find_map(|device| device.balloon())
    }

    /// All memory that the guest could have.
    fn guest_bytes(&self) -> u64 {
        let spec = &self.plan.spec;
        let plugged = spec.dimms().iter().map(|dimm| dimm.bytes());
        spec.ram_bytes().saturating_add(plugged.sum())
    }

    fn actual_bytes(&self) -> u64 {
        let pages = self
            .balloon
            .port
            .as_ref()
            .map_or(0, BalloonPort::actual_pages);
        let taken = u64::from(pages).saturating_mul(PAGE_BYTES);
        self.guest_bytes().saturating_sub(taken)
    }

    /// `balloon`: how much memory the guest is to have.
    pub(in crate::qemu) fn set_balloon(&mut self, bytes: i64) -> Result<(), QmpError> {
        if self.balloon_parts().is_none() {
            return Err(no_balloon());
        }
        let all = self.guest_bytes();
        let wanted = u64::try_from(bytes).ok().filter(|&bytes| bytes > 0);
        let wanted = wanted.ok_or_else(|| QmpError::generic("Parameter 'value' expects a size"))?;
        let pages = (all - wanted.min(all)) / PAGE_BYTES;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        self.balloon.target_pages = Some(pages);
        if let Some(port) = &self.balloon.port {
            port.set_target(pages);
        }
        Ok(())
    }

    /// `query-balloon`
    pub(in crate::qemu) fn query_balloon(&self) -> Result<Value, QmpError> {
        if self.balloon_parts().is_none() {
            return Err(no_balloon());
        }
        Ok(json!({"actual": self.actual_bytes()}))
    }

    /// Whether a name is the balloon's.
    pub(in crate::qemu) fn is_balloon(&self, id: &str) -> bool {
        let mut devices = self.plan.spec.devices().iter();
        devices.any(|device| device.id() == id && device.balloon().is_some())
    }

    /// Properties of the balloon: name, type, value.
    pub(in crate::qemu) fn balloon_properties(&self) -> Vec<(&'static str, &'static str, Value)> {
        let parts = self.balloon_parts().copied().unwrap_or_default();
        vec![
            ("deflate-on-oom", "bool", json!(parts.deflate_on_oom)),
            (
                "free-page-reporting",
                "bool",
                json!(parts.free_page_reporting),
            ),
            ("free-page-hint", "bool", json!(false)),
            ("guest-stats", "guest statistics", self.guest_stats()),
            (
                "guest-stats-polling-interval",
                "int",
                json!(self.balloon.interval.as_secs()),
            ),
        ]
    }

    fn guest_stats(&self) -> Value {
        let said = self.balloon.port.as_ref().map(BalloonPort::stats);
        let said = said.unwrap_or_default();
        let all = STATS.iter().zip(said.values);
        // What the guest has not said is all ones, as with QEMU.
        let all = all.map(|(name, value)| ((*name).to_owned(), json!(value.unwrap_or(u64::MAX))));
        json!({"stats": all.collect::<Map<_, _>>(), "last-update": said.last_update})
    }

    /// `guest-stats-polling-interval`
    pub(in crate::qemu) fn set_stats_interval(&mut self, value: &Value) -> Result<(), QmpError> {
        let name = "guest-stats-polling-interval";
        let seconds = value.as_i64().ok_or_else(|| {
            QmpError::generic(format!(
                "Invalid parameter type for '{name}', expected: integer"
            ))
        })?;
        if seconds < 0 {
            return Err(QmpError::generic("timer value must be greater than zero"));
        }
        if seconds > MAX_INTERVAL_SECONDS {
            return Err(QmpError::generic("timer value is too big"));
        }
        self.balloon.interval = Duration::from_secs(seconds.unsigned_abs());
        if let Some(port) = &self.balloon.port {
            port.set_interval(self.balloon.interval);
        }
        Ok(())
    }
}

fn no_balloon() -> QmpError {
    QmpError::of(
        Class::DeviceNotActive,
        "No balloon device has been activated",
    )
}
