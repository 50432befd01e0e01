#![forbid(unsafe_code)]
//! What is on the bus, as `query-pci` and `info pci` show it. Pure.

use serde_json::{Value, json};

use crate::machine::Function;

/// Bits of a base address register that are no address.
const BAR_FLAGS: u64 = 0xf;
/// Command: answer to device memory.
const MEMORY_SPACE: u64 = 1 << 1;

/// `query-pci`
pub(in crate::qemu) fn query_pci(functions: &[Function]) -> Value {
    let devices: Value = functions.iter().map(function).collect();
    json!([{"bus": 0, "devices": devices}])
}

/// `PciDeviceInfo`
fn function(function: &Function) -> Value {
    let byte = |at: usize| u64::from(function.header.get(at).copied().unwrap_or(0));
    let short = |at: usize| byte(at) | byte(at + 1) << 8;
    let class = short(0x0a);
    let mut class_info = json!({"class": class});
    if let Some(desc) = class_text(class) {
        class_info["desc"] = json!(desc);
    }
    let mut regions = Vec::new();
    if function.memory_bytes > 0 {
        let low = short(0x10) | short(0x12) << 16;
        let high = short(0x14) | short(0x16) << 16;
        let address = (high << 32 | low) & !BAR_FLAGS;
        let is_on = short(0x04) & MEMORY_SPACE != 0 && address != 0;
        regions.push(json!({
            "bar": 0,
            "type": "memory",
            // Without an address, or switched off, as QEMU says it.
            "address": if is_on { json!(address) } else { json!(-1) },
            "size": function.memory_bytes,
            "prefetch": false,
            "mem_type_64": true,
        }));
    }
    json!({
        "bus": 0,
        "slot": function.slot,
        "function": 0,
        "class_info": class_info,
        "id": {
            "vendor": short(0x00),
            "device": short(0x02),
            "subsystem-vendor": short(0x2c),
            "subsystem": short(0x2e),
        },
        "irq_pin": 0,
        "qdev_id": function.id.as_deref().unwrap_or_default(),
        "regions": regions,
    })
}

fn class_text(class: u64) -> Option<&'static str> {
    match class {
        0x0100 => Some("SCSI controller"),
        0x0200 => Some("Ethernet controller"),
        0x0600 => Some("Host bridge"),
        _ => None,
    }
}

/// `info pci`, of what `query-pci` says.
pub(in crate::qemu) fn pci_text(answer: &Value) -> String {
    let mut text = String::new();
    for device in answer[0]["devices"].as_array().into_iter().flatten() {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let (class, id) = (&device["class_info"], &device["id"]);
        let desc = match class["desc"].as_str() {
            Some(desc) => desc.to_owned(),
            None => format!("Class {:04}", number(&class["class"])),
        };
        text.push_str(&format!(
            "  Bus  0, device {:3}, function 0:\n    {desc}: PCI device {:04x}:{:04x}\n      \
             PCI subsystem {:04x}:{:04x}\n",
            number(&device["slot"]),
            number(&id["vendor"]),
            number(&id["device"]),
            number(&id["subsystem-vendor"]),
            number(&id["subsystem"]),
        ));
        for region in device["regions"].as_array().into_iter().flatten() {
            let address = region["address"].as_u64().unwrap_or(u64::MAX);
            let end = address.wrapping_add(number(&region["size"]));
            let last = end.wrapping_sub(1);
            text.push_str(&format!(
                "      BAR0: 64 bit memory at 0x{address:08x} [0x{last:08x}].\n"
            ));
        }
        let id = device["qdev_id"].as_str().unwrap_or_default();
        text.push_str(&format!("      id \"{id}\"\n"));
    }
    text
}
