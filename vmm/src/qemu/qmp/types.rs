#![forbid(unsafe_code)]
//! The types of the schema: what commands are given beside plain values, what they return, and what
//! events bring. Plain tables, with QEMU's names.

/// What a type is made of.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Members with their types; one that may be missing has `?` behind its name. With a member that
    /// says which, there are variants: its value and the type whose members come too.
    Object {
        /// Always there, but for those with `?`.
        members: Members,
        /// The member that says which variant.
        tag: Option<&'static str>,
        /// Its values and their types.
        variants: Members,
    },
    /// One of these words.
    Enum(&'static [&'static str]),
}

/// Names with something else.
pub type Members = &'static [(&'static str, &'static str)];

pub(super) const fn object(members: Members) -> Shape {
    Shape::Object {
        members,
        tag: None,
        variants: &[],
    }
}

/// What commands return that return more than nothing; `[T]` is a list.
pub const RETURNS: Members = &[
    ("query-version", "VersionInfo"),
    ("query-commands", "[CommandInfo]"),
    ("query-qmp-schema", "[SchemaInfo]"),
    ("query-status", "StatusInfo"),
    ("query-name", "NameInfo"),
    ("query-uuid", "UuidInfo"),
    ("query-kvm", "KvmInfo"),
    ("query-target", "TargetInfo"),
    ("query-current-machine", "CurrentMachineParams"),
    ("query-cpus-fast", "[CpuInfoFast]"),
    ("query-hotpluggable-cpus", "[HotpluggableCPU]"),
    ("query-iothreads", "[IOThreadInfo]"),
    ("query-memdev", "[Memdev]"),
    ("query-memory-devices", "[MemoryDeviceInfo]"),
    ("query-memory-size-summary", "MemoryInfo"),
    ("query-balloon", "BalloonInfo"),
    ("x-query-discards", "DiscardInfo"),
    ("query-vm-generation-id", "GuidInfo"),
    ("query-pci", "[PciInfo]"),
    ("query-block", "[BlockInfo]"),
    ("query-named-block-nodes", "[BlockDeviceInfo]"),
    ("qom-list", "[ObjectPropertyInfo]"),
    ("qom-get", "any"),
    ("query-migrate", "MigrationInfo"),
    ("query-migrate-capabilities", "[MigrationCapabilityStatus]"),
    ("query-migrate-parameters", "MigrationParameters"),
    ("human-monitor-command", "str"),
];

/// Arguments that are lists, by command and name.
pub const LISTS: &[(&str, &str, &str)] = &[
    ("qmp_capabilities", "enable", "[QMPCapability]"),
    ("migrate", "channels", "[MigrationChannel]"),
    ("migrate-incoming", "channels", "[MigrationChannel]"),
    (
        "migrate-set-capabilities",
        "capabilities",
        "[MigrationCapabilityStatus]",
    ),
];

/// Arguments that are words of a few.
pub const WORDS: &[(&str, &str, &str)] = &[("migrate-continue", "state", "MigrationStatus")];

/// Commands whose arguments are a type of their own.
pub const ARGUMENTS: Members = &[
    ("object-add", "ObjectOptions"),
    ("migrate-set-parameters", "MigrateSetParameters"),
];

/// Events, with what they bring; empty for nothing.
pub const EVENTS: Members = &[
    ("STOP", ""),
    ("RESUME", ""),
    ("RESET", "GuestEvent"),
    ("SHUTDOWN", "GuestEvent"),
    ("POWERDOWN", ""),
    ("MIGRATION", "MigrationEvent"),
    ("MIGRATION_PASS", "MigrationPassEvent"),
    ("BALLOON_CHANGE", "BalloonInfo"),
    ("DEVICE_DELETED", "DeviceDeletedEvent"),
    ("DEVICE_UNPLUG_GUEST_ERROR", "DeviceAndPath"),
];

const BACKEND: Members = &[
    ("size", "int"),
    ("share?", "bool"),
    ("merge?", "bool"),
    ("dump?", "bool"),
    ("prealloc?", "bool"),
    ("reserve?", "bool"),
];

const PARAMETERS: Members = &[
    ("announce-initial?", "int"),
    ("announce-max?", "int"),
    ("announce-rounds?", "int"),
    ("announce-step?", "int"),
    ("throttle-trigger-threshold?", "int"),
    ("cpu-throttle-initial?", "int"),
    ("cpu-throttle-increment?", "int"),
    ("cpu-throttle-tailslow?", "bool"),
    ("max-cpu-throttle?", "int"),
    ("max-bandwidth?", "int"),
    ("avail-switchover-bandwidth?", "int"),
    ("downtime-limit?", "int"),
    ("x-checkpoint-delay?", "int"),
    ("multifd-channels?", "int"),
    ("xbzrle-cache-size?", "int"),
    ("max-postcopy-bandwidth?", "int"),
    ("multifd-zlib-level?", "int"),
    ("multifd-zstd-level?", "int"),
    ("multifd-qatzip-level?", "int"),
    ("x-vcpu-dirty-limit-period?", "int"),
    ("vcpu-dirty-limit?", "int"),
    ("zero-page-detection?", "ZeroPageDetection"),
    ("mode?", "MigMode"),
    ("direct-io?", "bool"),
    ("multifd-compression?", "MultiFDCompression"),
    ("tls-creds?", "str"),
    ("tls-hostname?", "str"),
    ("tls-authz?", "str"),
];

/// All types but the builtin ones and lists. `MigrationCapability` comes from the table of
/// capabilities.
pub const TYPES: &[(&str, Shape)] = &[
    ("QMPCapability", Shape::Enum(&[])),
    (
        "VersionInfo",
        object(&[("qemu", "VersionTriple"), ("package", "str")]),
    ),
    (
        "VersionTriple",
        object(&[("major", "int"), ("minor", "int"), ("micro", "int")]),
    ),
    ("CommandInfo", object(&[("name", "str")])),
    (
        "StatusInfo",
        object(&[("running", "bool"), ("status", "RunState")]),
    ),
    (
        "RunState",
        Shape::Enum(&[
            "prelaunch",
            "inmigrate",
            "running",
            "paused",
            "finish-migrate",
            "postmigrate",
            "shutdown",
            "internal-error",
        ]),
    ),
    ("NameInfo", object(&[("name?", "str")])),
    ("UuidInfo", object(&[("UUID", "str")])),
    (
        "KvmInfo",
        object(&[("enabled", "bool"), ("present", "bool")]),
    ),
    ("TargetInfo", object(&[("arch", "SysEmuTarget")])),
    ("SysEmuTarget", Shape::Enum(&["x86_64"])),
    (
        "CurrentMachineParams",
        object(&[("wakeup-suspend-support", "bool")]),
    ),
    (
        "CpuInfoFast",
        object(&[
            ("cpu-index", "int"),
            ("qom-path", "str"),
            ("thread-id", "int"),
            ("props?", "CpuInstanceProperties"),
            ("target", "SysEmuTarget"),
        ]),
    ),
    (
        "CpuInstanceProperties",
        object(&[
            ("node-id?", "int"),
            ("socket-id?", "int"),
            ("core-id?", "int"),
            ("thread-id?", "int"),
        ]),
    ),
    (
        "HotpluggableCPU",
        object(&[
            ("type", "str"),
            ("vcpus-count", "int"),
            ("props", "CpuInstanceProperties"),
            ("qom-path?", "str"),
        ]),
    ),
    (
        "IOThreadInfo",
        object(&[("id", "str"), ("thread-id", "int")]),
    ),
    (
        "Memdev",
        object(&[
            ("id?", "str"),
            ("size", "int"),
            ("merge", "bool"),
            ("dump", "bool"),
            ("prealloc", "bool"),
            ("share", "bool"),
            ("reserve?", "bool"),
            ("host-nodes", "[int]"),
            ("policy", "HostMemPolicy"),
        ]),
    ),
    (
        "HostMemPolicy",
        Shape::Enum(&["default", "preferred", "bind", "interleave"]),
    ),
    (
        "MemoryDeviceInfo",
        Shape::Object {
            members: &[("type", "MemoryDeviceInfoKind")],
            tag: Some("type"),
            variants: &[("dimm", "PCDIMMDeviceInfoWrapper")],
        },
    ),
    ("MemoryDeviceInfoKind", Shape::Enum(&["dimm"])),
    (
        "PCDIMMDeviceInfoWrapper",
        object(&[("data", "PCDIMMDeviceInfo")]),
    ),
    (
        "PCDIMMDeviceInfo",
        object(&[
            ("id?", "str"),
            ("addr", "int"),
            ("size", "int"),
            ("slot", "int"),
            ("node", "int"),
            ("memdev", "str"),
            ("hotplugged", "bool"),
            ("hotpluggable", "bool"),
        ]),
    ),
    (
        "MemoryInfo",
        object(&[("base-memory", "int"), ("plugged-memory?", "int")]),
    ),
    (
        "DiscardInfo",
        object(&[
            ("backends", "[BackendDiscards]"),
            ("refused", "DiscardsRefused"),
        ]),
    ),
    (
        "BackendDiscards",
        object(&[
            ("id", "str"),
            ("discard", "DiscardKind"),
            ("required-by", "[DiscardHolder]"),
        ]),
    ),
    (
        "DiscardHolder",
        object(&[("device", "str"), ("coordinated", "bool")]),
    ),
    (
        "DiscardsRefused",
        object(&[
            ("balloon", "int"),
            ("free-page-reporting", "int"),
            ("virtio-mem", "int"),
            ("release-ram", "int"),
            ("postcopy", "int"),
        ]),
    ),
    ("BalloonInfo", object(&[("actual", "int")])),
    ("GuidInfo", object(&[("guid", "str")])),
    (
        "ObjectPropertyInfo",
        object(&[
            ("name", "str"),
            ("type", "str"),
            ("description?", "str"),
            ("default-value?", "any"),
        ]),
    ),
    (
        "ObjectOptions",
        Shape::Object {
            members: &[("qom-type", "ObjectType"), ("id", "str")],
            tag: Some("qom-type"),
            variants: &[
                ("memory-backend-file", "MemoryBackendFileProperties"),
                ("memory-backend-memfd", "MemoryBackendProperties"),
                ("memory-backend-ram", "MemoryBackendProperties"),
                ("memory-backend-shm", "MemoryBackendProperties"),
            ],
        },
    ),
    (
        "ObjectType",
        Shape::Enum(&[
            "memory-backend-file",
            "memory-backend-memfd",
            "memory-backend-ram",
            "memory-backend-shm",
        ]),
    ),
    ("MemoryBackendProperties", object(BACKEND)),
    (
        "MemoryBackendFileProperties",
        object(&[
            ("mem-path", "str"),
            ("readonly?", "bool"),
            ("rom?", "OnOffAuto"),
            ("offset?", "int"),
            ("align?", "int"),
            ("discard-data?", "bool"),
            ("discard?", "DiscardKind"),
            ("size", "int"),
            ("share?", "bool"),
            ("merge?", "bool"),
            ("dump?", "bool"),
            ("prealloc?", "bool"),
            ("reserve?", "bool"),
        ]),
    ),
    ("DiscardKind", Shape::Enum(&["off", "on", "zero"])),
    ("OnOffAuto", Shape::Enum(&["auto", "on", "off"])),
    (
        "MigrationChannel",
        object(&[
            ("channel-type", "MigrationChannelType"),
            ("addr", "MigrationAddress"),
        ]),
    ),
    ("MigrationChannelType", Shape::Enum(&["main"])),
    (
        "MigrationAddress",
        Shape::Object {
            members: &[("transport", "MigrationAddressType")],
            tag: Some("transport"),
            variants: &[("file", "FileMigrationArgs")],
        },
    ),
    ("MigrationAddressType", Shape::Enum(&["file"])),
    (
        "FileMigrationArgs",
        object(&[("filename", "str"), ("offset?", "int")]),
    ),
    (
        "MigrationCapabilityStatus",
        object(&[("capability", "MigrationCapability"), ("state", "bool")]),
    ),
    ("MigrationParameters", object(PARAMETERS)),
    ("MigrateSetParameters", object(PARAMETERS)),
    ("MigMode", Shape::Enum(&["normal"])),
    (
        "ZeroPageDetection",
        Shape::Enum(&["multifd", "legacy", "none"]),
    ),
    ("MultiFDCompression", Shape::Enum(&["none"])),
    (
        "MigrationInfo",
        object(&[
            ("status?", "MigrationStatus"),
            ("ram?", "MigrationStats"),
            ("total-time?", "int"),
            ("downtime?", "int"),
            ("setup-time?", "int"),
            ("error-desc?", "str"),
        ]),
    ),
    (
        "MigrationStatus",
        Shape::Enum(&[
            "none",
            "setup",
            "active",
            "device",
            "pre-switchover",
            "completed",
            "cancelled",
            "failed",
        ]),
    ),
    (
        "MigrationStats",
        object(&[
            ("transferred", "int"),
            ("remaining", "int"),
            ("total", "int"),
            ("duplicate", "int"),
            ("normal", "int"),
            ("normal-bytes", "int"),
            ("dirty-pages-rate", "int"),
            ("mbps", "number"),
            ("dirty-sync-count", "int"),
            ("postcopy-requests", "int"),
            ("page-size", "int"),
            ("multifd-bytes", "int"),
            ("pages-per-second", "int"),
            ("precopy-bytes", "int"),
            ("downtime-bytes", "int"),
            ("postcopy-bytes", "int"),
            ("dirty-sync-missed-zero-copy", "int"),
        ]),
    ),
    (
        "GuestEvent",
        object(&[("guest", "bool"), ("reason", "ShutdownCause")]),
    ),
    (
        "ShutdownCause",
        Shape::Enum(&[
            "host-qmp-quit",
            "host-qmp-system-reset",
            "host-signal",
            "host-ui",
            "guest-shutdown",
            "guest-reset",
            "guest-panic",
        ]),
    ),
    ("MigrationEvent", object(&[("status", "MigrationStatus")])),
    ("MigrationPassEvent", object(&[("pass", "int")])),
    (
        "SchemaInfo",
        Shape::Object {
            members: &[("name", "str"), ("meta-type", "SchemaMetaType")],
            tag: Some("meta-type"),
            variants: &[
                ("builtin", "SchemaInfoBuiltin"),
                ("enum", "SchemaInfoEnum"),
                ("array", "SchemaInfoArray"),
                ("object", "SchemaInfoObject"),
                ("command", "SchemaInfoCommand"),
                ("event", "SchemaInfoEvent"),
            ],
        },
    ),
    (
        "SchemaMetaType",
        Shape::Enum(&["builtin", "enum", "array", "object", "command", "event"]),
    ),
    ("SchemaInfoBuiltin", object(&[("json-type", "JSONType")])),
    (
        "JSONType",
        Shape::Enum(&["string", "number", "int", "boolean", "value"]),
    ),
    (
        "SchemaInfoEnum",
        object(&[("members", "[SchemaInfoEnumMember]"), ("values", "[str]")]),
    ),
    ("SchemaInfoEnumMember", object(&[("name", "str")])),
    ("SchemaInfoArray", object(&[("element-type", "str")])),
    (
        "SchemaInfoObject",
        object(&[
            ("members", "[SchemaInfoObjectMember]"),
            ("tag?", "str"),
            ("variants?", "[SchemaInfoObjectVariant]"),
        ]),
    ),
    (
        "SchemaInfoObjectMember",
        object(&[("name", "str"), ("type", "str"), ("default?", "any")]),
    ),
    (
        "SchemaInfoObjectVariant",
        object(&[("case", "str"), ("type", "str")]),
    ),
    (
        "SchemaInfoCommand",
        object(&[
            ("arg-type", "str"),
            ("ret-type", "str"),
            ("allow-oob?", "bool"),
        ]),
    ),
    ("SchemaInfoEvent", object(&[("arg-type", "str")])),
];
