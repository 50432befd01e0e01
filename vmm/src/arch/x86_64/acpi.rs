#![forbid(unsafe_code)]
//! The ACPI tables: what the machine has, for guests that read tables rather than probe.
//!
//! The machine is *hardware-reduced* (ACPI 6.5, 4.1): no fixed power management hardware, no SCI,
//! no legacy interrupt controller or timer that a guest would have to program. A Linux guest then
//! routes everything through the I/O APIC and takes its timer from the local APICs. What it must
//! be told: each CPU and its local APIC, the I/O APIC, COM1 with its interrupt, and three one-byte
//! registers for power-off and reset. There is no RTC, no VGA, no PS/2 controller to probe (its
//! reset command works all the same). There is a PCI bus where the machine has one.
//!
//! Such a guest never programs the legacy interrupt controller (8259), so it must start with every
//! line masked, as firmware leaves it: KVM's begins unmasked and would deliver COM1's interrupt a
//! second time, as an exception vector.
//!
//! No interrupt source override: the in-kernel I/O APIC has the PIT at pin 0, as KVM routes it
//! unless told otherwise, and a hardware-reduced guest does not use it.
//!
//! Where a machine has nodes or memory modules, their tables come on top.

mod generation;
mod hotplug;
mod module;
mod numa;
mod pci;
mod power_button;

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::ports::{
    COM1_GSI, COM1_PORTS, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    SLEEP_TYPE_S5,
};
use crate::memory::layout::{IO_APIC_BASE, LOCAL_APIC_BASE};
use crate::spec::MachineSpec;

const OEM_ID: [u8; 6] = *b"PANDO ";
const OEM_TABLE_ID: [u8; 8] = *b"PANDOVMM";
const OEM_REVISION: u32 = 1;
/// Length of the header that every table begins with.
const TABLE_HEADER_BYTES: u32 = 36;
/// Tables begin at multiples of this.
const ALIGNMENT_BYTES: usize = 16;
/// DSDT revision 2: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// MADT revision of ACPI 6.5.
const MADT_REVISION: u8 = 6;

/// `IAPC_BOOT_ARCH` of the FADT (ACPI 6.5, 5.2.9.3): there are devices on the ISA bus (COM1).
const LEGACY_DEVICES: u16 = 1 << 0;
/// There is no VGA to probe.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// PCI Express power management is not to be touched.
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;
/// There is no CMOS RTC. The bit for a PS/2 controller (1) stays clear too.
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// All tables of a machine as they are to be written at `address`, the RSDP first.
///
/// CPU `n` has processor id and local APIC id `n`.
#[must_use]
pub fn tables(address: u64, spec: &MachineSpec) -> Vec<u8> {
    let cpus = spec.cpus().get();
    let mut image = Image {
        address,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = image.append(&dsdt(spec));
    let fadt = image.append(&bytes_of(&fadt(dsdt)));
    let madt = image.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if spec.has_pci() {
        xsdt.add_entry(image.append(&pci::mcfg()));
    }
    let nodes = spec.numa().nodes().len();
    if nodes > 0 {
        xsdt.add_entry(image.append(&numa::srat(spec)));
    }
    if nodes > 1 {
        xsdt.add_entry(image.append(&numa::slit(spec)));
    }
    let xsdt = image.append(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// Tables one behind the other.
struct Image {
    address: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Adds a table and says where it is.
    fn append(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(ALIGNMENT_BYTES);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        self.address + at as u64
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A one-byte register in I/O space.
fn port(number: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(number),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // No power or sleep button in fixed hardware, no wake by RTC.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch =
        (LEGACY_DEVICES | VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(
        *b"APIC",
        TABLE_HEADER_BYTES,
        MADT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.append_slice(&low32(LOCAL_APIC_BASE).to_le_bytes());
    // Flags: no dual 8259 that a guest would have to mask.
    madt.append_slice(&0_u32.to_le_bytes());
    for cpu in 0..cpus {
        madt.append_slice(&bytes_of(&ProcessorLocalApic::new(
            cpu,
            cpu,
            EnabledStatus::Enabled,
        )));
    }
    madt.append_slice(&bytes_of(&IoApic::new(0, low32(IO_APIC_BASE), 0)));
    madt.as_slice().to_vec()
}

/// The APICs lie below 4 GiB.
fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn dsdt(spec: &MachineSpec) -> Vec<u8> {
    let mut dsdt = Sdt::new(
        *b"DSDT",
        TABLE_HEADER_BYTES,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let zero = aml::ZERO;
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &zero, &zero]),
    )
    .to_aml_bytes(&mut dsdt);
    com1(&mut dsdt);
    power_button::append(&mut dsdt, spec);
    if spec.has_generation_id() {
        generation::append(&mut dsdt);
    }
    for cpu in 0..spec.cpus().get() {
        processor(&mut dsdt, cpu);
    }
    module::append(&mut dsdt, spec);
    if spec.has_pci() {
        pci::append(&mut dsdt);
    }
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

fn com1(dsdt: &mut Sdt) {
    let ports = IO::new(
        COM1_PORTS.start,
        COM1_PORTS.start,
        1,
        u8::try_from(COM1_PORTS.len()).unwrap_or(u8::MAX),
    );
    let interrupt = Interrupt::new(true, true, false, false, COM1_GSI);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &aml::ZERO),
                &Name::new(Path::new("_DDN"), &"COM1"),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&ports, &interrupt]),
                ),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}

fn processor(dsdt: &mut Sdt, cpu: u8) {
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("C{cpu:03X}")),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0007"),
                &Name::new(Path::new("_UID"), &cpu),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}

#[cfg(test)]
mod tests;
