#![forbid(unsafe_code)]
//! What a machine is made from, proven: every machine of this process is made from it.

use std::fs::File;
use std::path::Path;

use crate::arch::x86_64::boot::{BootSource, KernelImage};
use crate::config::{EMBEDDED_KERNEL, embedded_kernel};
use crate::memory::open::fault_of_read_only;
use crate::observe::memory::total_bytes;
use crate::qemu::error::OptionError;
use crate::qemu::line::Wanted;
use crate::qemu::link::reason;
use crate::qemu::outputs;
use crate::report::one_line;
use crate::spec::{MachineSpec, SpecError};

/// What a machine is made from.
#[derive(Debug)]
pub struct Plan {
    /// The machine.
    pub spec: MachineSpec,
    /// What it boots; `None` where there is nothing to.
    pub boot: Option<BootSource>,
    /// Everything else that was wanted.
    pub wanted: Wanted,
}

impl Plan {
    /// Checks a command line against what machines and this host can be.
    pub fn new(wanted: Wanted) -> Result<Self, OptionError> {
        let spec =
            MachineSpec::from_parts(wanted.parts()?).map_err(|error| refused(&wanted, &error))?;
        let bytes = spec.layout().total_bytes();
        if let Some(host_bytes) = total_bytes()
            && bytes > host_bytes
        {
            return Err(too_much(&spec, bytes, host_bytes));
        }
        outputs::check(&wanted, &spec)?;
        let boot = boot(&wanted)?;
        Ok(Self { spec, boot, wanted })
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

fn refused(wanted: &Wanted, error: &SpecError) -> OptionError {
    // QEMU speaks of the file first.
    let backends = wanted.memory.backends.iter();
    if matches!(error, SpecError::RomAsRam { .. })
        && let Some(fault) = backends.filter(|b| b.is_rom()).find_map(fault_of_read_only)
    {
        return OptionError::new(one_line(&fault));
    }
    let refusal = OptionError::new(one_line(error));
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
