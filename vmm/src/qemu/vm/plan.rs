#![forbid(unsafe_code)]
//! What a machine is made from, proven: every machine of this process is made from it.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::arch::x86_64::boot::{BootSource, KernelImage};
use crate::config::{EMBEDDED_KERNEL, embedded_kernel};
use crate::machine::GenerationId;
use crate::memory::open::fault_of_read_only;
use crate::observe::memory::total_bytes;
use crate::qemu::error::OptionError;
use crate::qemu::line::Wanted;
use crate::qemu::link::reason;
use crate::qemu::{outputs, processes};
use crate::report::one_line;
use crate::spec::{BackendSpec, DeviceFault, DeviceKind, DeviceParts, MachineSpec, SpecError};

/// What a machine is made from.
#[derive(Debug)]
pub struct Plan {
    /// The machine.
    pub spec: MachineSpec,
    /// Memory backends that it does not use.
    pub spare: Vec<BackendSpec>,
    /// What it boots; `None` where there is nothing to.
    pub boot: Option<BootSource>,
    /// Everything else that was wanted.
    pub wanted: Wanted,
    /// The VM generation ID of every machine of this process, where they have one.
    pub generation_id: Option<GenerationId>,
}

impl Plan {
    /// Checks a command line against what machines and this host can be.
    pub fn new(wanted: Wanted) -> Result<Self, OptionError> {
        let mut parts = wanted.parts()?;
        parts.devices.iter_mut().for_each(place_socket);
        processes::check(&wanted, &parts)?;
        let spare = parts.take_unused();
        let spec = MachineSpec::from_parts(parts).map_err(|error| refused(&wanted, &error))?;
        let bytes = spec.layout().total_bytes();
        if let Some(host_bytes) = total_bytes()
            && bytes > host_bytes
        {
            return Err(too_much(&spec, bytes, host_bytes));
        }
        outputs::check(&wanted, &spec)?;
        let boot = boot(&wanted)?;
        let generation_id = generation_id(&wanted)?;
        Ok(Self {
            spec,
            spare,
            boot,
            wanted,
            generation_id,
        })
    }
}

/// More memory than the host has, in QEMU's words for the backend that has most.
fn too_much(spec: &MachineSpec, bytes: u64, host_bytes: u64) -> OptionError {
    let faults = spec.backends().iter().filter_map(fault_of_read_only);
    if let Some(fault) = faults.into_iter().next() {
        return OptionError::new(one_line(&fault));
    }
    let greatest = spec.backends().iter().max_by_key(|backend| backend.bytes());
    let what = match greatest {
        Some(backend) if backend.file().is_some() => {
            "unable to map backing store for guest RAM".to_owned()
        }
        Some(backend) => format!("cannot set up guest memory '{}'", backend.id()),
        None => "cannot set up guest memory".to_owned(),
    };
    OptionError::new(format!(
        "{what}: Cannot allocate memory: {bytes} bytes are more than this host's {host_bytes}: ask for less"
    ))
}

/// Gives a vsock device a socket where it was not told of one: in `XDG_RUNTIME_DIR`, else `/run`. Both belong
/// to whoever runs the machine, so that nobody else can be there first.
pub(super) fn place_socket(device: &mut DeviceParts) {
    let DeviceKind::Vsock(vsock) = &mut device.kind else {
        return;
    };
    let cid = vsock.cid;
    vsock.path.get_or_insert_with(|| {
        let asked = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
        let folder = asked.map_or_else(|| PathBuf::from("/run"), PathBuf::from);
        folder.join(format!("pando-vsock-{cid}.sock"))
    });
}

fn generation_id(wanted: &Wanted) -> Result<Option<GenerationId>, OptionError> {
    let Some(generation) = &wanted.identity.generation else {
        return Ok(None);
    };
    let given = generation.guid.map(|guid| GenerationId(guid.0));
    given
        .map_or_else(GenerationId::random, Ok)
        .map(Some)
        .map_err(|error| OptionError::new(format!("no random generation id: {error}")))
}

fn refused(wanted: &Wanted, error: &SpecError) -> OptionError {
    // QEMU speaks of the file first.
    let backends = wanted.memory.backends.iter();
    if matches!(error, SpecError::RomAsRam { .. })
        && let Some(fault) = backends.filter(|b| b.is_rom()).find_map(fault_of_read_only)
    {
        return OptionError::new(one_line(&fault));
    }
    let refusal = OptionError::new(one_line(error));
    // The same of memory that grows and shrinks; each line of it.
    if let SpecError::Device {
        id,
        reason: DeviceFault::Memory(fault),
    } = error
    {
        let text = fault.to_string();
        let typed = wanted.memory.pci.typed_of_memory(id).unwrap_or_default();
        let mut lines = text.lines();
        let first = OptionError::new(lines.next().unwrap_or_default()).at(typed);
        return lines.fold(first, |first, line| first.hint(format!("{typed}: {line}")));
    }
    // The option of the module that is at fault, as QEMU quotes it.
    if let SpecError::Dimm { id, .. } = error
        && let Some((_, typed)) = wanted.memory.dimms.iter().find(|(dimm, _)| dimm.id == *id)
    {
        return refusal.at(typed);
    }
    refusal
}

fn boot(wanted: &Wanted) -> Result<Option<BootSource>, OptionError> {
    let Some(kernel) = &wanted.kernel else {
        let lonely = |option| {
            Err(OptionError::new(format!(
                "-{option} only allowed with -kernel option"
            )))
        };
        return match (&wanted.initrd, &wanted.append) {
            (Some(_), _) => lonely("initrd"),
            (None, Some(_)) => lonely("append"),
            (None, None) => Ok(None),
        };
    };
    let is_embedded = kernel == Path::new(EMBEDDED_KERNEL) && !kernel.exists();
    if !is_embedded && let Err(error) = File::open(kernel) {
        return Err(OptionError::new(format!(
            "could not open kernel file '{}': {}",
            kernel.display(),
            reason(&error)
        )));
    }
    Ok(Some(BootSource {
        kernel: if is_embedded {
            embedded_kernel()
        } else {
            KernelImage::File(kernel.clone())
        },
        initrd: wanted.initrd.clone(),
        append: wanted.append.clone().unwrap_or_default(),
    }))
}
