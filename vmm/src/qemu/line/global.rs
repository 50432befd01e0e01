#![forbid(unsafe_code)]
//! `-global`: migration capabilities, by the property names that QEMU gives them.

use crate::qemu::error::OptionError;
use crate::qemu::migration::capability::Capability;
use crate::qemu::words::{Form, Props};

/// Property names and what they set. `x-ignore-shared` has none, in QEMU either.
const PROPERTIES: &[(&str, Capability)] = &[("mapped-ram", Capability::MappedRam)];

/// Properties that QEMU has and that no Pando can set.
const REFUSED: &[(&str, &str)] = &[
    (
        "x-postcopy-ram",
        "Postcopy is not supported: Host backend files need to be TMPFS or HUGETLBFS only, and Pando saves to \
         files alone; a clone's pages come on demand anyway",
    ),
    (
        "x-release-ram",
        "release-ram discards RAM while it is sent, which a template's clones cannot do, and Pando saves to \
         files alone",
    ),
];

/// Reads `-global`: the capability and whether it is on.
pub fn global(text: &str) -> Result<(Capability, bool), OptionError> {
    let (driver, property, value) = parts(text)?;
    let (property, value) = (property.as_str(), value.as_str());
    let name = format!("{driver}.{property}");
    if driver != "migration" {
        return Err(OptionError::new(format!(
            "-global {driver}.{property} cannot be had: no device of Pando has properties to set"
        )));
    }
    if let Some((_, why)) = REFUSED.iter().find(|(name, _)| *name == property) {
        return match value {
            "off" => Err(OptionError::new(format!(
                "-global migration.{property}=off: leave it out, there is no such capability to switch off"
            ))),
            _ => Err(OptionError::new(*why)),
        };
    }
    let capability = PROPERTIES.iter().find(|(name, _)| *name == property);
    match (capability, value) {
        (Some((_, capability)), "on") => Ok((*capability, true)),
        (Some((_, capability)), "off") => Ok((*capability, false)),
        (Some(_), _) => Err(OptionError::new(format!(
            "can't apply global {name}={value}: Parameter '{property}' expects 'on' or 'off'"
        ))),
        (None, _) => Err(OptionError::new(format!(
            "can't apply global {name}={value}: Property '{name}' not found"
        ))),
    }
}

/// Driver, property and value, of `DRIVER.PROPERTY=VALUE` or of the long form that files have.
fn parts(text: &str) -> Result<(String, String, String), OptionError> {
    if text.starts_with("driver=") {
        let mut props = Props::parse(text, None, Form::KeyValue)?;
        let mut take = |key| props.required(key);
        let parts = (take("driver")?, take("property")?, take("value")?);
        props.finish()?;
        return Ok(parts);
    }
    let (name, value) = text.split_once('=').unwrap_or(("", ""));
    match name.split_once('.') {
        Some((driver, property)) => Ok((driver.to_owned(), property.to_owned(), value.to_owned())),
        None => Err(OptionError::new(format!(
            "'{text}' is not DRIVER.PROPERTY=VALUE, the form of -global"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_have_other_names_than_capabilities() {
        assert_eq!(
            global("migration.mapped-ram=on"),
            Ok((Capability::MappedRam, true))
        );
        assert_eq!(
            global("driver=migration,property=mapped-ram,value=off"),
            Ok((Capability::MappedRam, false))
        );
        let message = |text| global(text).unwrap_err().to_string();
        assert_eq!(
            message("migration.x-ignore-shared=on"),
            "can't apply global migration.x-ignore-shared=on: Property 'migration.x-ignore-shared' not found"
        );
        assert!(message("migration.x-postcopy-ram=on").starts_with("Postcopy is not supported"));
        assert!(message("isa-fdc.fdtypeA=none").contains("no device of Pando"));
        assert!(message("x").contains("DRIVER.PROPERTY"));
    }
}
