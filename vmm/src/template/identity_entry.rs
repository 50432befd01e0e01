#![forbid(unsafe_code)]
//! The part of a manifest that says who the machine is. Its clones are the same: what SMBIOS tells is
//! in the memory that they begin with.

use serde::{Deserialize, Serialize};

use crate::spec::{Identity, MachineSpec, SystemTexts};

/// The first format that has this part.
pub(super) const FIRST_FORMAT: u32 = 3;

/// Who the machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityEntry {
    /// Its name.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Manufacturer, product, version, serial number, SKU and family, where the guest is told.
    pub system: Option<[String; 6]>,
}

impl IdentityEntry {
    /// The entry of a machine; `None` where there is nothing to say.
    pub fn of(spec: &MachineSpec) -> Option<Self> {
        let identity = spec.identity();
        if *identity == Identity::default() {
            return None;
        }
        Some(Self {
            name: identity.name.clone(),
            uuid: identity.uuid.map(|uuid| uuid.to_string()),
            system: identity
                .system
                .as_ref()
                .map(|system| system.all().map(str::to_owned)),
        })
    }

    /// Who the machine is; or what is wrong with what this says.
    pub(super) fn identity(&self) -> Result<Identity, String> {
        let uuid = self.uuid.as_ref().map(|text| {
            text.parse()
                .map_err(|()| format!("its uuid {text:?} is none"))
        });
        let system = self.system.clone();
        Ok(Identity {
            name: self.name.clone(),
            uuid: uuid.transpose()?,
            system: system.map(|[manufacturer, product, version, serial, sku, family]| {
                SystemTexts {
                    manufacturer,
                    product,
                    version,
                    serial,
                    sku,
                    family,
                }
            }),
        })
    }
}
