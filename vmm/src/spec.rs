#![forbid(unsafe_code)]
//! What a machine is made of, in types that cannot be wrong.
//!
//! Everything here is pure: sizes are checked against what the guest's address map can hold, not
//! against what this host has.

use std::collections::HashSet;

use thiserror::Error;

use crate::memory::layout::{LayoutError, RamLayout};

/// The most vCPUs that a machine can have.
pub const MAX_CPUS: u8 = 8;
/// The least RAM of a machine in bytes: 64 MiB.
pub const MIN_RAM_BYTES: u64 = 64 << 20;
/// The most memory backends of a machine; each takes one or two KVM memory slots.
pub const MAX_BACKENDS: usize = 16;

/// Why a machine cannot be described this way.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// A vCPU count outside what a machine can have.
    #[error("a machine has 1 to {MAX_CPUS} vCPUs, not {cpus}")]
    Cpus {
        /// The count asked for.
        cpus: u32,
    },
    /// A backend id that cannot name a file and a metric.
    #[error(
        "memory backend id {id:?} cannot be used: take 1 to 64 letters, digits, '-', '_' or '.', \
         not beginning with '.'"
    )]
    BackendId {
        /// The id asked for.
        id: String,
    },
    /// Two backends of one id.
    #[error("memory backend id {id:?} is given twice: ids must differ")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// More backends than a machine can have.
    #[error("a machine has at most {MAX_BACKENDS} memory backends, not {backends}")]
    TooManyBackends {
        /// How many were asked for.
        backends: usize,
    },
    /// Less RAM than a machine needs.
    #[error("{bytes} bytes of RAM are too few: give the machine at least {MIN_RAM_BYTES}")]
    TooSmall {
        /// RAM of all backends together.
        bytes: u64,
    },
    /// The backends cannot be placed in the guest's address map.
    #[error("the memory backends cannot be placed in the guest")]
    Layout(#[from] LayoutError),
}

/// How many vCPUs a machine has: 1 to [`MAX_CPUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuCount(u8);

impl CpuCount {
    /// One vCPU.
    pub const ONE: Self = Self(1);

    /// Checks a count.
    pub fn new(cpus: u32) -> Result<Self, SpecError> {
        match u8::try_from(cpus) {
            Ok(count @ 1..=MAX_CPUS) => Ok(Self(count)),
            _ => Err(SpecError::Cpus { cpus }),
        }
    }

    /// The count as a number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u32> for CpuCount {
    type Error = SpecError;

    fn try_from(cpus: u32) -> Result<Self, SpecError> {
        Self::new(cpus)
    }
}

/// One memory backend: RAM that has its own file in a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSpec {
    id: String,
    bytes: u64,
}

impl BackendSpec {
    /// Names a backend of `bytes` bytes. The id becomes part of a file name.
    pub fn new(id: impl Into<String>, bytes: u64) -> Result<Self, SpecError> {
        let id = id.into();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if id.is_empty() || id.len() > 64 || id.starts_with('.') || !id.chars().all(allowed) {
            return Err(SpecError::BackendId { id });
        }
        Ok(Self { id, bytes })
    }

    /// What the backend is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A whole machine: proven when it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    cpus: CpuCount,
    backends: Vec<BackendSpec>,
    layout: RamLayout,
}

impl MachineSpec {
    /// Describes a machine with these backends, in the order of their guest addresses.
    pub fn new(cpus: CpuCount, backends: Vec<BackendSpec>) -> Result<Self, SpecError> {
        if backends.len() > MAX_BACKENDS {
            return Err(SpecError::TooManyBackends {
                backends: backends.len(),
            });
        }
        let mut seen = HashSet::new();
        if let Some(twice) = backends.iter().find(|backend| !seen.insert(backend.id())) {
            return Err(SpecError::DuplicateId {
                id: twice.id.clone(),
            });
        }
        let sizes: Vec<u64> = backends.iter().map(BackendSpec::bytes).collect();
        // Saturating: a sum above 2^64 is the layout's to refuse, and it must not wrap to "small".
        let total = sizes.iter().fold(0_u64, |sum, &b| sum.saturating_add(b));
        let layout = RamLayout::new(&sizes)?;
        if total < MIN_RAM_BYTES {
            return Err(SpecError::TooSmall { bytes: total });
        }
        Ok(Self {
            cpus,
            backends,
            layout,
        })
    }

    /// How many vCPUs.
    pub fn cpus(&self) -> CpuCount {
        self.cpus
    }

    /// The memory backends, lowest guest address first.
    pub fn backends(&self) -> &[BackendSpec] {
        &self.backends
    }

    /// Where the RAM lies in the guest.
    pub fn layout(&self) -> RamLayout {
        self.layout.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backend(id: &str, bytes: u64) -> BackendSpec {
        BackendSpec::new(id, bytes).unwrap()
    }

    #[test]
    fn counts_outside_one_to_eight_are_refused() {
        for cpus in [0, 9, 256, 257, u32::MAX] {
            assert_eq!(CpuCount::new(cpus), Err(SpecError::Cpus { cpus }));
        }
        assert_eq!(CpuCount::new(8).unwrap().get(), 8);
        assert_eq!(
            CpuCount::new(0).unwrap_err().to_string(),
            "a machine has 1 to 8 vCPUs, not 0"
        );
    }

    #[test]
    fn ids_cannot_leave_a_directory() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            ".hidden",
            "nul\0",
            "a b",
            &"x".repeat(65),
        ] {
            assert!(BackendSpec::new(id, 4096).is_err(), "{id:?}");
        }
        assert_eq!(backend("ram-0_a.b", 4096).id(), "ram-0_a.b");
    }

    #[test]
    fn too_little_ram_and_twice_the_same_id_are_refused() {
        let small = MachineSpec::new(CpuCount::ONE, vec![backend("ram", MIN_RAM_BYTES - 4096)]);
        assert!(
            matches!(small, Err(SpecError::TooSmall { .. })),
            "{small:?}"
        );
        let twice = MachineSpec::new(
            CpuCount::ONE,
            vec![backend("ram", MIN_RAM_BYTES), backend("ram", MIN_RAM_BYTES)],
        );
        assert!(
            matches!(twice, Err(SpecError::DuplicateId { .. })),
            "{twice:?}"
        );
        let none = MachineSpec::new(CpuCount::ONE, vec![]);
        assert_eq!(none, Err(SpecError::Layout(LayoutError::NoBackend)));
    }

    proptest! {
        #[test]
        fn no_sizes_panic(sizes in proptest::collection::vec(any::<u64>(), 0..20)) {
            let backends: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(n, &bytes)| backend(&format!("ram{n}"), bytes))
                .collect();
            if let Ok(spec) = MachineSpec::new(CpuCount::ONE, backends) {
                prop_assert!(spec.layout().total_bytes() >= MIN_RAM_BYTES);
            }
        }
    }
}
