#![forbid(unsafe_code)]
//! Who a machine is, as a machine file has it.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::MachineFile;
use crate::spec::{Identity, SystemTexts, Uuid};

/// What SMBIOS tells the guest of the system; what is left out is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SystemTable {
    /// Who made it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub manufacturer: String,
    /// What it is called.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub product: String,
    /// Its version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Its serial number.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serial: String,
    /// Its stock keeping unit.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sku: String,
    /// Its family.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub family: String,
}

impl From<SystemTexts> for SystemTable {
    fn from(texts: SystemTexts) -> Self {
        let SystemTexts {
            manufacturer,
            product,
            version,
            serial,
            sku,
            family,
        } = texts;
        Self {
            manufacturer,
            product,
            version,
            serial,
            sku,
            family,
        }
    }
}

impl From<SystemTable> for SystemTexts {
    fn from(table: SystemTable) -> Self {
        let SystemTable {
            manufacturer,
            product,
            version,
            serial,
            sku,
            family,
        } = table;
        Self {
            manufacturer,
            product,
            version,
            serial,
            sku,
            family,
        }
    }
}

/// A UUID as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UuidWord(pub Uuid);

impl Serialize for UuidWord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for UuidWord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = |()| {
            D::Error::custom(format!(
                "{text:?} is no UUID: give one like 8a1b7f0e-32a5-4f4b-9c7e-0123456789ab"
            ))
        };
        text.parse().map(Self).map_err(wrong)
    }
}

impl JsonSchema for UuidWord {
    fn schema_name() -> Cow<'static, str> {
        "Uuid".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A UUID, such as 8a1b7f0e-32a5-4f4b-9c7e-0123456789ab.",
            "type": "string",
            "pattern": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$"
        })
    }
}

impl MachineFile {
    /// Who the machine is.
    pub(in crate::config) fn identity(&self) -> Identity {
        Identity {
            name: self.name.clone(),
            uuid: self.uuid.map(|UuidWord(uuid)| uuid),
            system: self.system.clone().map(Into::into),
        }
    }
}
