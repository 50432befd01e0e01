#![forbid(unsafe_code)]
//! Who the machine is: `-name`, `-uuid`, `-smbios type=1`, `-device vmgenid`.

use crate::qemu::error::OptionError;
use crate::qemu::words::{Form, Props, again};
use crate::spec::{Identity, MAX_SYSTEM_TEXT_BYTES, SystemTexts, Uuid};

/// Who the machine is, as far as options were read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdentityOptions {
    /// What they say.
    pub said: Identity,
    /// `-device vmgenid`, when it is there.
    pub generation: Option<Generation>,
    /// All that `-name` said: several are one.
    name_words: String,
    /// All that `-smbios type=1` said.
    system_words: String,
}

/// A VM generation ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// What the device is called.
    pub id: Option<String>,
    /// What it shows; `None` for a new one in each process.
    pub guid: Option<Uuid>,
}

impl IdentityOptions {
    /// Takes `-device vmgenid`; gives the properties of any other device back.
    pub fn device(&mut self, mut props: Props) -> Result<Option<Props>, OptionError> {
        let driver = props.required("driver")?;
        if driver != "vmgenid" {
            props.add("driver", &driver);
            return Ok(Some(props));
        }
        let id = props.text("id")?;
        let guid = match props.text("guid")?.as_deref() {
            None | Some("auto") => None,
            Some(text) => Some(text.parse().map_err(|()| {
                OptionError::new(format!(
                    "Property 'vmgenid.guid' doesn't take value '{text}'"
                ))
            })?),
        };
        if let Some(name) = props.names().next() {
            return Err(OptionError::new(format!(
                "Property 'vmgenid.{name}' not found"
            )));
        }
        if self.generation.is_some() {
            return Err(OptionError::new("at most one vmgenid device is permitted"));
        }
        self.generation = Some(Generation { id, guid });
        Ok(None)
    }

    /// Reads `-name`.
    pub fn name(&mut self, text: &str) -> Result<(), OptionError> {
        let words = again(&self.name_words, text, "guest");
        let mut props = Props::parse(&words, Some("guest"), Form::Switches)?;
        self.said.name = props.text("guest")?;
        // Threads have names anyway.
        props.switch("debug-threads")?;
        if props.has("process") {
            return Err(OptionError::new(
                "process= cannot be had: rename the link by which Pando is started",
            ));
        }
        props.finish()?;
        self.name_words = words;
        Ok(())
    }

    /// Reads `-uuid`.
    pub fn uuid(&mut self, text: &str) -> Result<(), OptionError> {
        let uuid = text
            .parse()
            .map_err(|()| OptionError::new("failed to parse UUID string: wrong format"))?;
        self.said.uuid = Some(uuid);
        Ok(())
    }

    /// Reads `-smbios`.
    pub fn smbios(&mut self, text: &str) -> Result<(), OptionError> {
        let words = again(&self.system_words, text, "type");
        let mut props = Props::parse(&words, None, Form::Switches)?;
        if props.has("file") {
            return Err(OptionError::new(
                "file= cannot be had: use -smbios type=1,...",
            ));
        }
        match props.text("type")?.as_deref() {
            Some("1") => (),
            Some(other) => {
                return Err(OptionError::new(format!(
                    "SMBIOS type {other} cannot be had: type=1 is the only table that can be set"
                )));
            }
            None => return Err(OptionError::new("Must specify type= or file=")),
        }
        let mut word = |key| Ok(props.text(key)?.unwrap_or_default());
        let system = SystemTexts {
            manufacturer: word("manufacturer")?,
            product: word("product")?,
            version: word("version")?,
            serial: word("serial")?,
            sku: word("sku")?,
            family: word("family")?,
        };
        // One from before stands behind a -uuid that came since.
        let is_new = text.split(',').any(|part| part.starts_with("uuid="));
        if let Some(uuid) = props.text("uuid")?
            && is_new
        {
            self.said.uuid = Some(
                uuid.parse()
                    .map_err(|()| OptionError::new("Invalid UUID"))?,
            );
        }
        props.finish()?;
        if system.bytes() > MAX_SYSTEM_TEXT_BYTES {
            return Err(OptionError::new(format!(
                "the texts have {} bytes together, the most is {MAX_SYSTEM_TEXT_BYTES}",
                system.bytes()
            )));
        }
        self.said.system = Some(system);
        self.system_words = words;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read() {
        let mut twice = IdentityOptions::default();
        twice.smbios("type=1,serial=s").unwrap();
        twice.smbios("type=1,product=p").unwrap();
        let system = twice.said.system.unwrap();
        assert_eq!(
            (system.serial.as_str(), system.product.as_str()),
            ("s", "p")
        );
        let mut identity = IdentityOptions::default();
        identity.name("clone-1,debug-threads=on").unwrap();
        identity
            .smbios("type=1,serial=S,uuid=8a1b7f0e-32a5-4f4b-9c7e-0123456789ab")
            .unwrap();
        assert_eq!(identity.said.name.as_deref(), Some("clone-1"));
        assert_eq!(identity.said.system.as_ref().unwrap().serial, "S");
        assert_eq!(
            identity.said.uuid.unwrap().to_string(),
            "8a1b7f0e-32a5-4f4b-9c7e-0123456789ab"
        );
        let mut message = |text| identity.smbios(text).unwrap_err().to_string();
        assert_eq!(message("type=1,uuid=xyz"), "Invalid UUID");
        assert!(message("type=2").contains("type 2 cannot be had"));
        assert!(message("type=1,foo=1").contains("Invalid parameter"));
    }
}
