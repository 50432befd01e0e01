#![forbid(unsafe_code)]
//! All that a command line wants, option by option: checked by itself, not against machines or this
//! host.

use std::path::PathBuf;

use super::argv::Argument;
use super::chardev::{self, Chardev, NamedChardev, Short};
use super::identity::Identity;
use super::machine::{self, MachineOption};
use super::memory::{self, DEFAULT_RAM_BYTES, DEFAULT_RAM_ID, Numa};
use super::pci::PciDevices;
use super::{device, global};
use crate::qemu::error::{OptionError, expects};
use crate::qemu::migration::address::{self, StateAddress};
use crate::qemu::migration::capability::Capabilities;
use crate::qemu::qmp::json;
use crate::qemu::words::{Form, Props, again};
use crate::spec::{
    BackendOptions, BackendSpec, CpuCount, DimmParts, DistanceParts, MachineParts, MemoryParts,
    NodeParts,
};

/// Most monitors of a machine.
pub const MAX_MONITORS: usize = 16;

/// What a command line wants.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// `-machine`
    pub machine: MachineOption,
    /// Memory and vCPUs.
    pub memory: WantedMemory,
    /// `-kernel`
    pub kernel: Option<PathBuf>,
    /// `-initrd`
    pub initrd: Option<PathBuf>,
    /// `-append`
    pub append: Option<String>,
    /// Who it is.
    pub identity: Identity,
    /// Where COM1 goes; `None` where it goes nowhere.
    pub serial: Option<Chardev>,
    /// Monitors.
    pub monitors: Vec<MonitorOption>,
    /// `-incoming`
    pub incoming: Option<Incoming>,
    /// `-global migration.*`
    pub capabilities: Capabilities,
    /// What the program does.
    pub program: ProgramOptions,
}

/// Memory and vCPUs, in parts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WantedMemory {
    /// `-m`
    pub sizes: MemoryParts,
    /// `-smp`
    pub cpus: Option<u32>,
    /// All that `-m` said: several are one.
    size_words: String,
    /// All that `-smp` said.
    cpu_words: String,
    /// `-object`
    pub backends: Vec<BackendSpec>,
    /// `-numa node`
    pub nodes: Vec<NodeParts>,
    /// `-numa dist`
    pub distances: Vec<DistanceParts>,
    /// `-device pc-dimm`, each with how messages quote it.
    pub dimms: Vec<(DimmParts, String)>,
    /// Devices on the PCI bus, and what they name.
    pub pci: PciDevices,
}

/// What the program does around the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProgramOptions {
    /// `-S`
    pub stopped: bool,
    /// `-no-reboot`
    pub no_reboot: bool,
    /// `-no-shutdown`
    pub no_shutdown: bool,
    /// `-daemonize`
    pub daemonize: bool,
    /// `-pidfile`
    pub pid_file: Option<PathBuf>,
    /// `-D`
    pub log_file: Option<PathBuf>,
    /// `-d`
    pub log_items: Vec<String>,
    /// `-print-machine`
    pub print_machine: bool,
}

/// A monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorOption {
    /// Where it is.
    pub chardev: Chardev,
    /// Its id, for messages.
    pub id: String,
    /// Whether it speaks QMP.
    pub control: bool,
    /// Whether answers are indented.
    pub pretty: bool,
}

/// What `-incoming` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Wait for `migrate-incoming`.
    Defer,
    /// Load this at once; the option as it was typed.
    From(StateAddress, String),
}

/// What is complete only when all options were read.
#[derive(Debug, Default)]
struct Pending {
    serials: Vec<(Short, String)>,
    chardevs: Vec<NamedChardev>,
    monitors: Vec<(Short, bool, bool, String)>,
    nodefaults: bool,
}

/// Reads all options.
pub fn read(arguments: &[Argument]) -> Result<Wanted, OptionError> {
    let mut wanted = Wanted::default();
    let mut pending = Pending::default();
    let prealloc = arguments.iter().any(|a| a.name == "mem-prealloc");
    for argument in arguments {
        let value = argument.value.as_str();
        wanted
            .machine_option(argument, value)
            .and_then(|done| {
                if done {
                    Ok(true)
                } else {
                    wanted.memory_option(argument, value, prealloc)
                }
            })
            .and_then(|done| {
                if done {
                    Ok(true)
                } else {
                    wanted.program_option(argument, value)
                }
            })
            .and_then(|done| {
                if done {
                    Ok(true)
                } else {
                    pending.option(argument, value)
                }
            })
            .map_err(|error| error.at(&argument.typed))?;
    }
    pending.complete(&mut wanted)?;
    Ok(wanted)
}

impl Wanted {
    fn machine_option(&mut self, argument: &Argument, value: &str) -> Result<bool, OptionError> {
        match argument.name {
            "machine" | "M" => self.machine.read(value)?,
            "accel" => machine::accel(value)?,
            "cpu" => machine::cpu(value)?,
            "kernel" => self.kernel = Some(value.into()),
            "initrd" => self.initrd = Some(value.into()),
            "append" => self.append = Some(value.to_owned()),
            "name" => self.identity.name(value)?,
            "uuid" => self.identity.uuid(value)?,
            "smbios" => self.identity.smbios(value)?,
            "incoming" => self.incoming = Some(incoming(value, &argument.typed)?),
            "global" => {
                // QEMU applies these later: its messages quote no option.
                let (capability, on) = global::global(value)?;
                self.capabilities.set(capability, on);
            }
            "enable-kvm" | "mem-prealloc" | "no-user-config" | "no-hpet" | "only-migratable" => (),
            "display" | "vga" | "net" | "nic" | "parallel" => none_only(argument.name, value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn memory_option(
        &mut self,
        argument: &Argument,
        value: &str,
        prealloc: bool,
    ) -> Result<bool, OptionError> {
        let memory = &mut self.memory;
        match argument.name {
            "m" => {
                memory.size_words = again(&memory.size_words, value, "size");
                memory.sizes = memory::sizes(&memory.size_words)?;
            }
            "smp" => {
                memory.cpu_words = again(&memory.cpu_words, value, "cpus");
                memory.cpus = Some(machine::smp(&memory.cpu_words)?);
            }
            "object" if memory.pci.object(value)? => (),
            "object" => {
                let new = memory::object(value, prealloc)?;
                if memory.backends.iter().any(|old| old.id() == new.id()) {
                    return Err(OptionError::new(format!(
                        "attempt to add duplicate property '{}' to object (type 'container')",
                        new.id()
                    )));
                }
                memory.backends.push(new);
            }
            "numa" => match memory::numa(value)? {
                Numa::Node(node) => memory.nodes.push(node),
                Numa::Distance(distance) => memory.distances.push(distance),
            },
            "device" => {
                let props = Props::parse(value, Some("driver"), Form::KeyValue)?;
                if let Some(props) = self.identity.device(props)?
                    && let Some(props) = memory.pci.device(props, &argument.typed)?
                {
                    let dimm = device::dimm(props, memory.dimms.len())?;
                    memory.dimms.push((dimm, argument.typed.clone()));
                }
            }
            name => return memory.pci.option(name, value, &argument.typed),
        }
        Ok(true)
    }

    fn program_option(&mut self, argument: &Argument, value: &str) -> Result<bool, OptionError> {
        let program = &mut self.program;
        match argument.name {
            "S" => program.stopped = true,
            "no-reboot" => program.no_reboot = true,
            "no-shutdown" => program.no_shutdown = true,
            "daemonize" => program.daemonize = true,
            "pidfile" => program.pid_file = Some(value.into()),
            "D" => program.log_file = Some(value.into()),
            "d" => program.log_items = log_items(value)?,
            "print-machine" => program.print_machine = true,
            // Both were done already.
            "help" | "h" | "version" => (),
            "msg" => {
                let mut props = Props::parse(value, None, Form::Switches)?;
                if props.switch("timestamp")? == Some(true) {
                    return Err(OptionError::new(
                        "timestamp=on cannot be had: the log (-D) has the time in front of each line",
                    ));
                }
                props.finish()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The machine's parts, with RAM of Pando's own making where no backend is named.
    pub fn parts(&self) -> Result<MachineParts, OptionError> {
        let memory = &self.memory;
        let cpus = CpuCount::new(memory.cpus.unwrap_or(1))
            .map_err(|error| OptionError::new(error.to_string()))?;
        let mut parts = MachineParts {
            cpus,
            backends: memory.backends.clone(),
            ram_backend: self.machine.memory_backend.clone(),
            memory: memory.sizes,
            nodes: memory.nodes.clone(),
            distances: memory.distances.clone(),
            dimms: memory.dimms.iter().map(|(dimm, _)| dimm.clone()).collect(),
            devices: memory.pci.parts()?,
            generation_id: self.identity.generation.is_some(),
        };
        if let Some(id) = &parts.ram_backend
            && !parts.backends.iter().any(|backend| backend.id() == id)
        {
            return Err(OptionError::new(format!("Memory backend '{id}' not found")));
        }
        let nodes_have_memory = parts.nodes.iter().any(|node| node.backend.is_some());
        if parts.ram_backend.is_none() && !nodes_have_memory {
            if parts.backends.iter().any(|b| b.id() == DEFAULT_RAM_ID) {
                return Err(reserved_id());
            }
            let bytes = parts.memory.bytes.unwrap_or(DEFAULT_RAM_BYTES);
            let ram = BackendSpec::from_options(BackendOptions {
                id: DEFAULT_RAM_ID.to_owned(),
                bytes,
                ..BackendOptions::default()
            })
            .map_err(|error| OptionError::new(error.to_string()))?;
            parts.backends.insert(0, ram);
            parts.ram_backend = Some(DEFAULT_RAM_ID.to_owned());
        }
        Ok(parts)
    }

    /// Whether RAM was made because no backend was named: QEMU's `query-memdev` does not list it.
    pub fn has_own_ram(&self) -> bool {
        self.machine.memory_backend.is_none()
            && self.memory.nodes.iter().all(|node| node.backend.is_none())
    }
}

fn reserved_id() -> OptionError {
    OptionError::new(format!(
        "object's id '{DEFAULT_RAM_ID}' is reserved for the default RAM backend, it can't be used for any \
         other purposes"
    ))
    .hint(format!(
        "Change the object's 'id' to something else or disable automatic creation of the default RAM backend \
         by setting 'memory-backend={DEFAULT_RAM_ID}' with '-machine'."
    ))
}

fn incoming(value: &str, typed: &str) -> Result<Incoming, OptionError> {
    if value == "defer" {
        return Ok(Incoming::Defer);
    }
    let address = if value.starts_with('{') {
        let json = json::parse(value.as_bytes()).map_err(OptionError::new)?;
        address::channel(&json)?
    } else {
        address::parse(value)?
    };
    Ok(Incoming::From(address, typed.to_owned()))
}

fn none_only(name: &str, value: &str) -> Result<(), OptionError> {
    if value == "none" {
        return Ok(());
    }
    Err(OptionError::new(format!(
        "Pando does not have it: -{name} none is what there is"
    )))
}

/// What `-d` can name.
pub const LOG_ITEMS: [&str; 5] = ["qmp", "migration", "machine", "pager", "all"];

fn log_items(text: &str) -> Result<Vec<String>, OptionError> {
    let items: Vec<String> = text.split(',').map(str::to_owned).collect();
    match items
        .iter()
        .find(|item| !LOG_ITEMS.contains(&item.as_str()))
    {
        Some(item) => Err(expects(
            "d",
            &format!("one of {}, not '{item}'", LOG_ITEMS.join(", ")),
        )),
        None => Ok(items),
    }
}

impl Pending {
    fn option(&mut self, argument: &Argument, value: &str) -> Result<bool, OptionError> {
        let typed = argument.typed.clone();
        match argument.name {
            "serial" => self.serials.push((chardev::short(value)?, typed)),
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
            "qmp" => self
                .monitors
                .push((chardev::short(value)?, true, false, typed)),
            "qmp-pretty" => self
                .monitors
                .push((chardev::short(value)?, true, true, typed)),
            "monitor" => self
                .monitors
                .push((chardev::short(value)?, false, false, typed)),
            // There is no display anyway: COM1 is this terminal unless something else is said.
            "nographic" => (),
            "nodefaults" => self.nodefaults = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn complete(mut self, wanted: &mut Wanted) -> Result<(), OptionError> {
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
