#![forbid(unsafe_code)]
//! COM1, monitors and character devices: options that refer to each other, and what there is where
//! nothing is said.

use super::argv::Argument;
use super::chardev::{self, Chardev, NamedChardev, Role, Short};
use super::hub::Hubs;
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
    nographic: bool,
}

impl Pending {
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
            "nographic" => self.nographic = true,
            "nodefaults" => self.nodefaults = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What there is where nothing was said, as with QEMU: with -nographic COM1 and a monitor on this
    /// terminal, else COM1 there.
    fn defaults(&mut self, wanted: &Wanted) -> Result<(), OptionError> {
        let serial = self.serials.is_empty() && !self.nodefaults;
        let monitor = self.monitors.is_empty() && !self.nodefaults;
        let mut add_serial = |short| self.serials.push((short, "-nographic".to_owned()));
        if !self.nographic {
            let on_terminal = |(short, ..): &(Short, bool, bool, String)| match short {
                Short::Own(chardev) | Short::Mon(chardev) => *chardev == Chardev::Stdio,
                Short::Named(id) => {
                    let mut named = self.chardevs.iter();
                    named.any(|named| named.id == *id && named.chardev == Chardev::Stdio)
                }
                Short::None => false,
            };
            let is_free = !self.monitors.iter().any(on_terminal);
            if serial && is_free && !wanted.program.daemonize {
                add_serial(Short::Own(Chardev::Stdio));
            }
            return Ok(());
        }
        if wanted.program.daemonize && (serial || monitor) {
            return Err(OptionError::new(
                "-nographic cannot be used with -daemonize",
            ));
        }
        match (serial, monitor) {
            (true, true) => add_serial(Short::Mon(Chardev::Stdio)),
            (true, false) => add_serial(Short::Own(Chardev::Stdio)),
            (false, true) => {
                let short = Short::Own(Chardev::Stdio);
                let typed = "-nographic".to_owned();
                self.monitors.push((short, false, false, typed));
            }
            (false, false) => (),
        }
        Ok(())
    }

    pub(super) fn complete(mut self, wanted: &mut Wanted) -> Result<(), OptionError> {
        self.defaults(wanted)?;
        let sockets = self.client_sockets();
        let mut ports = Vec::new();
        for (short, typed) in std::mem::take(&mut self.serials) {
            let shared = matches!(short, Short::Mon(_));
            let port = self.resolve(short, &mut wanted.hubs);
            let port = port.map_err(|error| {
                // In QEMU's words, which quote the option again.
                let value = typed.strip_prefix("-serial ").unwrap_or_default();
                error.at(&typed).hint(format!(
                    "{typed}: could not connect serial device to character backend '{value}'"
                ))
            })?;
            if let Some(chardev) = port.clone().filter(|_| shared) {
                wanted.monitors.push(MonitorOption {
                    chardev,
                    id: format!("monitor{}", wanted.monitors.len()),
                    control: false,
                    pretty: false,
                });
            }
            ports.push(port);
        }
        if ports.iter().skip(1).any(Option::is_some) {
            return Err(OptionError::new(
                "there is one serial port, COM1: leave the second -serial out",
            ));
        }
        wanted.serial = ports.into_iter().next().flatten();
        wanted.hubs.give_serial(wanted.serial.as_ref());
        for (short, control, pretty, typed) in std::mem::take(&mut self.monitors) {
            let id = match &short {
                Short::Named(id) => id.clone(),
                _ => format!("monitor{}", wanted.monitors.len()),
            };
            let resolved = self.resolve(short, &mut wanted.hubs).and_then(|chardev| {
                if let Some(chardev) = &chardev {
                    wanted.hubs.check_monitor(chardev)?;
                }
                Ok(chardev)
            });
            if let Some(chardev) = resolved.map_err(|error| error.at(&typed))? {
                wanted.monitors.push(MonitorOption {
                    chardev,
                    id,
                    control,
                    pretty,
                });
            }
        }
        let Wanted { memory, hubs, .. } = &mut *wanted;
        memory.pci.connect_ports(|id| {
            let found = self.resolve(Short::Named(id.to_owned()), hubs);
            found.ok().flatten()
        })?;
        memory.pci.vhost_user.keep(sockets);
        for named in std::mem::take(&mut self.chardevs) {
            hubs.open_unused(named);
        }
        if wanted.monitors.len() > MAX_MONITORS {
            return Err(OptionError::new(format!(
                "there are {} monitors, the most is {MAX_MONITORS}",
                wanted.monitors.len()
            )));
        }
        one_terminal(wanted)
    }

    /// Chardevs that lead to somebody who listens.
    fn client_sockets(&self) -> Vec<(String, Chardev)> {
        let chardevs = self.chardevs.iter();
        let clients = chardevs.filter(
            |named| matches!(&named.chardev, Chardev::Socket { role, .. } if *role == Role::Client),
        );
        let clients = clients.map(|named| (named.id.clone(), named.chardev.clone()));
        clients.collect()
    }

    fn resolve(&mut self, short: Short, hubs: &mut Hubs) -> Result<Option<Chardev>, OptionError> {
        match short {
            Short::None => Ok(None),
            Short::Own(chardev) => Ok(Some(chardev)),
            Short::Mon(chardev) => Ok(Some(hubs.of_mon(chardev))),
            Short::Named(id) => {
                let at = self.chardevs.iter().position(|named| named.id == id);
                let at = at.ok_or_else(|| {
                    OptionError::new(format!("chardev \"{id}\" not found, or in use already"))
                })?;
                let named = if self.chardevs[at].mux {
                    self.chardevs[at].clone()
                } else {
                    self.chardevs.remove(at)
                };
                Ok(Some(hubs.of_named(named)))
            }
        }
    }
}

/// Standard input and output can be one thing.
fn one_terminal(wanted: &Wanted) -> Result<(), OptionError> {
    let monitors = wanted.monitors.iter().map(|monitor| &monitor.chardev);
    let users = monitors
        .chain(wanted.serial.as_ref())
        .chain(wanted.hubs.all().iter().map(|hub| &hub.chardev))
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
