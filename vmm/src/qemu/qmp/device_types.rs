#![forbid(unsafe_code)]
//! The types of the schema that are about devices on the bus and their images.

use super::types::{Shape, object};

/// They come on top of [`super::types::TYPES`].
pub(super) const DEVICE_TYPES: &[(&str, Shape)] = &[
    (
        "DeviceDeletedEvent",
        object(&[("device?", "str"), ("path", "str")]),
    ),
    (
        "DeviceAndPath",
        object(&[("device", "str"), ("path", "str")]),
    ),
    (
        "PciInfo",
        object(&[("bus", "int"), ("devices", "[PciDeviceInfo]")]),
    ),
    (
        "PciDeviceInfo",
        object(&[
            ("bus", "int"),
            ("slot", "int"),
            ("function", "int"),
            ("class_info", "PciDeviceClass"),
            ("id", "PciDeviceId"),
            ("irq_pin", "int"),
            ("qdev_id", "str"),
            ("regions", "[PciMemoryRegion]"),
        ]),
    ),
    (
        "PciDeviceClass",
        object(&[("desc?", "str"), ("class", "int")]),
    ),
    (
        "PciDeviceId",
        object(&[
            ("device", "int"),
            ("vendor", "int"),
            ("subsystem", "int"),
            ("subsystem-vendor", "int"),
        ]),
    ),
    (
        "PciMemoryRegion",
        object(&[
            ("bar", "int"),
            ("type", "str"),
            ("address", "int"),
            ("size", "int"),
            ("prefetch", "bool"),
            ("mem_type_64", "bool"),
        ]),
    ),
    (
        "BlockInfo",
        object(&[
            ("device", "str"),
            ("qdev?", "str"),
            ("type", "str"),
            ("removable", "bool"),
            ("locked", "bool"),
            ("inserted", "BlockDeviceInfo"),
            ("io-status?", "BlockDeviceIoStatus"),
        ]),
    ),
    (
        "BlockDeviceIoStatus",
        Shape::Enum(&["ok", "failed", "nospace"]),
    ),
    (
        "BlockDeviceInfo",
        object(&[
            ("file", "str"),
            ("node-name", "str"),
            ("ro", "bool"),
            ("drv", "str"),
            ("backing_file_depth", "int"),
            ("encrypted", "bool"),
            ("active", "bool"),
            ("detect_zeroes", "BlockdevDetectZeroesOptions"),
            ("bps", "int"),
            ("bps_rd", "int"),
            ("bps_wr", "int"),
            ("iops", "int"),
            ("iops_rd", "int"),
            ("iops_wr", "int"),
            ("image", "ImageInfo"),
            ("cache", "BlockdevCacheInfo"),
            ("write_threshold", "int"),
        ]),
    ),
    (
        "BlockdevDetectZeroesOptions",
        Shape::Enum(&["off", "on", "unmap"]),
    ),
    (
        "BlockdevCacheInfo",
        object(&[
            ("writeback", "bool"),
            ("direct", "bool"),
            ("no-flush", "bool"),
        ]),
    ),
    (
        "ImageInfo",
        object(&[
            ("filename", "str"),
            ("format", "str"),
            ("dirty-flag", "bool"),
            ("actual-size", "int"),
            ("virtual-size", "int"),
        ]),
    ),
];
