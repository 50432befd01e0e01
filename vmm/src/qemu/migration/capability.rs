#![forbid(unsafe_code)]
//! Migration capabilities: QEMU's names, of which Pando has those that files need.

/// A capability that Pando has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// RAM whose file is the memory (`share=on`) is left out of the state.
    IgnoreShared,
    /// Each page of RAM has its own place in the state file.
    MappedRam,
    /// MIGRATION events are sent.
    Events,
    /// The state is compared with the UUID of the machine that loads it.
    ValidateUuid,
}

/// All names, in QEMU's order. Those without a capability cannot be switched on.
pub const NAMES: &[(&str, Option<Capability>)] = &[
    ("xbzrle", None),
    ("rdma-pin-all", None),
    ("auto-converge", None),
    ("zero-blocks", None),
    ("events", Some(Capability::Events)),
    ("postcopy-ram", None),
    ("x-colo", None),
    ("release-ram", None),
    ("return-path", None),
    ("pause-before-switchover", None),
    ("multifd", None),
    ("dirty-bitmaps", None),
    ("postcopy-blocktime", None),
    ("late-block-activate", None),
    ("x-ignore-shared", Some(Capability::IgnoreShared)),
    ("validate-uuid", Some(Capability::ValidateUuid)),
    ("background-snapshot", None),
    ("zero-copy-send", None),
    ("postcopy-preempt", None),
    ("switchover-ack", None),
    ("dirty-limit", None),
    ("mapped-ram", Some(Capability::MappedRam)),
];

/// Which capabilities are on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// [`Capability::IgnoreShared`]
    pub ignore_shared: bool,
    /// [`Capability::MappedRam`]
    pub mapped_ram: bool,
    /// [`Capability::Events`]
    pub events: bool,
    /// [`Capability::ValidateUuid`]
    pub validate_uuid: bool,
}

impl Capabilities {
    /// Whether it is on.
    pub fn get(self, capability: Capability) -> bool {
        match capability {
            Capability::IgnoreShared => self.ignore_shared,
            Capability::MappedRam => self.mapped_ram,
            Capability::Events => self.events,
            Capability::ValidateUuid => self.validate_uuid,
        }
    }

    /// Switches it.
    pub fn set(&mut self, capability: Capability, on: bool) {
        match capability {
            Capability::IgnoreShared => self.ignore_shared = on,
            Capability::MappedRam => self.mapped_ram = on,
            Capability::Events => self.events = on,
            Capability::ValidateUuid => self.validate_uuid = on,
        }
    }
}

/// Why a capability that QEMU has cannot be switched on.
pub fn refusal(name: &str) -> String {
    let why = match name {
        "postcopy-ram" | "postcopy-blocktime" | "postcopy-preempt" => {
            "Postcopy is not supported: it fetches pages from a machine that still runs, and discards RAM, \
             which a template's clones cannot do; a clone's pages come on demand anyway"
        }
        "release-ram" => {
            "release-ram is not supported: it discards RAM while it is sent, which a template's clones cannot do"
        }
        "background-snapshot" => {
            "Background-snapshot is not compatible with guest memory configuration: stop the machine and migrate to \
             a file"
        }
        _ => {
            return format!(
                "{name} is not supported: Pando saves to files alone, and needs none of it"
            );
        }
    };
    why.to_owned()
}
