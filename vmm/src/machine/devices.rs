use std::sync::Arc;
use crate::device::bus::*;
use crate::device::legacy::console::SerialTarget;
use crate::kvm::{KvmError, vm::Vm};
use super::{error::MachineError, state::DeviceRecord};
#[derive(Debug)]
pub(super) struct Devices { pio: Arc<PioBus>, mmio: Arc<MmioBus> }
impl Devices {
  pub(super) fn new(_s: SerialTarget) -> Result<Self, MachineError> { Ok(Self { pio: Arc::default(), mmio: Arc::default() }) }
  pub(super) fn connect_irqs(&self, _vm: &Vm) -> Result<(), KvmError> { Ok(()) }
  pub(super) fn flush_irqs(&self, _vm: &Vm) -> Result<(), KvmError> { Ok(()) }
  pub(super) fn save(&self) -> Result<Vec<DeviceRecord>, MachineError> { Ok(vec![]) }
  pub(super) fn restore(&self, _r: &[DeviceRecord]) -> Result<(), MachineError> { Ok(()) }
  pub(super) fn pio(&self) -> Arc<PioBus> { Arc::clone(&self.pio) }
  pub(super) fn mmio(&self) -> Arc<MmioBus> { Arc::clone(&self.mmio) }
}
