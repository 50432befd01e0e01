#![forbid(unsafe_code)]
//! Where the boot-time structures lie below 1 MiB. Everything here is the guest's to reuse once it
//! has read it, except the ACPI tables.

/// The global descriptor table.
pub const GDT_ADDRESS: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO_ADDRESS: u64 = 0x6000;
/// The PVH module list (the initrd).
pub const PVH_MODULES_ADDRESS: u64 = 0x6040;
/// The PVH memory map.
pub const PVH_MEMORY_MAP_ADDRESS: u64 = 0x6100;
/// `boot_params`, the "zero page" of the Linux boot protocol.
pub const BOOT_PARAMS_ADDRESS: u64 = 0x7000;
/// Initial stack pointer: one page below the page tables, growing down.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Page map level 4; the page directories follow.
pub const PAGE_TABLES_ADDRESS: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE_ADDRESS: u64 = 0x2_0000;
/// Room for the command line, including its terminating zero.
pub const COMMAND_LINE_ROOM_BYTES: u64 = 0x1_0000;
/// End of conventional memory: what firmware would keep for itself begins here.
pub const LOW_RAM_USABLE_END: u64 = 0x9_fc00;
/// The ACPI tables; the root pointer comes first, where a guest that is not told also looks.
pub const ACPI_ADDRESS: u64 = 0xe_0000;
/// The VM generation ID, in a page of its own: clones that write it copy nothing else.
pub const GENERATION_ID_ADDRESS: u64 = 0xe_f000;
/// End of what is reserved for the ACPI tables and what they point to.
pub const ACPI_END: u64 = 0xf_0000;
/// The SMBIOS tables, where a guest without EFI looks for them.
pub const SMBIOS_ADDRESS: u64 = 0xf_0000;
/// Where a CPU starts after a reset in the eyes of real-mode code: `ffff:0000`.
pub const RESET_VECTOR_ADDRESS: u64 = 0xf_fff0;
/// Where kernels are loaded: above the first MiB.
pub const HIGH_MEMORY_ADDRESS: u64 = 0x10_0000;
