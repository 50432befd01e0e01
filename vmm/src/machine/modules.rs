#![forbid(unsafe_code)]
//! Memory modules that come and go while the machine is there.
//!
//! ```text
//! plug     next view made -- KVM slot set ------ view shown ----- the guest is told
//! unplug   the guest has let go -- next view shown -- KVM slot gone -- unmapped by the last that used it
//! ```
//!
//! Devices see what the guest may reach, never less, and nothing of it is unmapped under anybody: each
//! access holds the view of its moment, and the VM holds what its slots show.

use std::sync::Arc;

use crate::memory::discard::BackendDiscards;
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking, View};
use crate::memory::layout::Placed;
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;

/// A module that comes.
#[derive(Debug)]
pub struct Module {
    /// Its place among the machine's backends; those from there on are counted one higher.
    pub position: usize,
    /// Id of its backend.
    pub backend: String,
    /// Its memory.
    pub backing: RamBacking,
    /// First guest physical address.
    pub guest_address: u64,
}

impl GuestRam {
    /// Gives the guest a module, which it may find from now on.
    pub fn plug(&self, vm: &Vm, module: Module) -> Result<(), PlugError> {
        let now = self.view();
        let placed = Placed {
            guest_address: module.guest_address,
            bytes: module.backing.bytes(),
        };
        let layout = now.layout().clone().with_module(module.position, placed);
        let layout = layout.map_err(|error| GuestMemoryError::Place {
            guest_address: module.guest_address,
            reason: error.to_string(),
        })?;
        let mut backings = now.backings().to_vec();
        let position = module.position.min(backings.len());
        let known = BackendDiscards {
            id: module.backend,
            discards: module.backing.discards(),
        };
        backings.insert(position, Arc::new(module.backing));
        let next = Arc::new(View::new(layout, backings, Some(now.slots()))?);
        vm.show_backend(&next, position)?;
        self.gate().insert(position, known);
        self.show(next);
        Ok(())
    }

    /// Takes the module at this address away; whether there was one. Its memory goes back to the host when
    /// the last that is using it has finished.
    pub fn unplug(&self, vm: &Vm, guest_address: u64) -> Result<bool, PlugError> {
        let now = self.view();
        let Some(position) = module_at(&now, guest_address) else {
            return Ok(false);
        };
        let layout = now.layout().clone().without_module(position);
        let mut backings = now.backings().to_vec();
        backings.remove(position);
        let next = View::new(layout, backings, Some(now.slots()))?;
        self.show(Arc::new(next));
        if let Err(error) = vm.hide_backend(&now, position) {
            // The guest has it still.
            self.show(now);
            return Err(error.into());
        }
        self.gate().remove(position);
        Ok(true)
    }
}

/// Which backend the module at this address is.
fn module_at(view: &View, guest_address: u64) -> Option<usize> {
    let mut modules = view.layout().module_segments();
    let found = modules.find(|module| module.guest_address == guest_address);
    found.map(|module| module.backend)
}

/// Why a module cannot come, or go.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// It has no place.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
    /// KVM cannot.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}
