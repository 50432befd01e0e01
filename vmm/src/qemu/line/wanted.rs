#![forbid(unsafe_code)]
//! All that a command line wants, option by option: checked by itself, not against machines or this
//! host.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::argv::Argument;
use super::chardev::Chardev;
use super::hub::Hubs;
use super::identity::IdentityOptions;
use super::machine::{self, MachineOption};
use super::memory::{self, DEFAULT_RAM_BYTES, DEFAULT_RAM_ID, Defaults};
use super::numa::NumaOptions;
use super::pci::PciDevices;
use super::ports::Pending;
use super::smp::{self, Smp};
use super::{device, global, said};
use crate::qemu::error::{OptionError, expects, missing, not_accepted};
use crate::qemu::migration::address::{self, StateAddress};
use crate::qemu::migration::capability::Capabilities;
use crate::qemu::qmp::json;
use crate::qemu::words::{Form, Props, again};
use crate::spec::{BackendOptions, BackendSpec, CpuCount, DimmParts, MachineParts, MemoryParts};

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
    pub identity: IdentityOptions,
    /// Where COM1 goes; `None` where it goes nowhere.
    pub serial: Option<Chardev>,
    /// Monitors.
    pub monitors: Vec<MonitorOption>,
    /// What COM1 and monitors have in common.
    pub hubs: Hubs,
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
    pub cpus: Option<Smp>,
    /// All that `-m` said: several are one.
    size_words: String,
    /// All that `-smp` said.
    cpu_words: String,
    /// `-object`
    pub backends: Vec<BackendSpec>,
    /// `-numa`
    pub numa: NumaOptions,
    /// `-device pc-dimm`, each with how messages quote it.
    pub dimms: Vec<(DimmParts, String)>,
    /// Devices on the PCI bus, and what they name.
    pub pci: PciDevices,
    /// Ids of devices of every kind.
    device_ids: BTreeSet<String>,
}

impl WantedMemory {
    /// Takes note of a device's id, which no other may have.
    fn name_device(&mut self, props: &mut Props) -> Result<(), OptionError> {
        let Some(id) = props.text("id")? else {
            return Ok(());
        };
        props.add("id", &id);
        if self.device_ids.insert(id.clone()) {
            Ok(())
        } else {
            Err(OptionError::new(format!("Duplicate ID '{id}' for device")))
        }
    }
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
    /// `-msg timestamp=on`
    pub timestamps: bool,
    /// `-print-machine`
    pub print_machine: bool,
    /// `-metrics`
    pub metrics: Option<String>,
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

/// Reads all options.
pub fn read(arguments: &[Argument]) -> Result<Wanted, OptionError> {
    let mut wanted = Wanted::default();
    let mut pending = Pending::default();
    // The machine first: it says what holds for memory.
    for argument in arguments
        .iter()
        .filter(|a| matches!(a.name, "machine" | "M"))
    {
        let read = wanted.machine.read(&argument.value);
        read.map_err(|error| error.at(&argument.typed))?;
    }
    let defaults = Defaults {
        prealloc: arguments.iter().any(|a| a.name == "mem-prealloc"),
        merge: wanted.machine.merge,
        dump: wanted.machine.dump,
    };
    for argument in arguments {
        let value = argument.value.as_str();
        wanted
            .machine_option(argument, value)
            .and_then(|done| {
                if done {
                    Ok(true)
                } else {
                    wanted.memory_option(argument, value, defaults)
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
            // Read before all others.
            "machine" | "M" => (),
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
            "boot" => said::boot(value)?,
            "rtc" => said::rtc(value)?,
            "overcommit" => said::overcommit(value)?,
            "sandbox" => said::sandbox(value)?,
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
        defaults: Defaults,
    ) -> Result<bool, OptionError> {
        let memory = &mut self.memory;
        match argument.name {
            "m" => {
                memory.size_words = again(&memory.size_words, value, "size");
                memory.sizes = memory::sizes(&memory.size_words)?;
            }
            "smp" => {
                memory.cpu_words = again(&memory.cpu_words, value, "cpus");
                memory.cpus = Some(smp::smp(&memory.cpu_words)?);
            }
            "object" if memory.pci.object(value)? => (),
            "object" => {
                let new = memory::object(value, defaults)?;
                if memory.backends.iter().any(|old| old.id() == new.id()) {
                    return Err(OptionError::new(format!(
                        "Duplicate ID '{}' for object",
                        new.id()
                    )));
                }
                memory.backends.push(new);
            }
            "numa" => memory.numa.read(value)?,
            "device" => {
                let mut props = Props::parse(value, Some("driver"), Form::SwitchesOrJson)?;
                memory.name_device(&mut props)?;
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
            "metrics" => program.metrics = Some(value.to_owned()),
            // Both were done already.
            "help" | "h" | "version" => (),
            "msg" => {
                let mut props = Props::parse(value, None, Form::Switches)?;
                if let Some(on) = props.switch("timestamp")? {
                    program.timestamps = on;
                }
                if props.switch("guest-name")? == Some(true) {
                    return Err(OptionError::new(
                        "guest-name=on cannot be had: call the program by a link with a name of its own",
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
        let cpus = memory.cpus.map_or(1, |smp| smp.cpus);
        smp::check(cpus, &self.machine.kind)?;
        let cpus = CpuCount::new(cpus).map_err(|error| OptionError::new(error.to_string()))?;
        let is_backend = |id: &str| memory.backends.iter().any(|backend| backend.id() == id);
        memory.numa.check(&is_backend)?;
        let mut parts = MachineParts {
            cpus,
            backends: memory.backends.clone(),
            ram_backend: self.machine.memory_backend.clone(),
            memory: memory.sizes,
            nodes: memory.numa.nodes.clone(),
            distances: memory.numa.distances.clone(),
            dimms: memory.dimms.iter().map(|(dimm, _)| dimm.clone()).collect(),
            pci: self.machine.has_pci(),
            devices: memory.pci.parts()?,
            generation_id: self.identity.generation.is_some(),
            identity: self.identity.said.clone(),
        };
        if let Some(id) = &parts.ram_backend
            && !is_backend(id)
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
                merge: self.machine.merge,
                dump: self.machine.dump,
                ..BackendOptions::default()
            })
            .map_err(|error| OptionError::new(error.to_string()))?;
            parts.backends.insert(0, ram);
            parts.ram_backend = Some(DEFAULT_RAM_ID.to_owned());
        }
        Ok(parts)
    }

    /// QEMU's warnings of what is accepted.
    pub fn warnings(&self) -> Vec<String> {
        let smp = self.memory.cpus.unwrap_or(Smp { cpus: 1, cores: 1 });
        let mut all: Vec<String> = self.machine.warning().into_iter().collect();
        all.extend(self.memory.numa.warnings(smp.cpus, smp.cores));
        all
    }

    /// Ids of the memory backends in the order in which they were typed. RAM that no option names is
    /// QEMU's, and the last.
    pub fn backend_ids(&self) -> Vec<&str> {
        let mut ids: Vec<&str> = self.memory.backends.iter().map(BackendSpec::id).collect();
        if !ids.contains(&DEFAULT_RAM_ID) {
            ids.push(DEFAULT_RAM_ID);
        }
        ids
    }

    /// What QEMU calls a memory module: nothing, where no id was typed.
    pub fn dimm_id<'a>(&self, id: &'a str) -> Option<&'a str> {
        let typed = self.memory.dimms.iter().find(|(dimm, _)| dimm.id == id);
        typed
            .is_none_or(|(_, typed)| typed.contains(id))
            .then_some(id)
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
    // What is no URI is the channel in words.
    if !value.starts_with('{') && !value.contains(':') {
        let mut props = Props::parse(value, Some("channel-type"), Form::KeyValue)?;
        let kind = props.required("channel-type")?;
        return Err(match kind.as_str() {
            "main" => missing("addr"),
            kind => not_accepted("channel-type", kind),
        });
    }
    let address = if value.starts_with('{') {
        let json = json::parse(value.as_bytes()).map_err(OptionError::new)?;
        address::channel(&json)?
    } else {
        address::parse(value)?
    };
    // No monitor has given names yet.
    if let StateAddress::Fd(name) = &address
        && name.parse::<u32>().is_err()
    {
        return Err(OptionError::new(match name.as_str() {
            "" => "invalid file descriptor address".to_owned(),
            name => format!("Invalid file descriptor number '{name}'"),
        }));
    }
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
