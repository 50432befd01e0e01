#![forbid(unsafe_code)]
//! Ports and monitors: what is complete only when all options were read.

use super::argv::Argument;
use super::chardev::{self, Chardev, NamedChardev, Short};
use super::wanted::{MAX_MONITORS, MonitorOption, Wanted};
use crate::qemu::error::OptionError;
use crate::qemu::words::{Form, Props};

/// What is complete only when all options were read.
#[derive(Debug, Default)]
pub(super) struct Pending {
    serials: Vec<(Short, String)>,
    chardevs: Vec<NamedChardev>,
    monitors: Vec<(Short, bool, bool, String)>,
    nodefaults: bool,
}

impl Pending {
    /// Reads an option; whether it is one of these.
    pub(super) fn option(&mut self, argument: &Argument, value: &str) -> Result<bool, OptionError> {
        let typed = argument.typed.clone();
        match argument.name {
            "serial" => {
                let short = chardev::short(value).map_err(|error| {
                    error.hint(format!(
                        "{typed}: could not connect serial device to character backend '{value}'"
                    ))
                })?;
                self.serials.push((short, typed));
            }
            "chardev" => {
                let new = chardev::named(value)?;
                if self.chardevs.iter().any(|old| old.id == new.id) {
                    return Err(OptionError::new(format!(
                        "Duplicate ID '{}' for chardev",
                        new.id
                    )));
                }
                self.chardevs.push(new);
            }
            "mon" => {
                let mut props = Props::parse(value, Some("chardev"), Form::Switches)?;
                let id = props.required("chardev")?;
                // The monitor's own name, which nothing refers to.
                props.text("id")?;
                let mode = props.word("mode", &["control", "readline"])?;
                let pretty = props.switch("pretty")?.unwrap_or(false);
                props.finish()?;
                let control = mode.as_deref() == Some("control");
                self.monitors
                    .push((Short::Named(id), control, pretty, typed));
            }
            "qmp" | "qmp-pretty" | "monitor" => {
                let short = chardev::short(value)
                    .map_err(|error| error.hint(format!("{typed}: parse error: {value}")))?;
                let control = argument.name != "monitor";
                let pretty = argument.name == "qmp-pretty";
                self.monitors.push((short, control, pretty, typed));
            }
            // There is no display anyway: COM1 is this terminal unless something else is said.
            "nographic" => (),
            "nodefaults" => self.nodefaults = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Brings ports and monitors together with what they are on.
    pub(super) fn complete(mut self, wanted: &mut Wanted) -> Result<(), OptionError> {
        let serials = std::mem::take(&mut self.serials);
        let said = !serials.is_empty();
        let mut ports = Vec::new();
        for (short, typed) in serials {
            ports.push(self.resolve(short).map_err(|error| error.at(&typed))?);
        }
        if ports.iter().skip(1).any(Option::is_some) {
            return Err(OptionError::new(
                "there is one serial port, COM1: leave the second -serial out",
            ));
        }
        wanted.serial = ports.into_iter().next().flatten();
        for (short, control, pretty, typed) in std::mem::take(&mut self.monitors) {
            let id = match &short {
                Short::Named(id) => id.clone(),
                _ => format!("monitor{}", wanted.monitors.len()),
            };
            if let Some(chardev) = self.resolve(short).map_err(|error| error.at(&typed))? {
                wanted.monitors.push(MonitorOption {
                    chardev,
                    id,
                    control,
                    pretty,
                });
            }
        }
        if wanted.monitors.len() > MAX_MONITORS {
            return Err(OptionError::new(format!(
                "there are {} monitors, the most is {MAX_MONITORS}",
                wanted.monitors.len()
            )));
        }
        let terminal_is_free = !wanted
            .monitors
            .iter()
            .any(|monitor| monitor.chardev == Chardev::Stdio);
        if !said && !self.nodefaults && terminal_is_free && !wanted.program.daemonize {
            wanted.serial = Some(Chardev::Stdio);
        }
        one_terminal(wanted)
    }

    fn resolve(&mut self, short: Short) -> Result<Option<Chardev>, OptionError> {
        match short {
            Short::None => Ok(None),
            Short::Own(chardev) => Ok(Some(chardev)),
            Short::Named(id) => {
                let at = self.chardevs.iter().position(|named| named.id == id);
                let at = at.ok_or_else(|| {
                    OptionError::new(format!("chardev \"{id}\" not found, or in use already"))
                })?;
                Ok(Some(self.chardevs.remove(at).chardev))
            }
        }
    }
}

/// Standard input and output can be one thing.
fn one_terminal(wanted: &Wanted) -> Result<(), OptionError> {
    let monitors = wanted.monitors.iter().map(|monitor| &monitor.chardev);
    let users = monitors
        .chain(wanted.serial.as_ref())
        .filter(|chardev| **chardev == Chardev::Stdio)
        .count();
    if users > 1 {
        return Err(OptionError::new(
            "cannot use stdio by multiple character devices",
        ));
    }
    if users > 0 && wanted.program.daemonize {
        return Err(OptionError::new("cannot use stdio with -daemonize"));
    }
    Ok(())
}
