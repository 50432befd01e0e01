#![forbid(unsafe_code)]
//! What monitors ask about the machine.

use std::fs;

use serde_json::{Value, json};

use super::outgoing::{MigrationStatus, Statistics};
use super::{RunStatus, Vm};
use crate::qemu::line::Wanted;
use crate::qemu::migration::capability::{Capabilities, Capability};
use crate::qemu::qmp::message::QmpError;
use crate::spec::{Dimm, Uuid};

impl Vm {
    /// What the machine is doing.
    pub(in crate::qemu) fn status(&self) -> RunStatus {
        self.status
    }

    /// What the command line wanted.
    pub(in crate::qemu) fn wanted(&self) -> &Wanted {
        &self.plan.wanted
    }

    /// The machine in QEMU's words.
    pub(in crate::qemu) fn kind(&self) -> &str {
        &self.plan.wanted.machine.kind
    }

    pub(in crate::qemu) fn uuid(&self) -> Uuid {
        self.plan.spec.identity().uuid.unwrap_or_default()
    }

    /// `query-vm-generation-id`
    pub(in crate::qemu) fn query_generation_id(&self) -> Result<Value, QmpError> {
        match self.plan.generation_id {
            Some(id) => Ok(json!({"guid": id.to_string()})),
            None => Err(QmpError::generic("VM Generation ID device not found")),
        }
    }

    /// Whether `id` is that of `-device vmgenid`.
    pub(in crate::qemu) fn is_generation_device(&self, id: &str) -> bool {
        let generation = &self.plan.wanted.identity.generation;
        let own = generation.as_ref().and_then(|device| device.id.as_deref());
        own == Some(id)
    }

    /// The path of the object that is all RAM.
    pub(in crate::qemu) fn ram_object(&self) -> String {
        let parts = self.plan.spec.to_parts();
        let backend = parts.ram_backend.map(|id| format!("/objects/{id}"));
        backend.unwrap_or_default()
    }

    pub(in crate::qemu) fn capabilities(&self) -> Capabilities {
        self.migration.capabilities
    }

    pub(in crate::qemu) fn set_capability(&mut self, capability: Capability, on: bool) {
        self.migration.capabilities.set(capability, on);
    }

    pub(in crate::qemu) fn parameters(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.migration.parameters.iter()
    }

    pub(in crate::qemu) fn set_parameter(&mut self, name: String, value: Value) {
        self.migration.parameters.insert(name, value);
    }

    pub(in crate::qemu) fn cancel_migration(&mut self) {
        self.migration.cancel();
    }

    /// Whether a state is to be loaded into memory that has files.
    pub(in crate::qemu) fn has_files_to_load(&self) -> bool {
        self.incoming.asked && self.objects().any(|backend| backend.file().is_some())
    }

    /// What `migrate-continue` says: a save is never at the state that it asks for.
    pub(in crate::qemu) fn not_waiting(&self) -> QmpError {
        QmpError::generic(format!(
            "Migration not in expected state: {}",
            self.migration_name()
        ))
    }

    pub(in crate::qemu) fn query_status(&self) -> Value {
        json!({
            "status": self.status.name(),
            "running": self.status == RunStatus::Running,
        })
    }

    pub(in crate::qemu) fn query_name(&self) -> Value {
        match &self.plan.spec.identity().name {
            Some(name) => json!({"name": name}),
            None => json!({}),
        }
    }

    pub(in crate::qemu) fn query_cpus(&self) -> Value {
        let threads = vcpu_threads();
        (0..self.plan.spec.cpus().get())
            .map(|cpu| {
                json!({
                    "cpu-index": cpu,
                    "thread-id": threads.get(usize::from(cpu)).copied().unwrap_or(0),
                    "qom-path": format!("/machine/unattached/device[{cpu}]"),
                    "target": "x86_64",
                    "props": self.cpu_place(cpu),
                })
            })
            .collect()
    }

    pub(in crate::qemu) fn query_hotpluggable_cpus(&self) -> Value {
        (0..self.plan.spec.cpus().get())
            .rev()
            .map(|cpu| {
                json!({
                    "props": self.cpu_place(cpu),
                    "vcpus-count": 1,
                    "qom-path": format!("/machine/unattached/device[{cpu}]"),
                    "type": "host-x86_64-cpu",
                })
            })
            .collect()
    }

    fn cpu_place(&self, cpu: u8) -> Value {
        let nodes = self.plan.spec.numa().nodes();
        let node = nodes.iter().position(|node| node.cpus().contains(&cpu));
        json!({"socket-id": 0, "core-id": cpu, "thread-id": 0, "node-id": node.unwrap_or(0)})
    }

    pub(in crate::qemu) fn query_memdev(&self) -> Value {
        self.listed_objects()
            .into_iter()
            .map(|backend| {
                let changed = |name: &str, value: bool| {
                    let key = (backend.id().to_owned(), name.to_owned());
                    self.changed.get(&key).copied().unwrap_or(value)
                };
                json!({
                    "id": backend.id(),
                    "size": backend.bytes(),
                    "merge": changed("merge", backend.merge()),
                    "dump": changed("dump", backend.dump()),
                    "prealloc": changed("prealloc", backend.prealloc()),
                    "share": backend.is_shared(),
                    "reserve": backend.reserve(),
                    "policy": "default",
                    "host-nodes": [],
                })
            })
            .collect()
    }

    pub(in crate::qemu) fn query_memory_devices(&self) -> Value {
        let dimms = self.plan.spec.dimms().iter();
        let mut all: Vec<(u64, Value)> = dimms
            .map(|dimm| {
                let mut device = self.dimm_facts(dimm);
                if let Some(id) = self.plan.wanted.dimm_id(dimm.id()) {
                    device["id"] = json!(id);
                }
                let address = dimm.guest_address();
                (address, json!({"type": "dimm", "data": device}))
            })
            .collect();
        all.extend(self.query_growing());
        all.sort_by_key(|(address, _)| *address);
        all.into_iter().map(|(_, device)| device).collect()
    }

    /// What QEMU says of a module, besides its id.
    pub(in crate::qemu) fn dimm_facts(&self, dimm: &Dimm) -> Value {
        let backend = self.plan.spec.backends()[dimm.backend()].id();
        json!({
                    "addr": dimm.guest_address(),
                    "size": dimm.bytes(),
                    "slot": dimm.slot(),
                    "node": dimm.node(),
                    "memdev": format!("/objects/{backend}"),
                    "hotplugged": self.hotplugged.contains(dimm.id()),
                    "hotpluggable": true,
        })
    }

    /// The module of an id, as it was typed.
    pub(in crate::qemu) fn find_dimm(&self, id: &str) -> Option<&Dimm> {
        let known = self.plan.wanted.dimm_id(id)?;
        self.plan
            .spec
            .dimms()
            .iter()
            .find(|dimm| dimm.id() == known)
    }

    pub(in crate::qemu) fn query_memory_size(&self) -> Value {
        let plugged: u64 = self.plan.spec.dimms().iter().map(|dimm| dimm.bytes()).sum();
        let plugged = plugged + self.grown_bytes();
        json!({"base-memory": self.plan.spec.ram_bytes(), "plugged-memory": plugged})
    }

    /// `info numa`
    pub(in crate::qemu) fn numa_text(&self) -> String {
        let spec = &self.plan.spec;
        let nodes = spec.numa().nodes();
        let mut text = format!("{} nodes\n", nodes.len());
        for (number, node) in (0_u32..).zip(nodes) {
            let cpus: String = node.cpus().iter().map(|cpu| format!(" {cpu}")).collect();
            let own = node
                .backend()
                .map_or(0, |backend| spec.backends()[backend].bytes());
            let dimms = spec.dimms().iter().filter(|dimm| dimm.node() == number);
            let plugged: u64 = dimms.map(|dimm| dimm.bytes()).sum();
            text.push_str(&format!(
                "node {number} cpus:{cpus}\nnode {number} size: {} MB\nnode {number} plugged: {} MB\n",
                (own + plugged) >> 20,
                plugged >> 20
            ));
        }
        text
    }

    fn migration_name(&self) -> &'static str {
        match &self.migration.status {
            MigrationStatus::None => "none",
            MigrationStatus::Setup => "setup",
            MigrationStatus::Active => "active",
            MigrationStatus::Completed(_) => "completed",
            MigrationStatus::Cancelled => "cancelled",
            MigrationStatus::Failed(_) => "failed",
        }
    }

    pub(in crate::qemu) fn query_migrate(&self) -> Value {
        let status = self.migration_name();
        match &self.migration.status {
            MigrationStatus::None => json!({}),
            MigrationStatus::Failed(why) => json!({"status": status, "error-desc": why}),
            // A machine that was loaded has no figures.
            MigrationStatus::Completed(figures)
                if self.incoming.asked && *figures == Statistics::default() =>
            {
                json!({"status": status})
            }
            MigrationStatus::Completed(figures) => {
                let ms =
                    |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                json!({
                    "status": status,
                    "setup-time": 0,
                    "downtime": ms(figures.downtime),
                    "total-time": ms(figures.total),
                    "ram": ram_figures(figures),
                })
            }
            _ => json!({"status": status}),
        }
    }
}

fn ram_figures(figures: &Statistics) -> Value {
    let seconds = figures.total.as_secs_f64().max(1e-3);
    json!({
        "transferred": figures.file_bytes,
        "remaining": 0,
        "total": figures.ram_bytes,
        "duplicate": (figures.ram_bytes - figures.written_bytes.min(figures.ram_bytes)) / 4096,
        "normal": figures.written_bytes / 4096,
        "normal-bytes": figures.written_bytes,
        "dirty-pages-rate": 0,
        "mbps": figures.file_bytes as f64 * 8.0 / seconds / 1e6,
        "dirty-sync-count": 1,
        "dirty-sync-missed-zero-copy": 0,
        "postcopy-requests": 0,
        "page-size": 4096,
        "multifd-bytes": 0,
        "pages-per-second": 0,
        "precopy-bytes": figures.written_bytes,
        "downtime-bytes": 0,
        "postcopy-bytes": 0,
    })
}

/// Numbers of the threads of the vCPUs, by the names that they have.
fn vcpu_threads() -> Vec<u64> {
    let mut threads: Vec<(String, u64)> = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            let name = name.trim().strip_prefix("vcpu")?.to_owned();
            Some((name, entry.file_name().to_str()?.parse().ok()?))
        })
        .collect();
    threads.sort();
    threads.into_iter().map(|(_, number)| number).collect()
}
