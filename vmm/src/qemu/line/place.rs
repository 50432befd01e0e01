#![forbid(unsafe_code)]
//! What options of devices have in common: places on the bus, and properties in words or as JSON.

use crate::qemu::error::OptionError;
use crate::qemu::words::{Form, Props};

/// A device number and, behind a dot, a function, both hexadecimal.
pub(super) fn slot(text: &str) -> Result<u8, OptionError> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let digits = slot.strip_prefix("0x").unwrap_or(slot);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let slot = u8::from_str_radix(digits, 16).ok().filter(|_| is_number);
    match (slot, function) {
        (Some(slot @ 1..32), "0") => Ok(slot),
        _ => Err(OptionError::new(format!(
            "addr={text} cannot be had: a device is function 0 of slot 01 to 1f of the bus"
        ))),
    }
}

/// Properties of a blockdev or a netdev: words, or JSON.
pub(super) fn words(value: &str, first: &str) -> Result<Props, OptionError> {
    let form = if value.starts_with('{') {
        Form::SwitchesOrJson
    } else {
        Form::KeyValue
    };
    Props::parse(value, Some(first), form)
}
