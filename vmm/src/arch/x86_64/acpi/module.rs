#![forbid(unsafe_code)]
//! Memory modules as devices (ACPI 6.5, 9.11): Linux names the blocks of memory that it already has
//! from the memory map after them, and knows their node.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Name, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use crate::spec::{Dimm, MachineSpec};

/// Adds a device for every module that the guest may write.
pub(super) fn append(dsdt: &mut Sdt, spec: &MachineSpec) {
    for dimm in spec.dimms() {
        if !spec.backends()[dimm.backend()].is_rom() {
            device(dsdt, dimm);
        }
    }
}

fn device(dsdt: &mut Sdt, dimm: &Dimm) {
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        dimm.guest_address(),
        dimm.guest_address() + (dimm.bytes() - 1),
        None,
    );
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("M{:03X}", dimm.slot())),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C80")),
                &Name::new(Path::new("_UID"), &dimm.slot()),
                &Name::new(Path::new("_PXM"), &dimm.node()),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&memory])),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}
