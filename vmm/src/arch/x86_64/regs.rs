#![forbid(unsafe_code)]
//! Registers with which the first CPU starts, as plain data.
//!
//! Only what the boot protocols ask for is here. Whoever loads these into a CPU starts from the
//! CPU's reset state, replaces the fields named here, and leaves the rest (the APIC base above all)
//! as it is. The other CPUs are not set up at all: they wait for the first to start them.

use super::layout::{
    BOOT_PARAMS_ADDRESS, BOOT_STACK_POINTER, GDT_ADDRESS, PAGE_TABLES_ADDRESS,
    PVH_START_INFO_ADDRESS,
};

/// Protection enable.
const CR0_PE: u64 = 1;
/// Extension type; always set on CPUs of today.
const CR0_ET: u64 = 1 << 4;
/// Paging.
const CR0_PG: u64 = 1 << 31;
/// Physical address extension, which long mode needs.
const CR4_PAE: u64 = 1 << 5;
/// Long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// The one bit of RFLAGS that is always set; interrupts stay off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// `__BOOT_CS` of the Linux boot protocol.
pub const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS` of the Linux boot protocol.
pub const DATA_SELECTOR: u16 = 0x18;
/// A task state segment, because VMX refuses to run without one.
pub const TASK_SELECTOR: u16 = 0x20;

/// General purpose registers that are not zero at the start, the rest being zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GeneralRegisters {
    /// First instruction.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Frame pointer.
    pub rbp: u64,
    /// PVH: address of `hvm_start_info`.
    pub rbx: u64,
    /// Linux: address of `boot_params`.
    pub rsi: u64,
    /// Flags.
    pub rflags: u64,
}

/// A segment register with its hidden part, in the fields of the descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear address of the first byte.
    pub base: u64,
    /// Highest offset, in bytes (granularity already applied).
    pub limit: u32,
    /// The visible part.
    pub selector: u16,
    /// Type field (4 bits).
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Privilege level (2 bits).
    pub privilege: u8,
    /// Default operand size is 32 bits.
    pub default_big: bool,
    /// Code or data (not a system segment).
    pub code_or_data: bool,
    /// 64-bit code.
    pub long: bool,
    /// The descriptor's limit counts pages.
    pub granular: bool,
}

impl Segment {
    fn flat(selector: u16, kind: u8, long: bool) -> Self {
        Self {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            kind,
            present: true,
            privilege: 0,
            default_big: !long,
            code_or_data: true,
            long,
            granular: true,
        }
    }

    fn task() -> Self {
        Self {
            limit: 0x67,
            selector: TASK_SELECTOR,
            kind: 0xb,
            present: true,
            ..Self::default()
        }
    }

    /// The eight-byte descriptor that a guest finds in the descriptor table for this segment.
    #[must_use]
    pub fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.granular {
            self.limit >> 12
        } else {
            self.limit
        });
        let access = u64::from(self.kind)
            | u64::from(self.code_or_data) << 4
            | u64::from(self.privilege) << 5
            | u64::from(self.present) << 7;
        let flags = u64::from(self.long) << 1
            | u64::from(self.default_big) << 2
            | u64::from(self.granular) << 3;
        (limit & 0xffff)
            | (self.base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16 & 0xf) << 48
            | flags << 52
            | (self.base >> 24 & 0xff) << 56
    }
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Highest offset into it, in bytes.
    pub limit: u16,
}

/// System registers that the boot protocols ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemRegisters {
    /// Code segment.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS alike.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table: empty.
    pub idt: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the page map.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
}

/// All registers of the first CPU that are not as reset leaves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitialRegisters {
    /// General purpose registers.
    pub general: GeneralRegisters,
    /// Segments, tables, control registers.
    pub system: SystemRegisters,
}

impl InitialRegisters {
    /// 64-bit entry of the Linux boot protocol: long mode, identity mapped, `boot_params` in RSI.
    #[must_use]
    pub fn linux64(entry: u64) -> Self {
        Self {
            general: GeneralRegisters {
                rip: entry,
                rsp: BOOT_STACK_POINTER,
                rbp: BOOT_STACK_POINTER,
                rsi: BOOT_PARAMS_ADDRESS,
                rflags: RFLAGS_RESERVED,
                ..GeneralRegisters::default()
            },
            system: SystemRegisters {
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3: PAGE_TABLES_ADDRESS,
                cr4: CR4_PAE,
                efer: EFER_LME_LMA,
                ..SystemRegisters::flat(true)
            },
        }
    }

    /// 32-bit PVH entry: protected mode without paging, `hvm_start_info` in EBX.
    #[must_use]
    pub fn pvh(entry: u64) -> Self {
        Self {
            general: GeneralRegisters {
                rip: entry,
                rbx: PVH_START_INFO_ADDRESS,
                rflags: RFLAGS_RESERVED,
                ..GeneralRegisters::default()
            },
            system: SystemRegisters {
                cr0: CR0_PE | CR0_ET,
                ..SystemRegisters::flat(false)
            },
        }
    }

    /// The descriptor table that belongs to these segments, to be written at its base.
    #[must_use]
    pub fn descriptor_table(&self) -> Vec<u64> {
        vec![
            0,
            0,
            self.system.cs.descriptor(),
            self.system.data.descriptor(),
            self.system.tr.descriptor(),
            // Upper half of the task descriptor, which is 16 bytes long in long mode.
            0,
        ]
    }
}

impl SystemRegisters {
    fn flat(long: bool) -> Self {
        Self {
            cs: Segment::flat(CODE_SELECTOR, 0xb, long),
            data: Segment {
                default_big: true,
                long: false,
                ..Segment::flat(DATA_SELECTOR, 0x3, false)
            },
            tr: Segment::task(),
            gdt: DescriptorTable {
                base: GDT_ADDRESS,
                limit: 6 * 8 - 1,
            },
            idt: DescriptorTable::default(),
            cr0: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manuals() {
        let linux = InitialRegisters::linux64(0x10_0200);
        assert_eq!(
            linux.descriptor_table(),
            [
                0,
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067,
                0
            ]
        );
        let pvh = InitialRegisters::pvh(0x100_0000);
        assert_eq!(pvh.system.cs.descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(
            usize::from(linux.system.gdt.limit) + 1,
            linux.descriptor_table().len() * 8
        );
    }

    #[test]
    fn linux_starts_in_long_mode_and_pvh_without_paging() {
        let linux = InitialRegisters::linux64(0x10_0200);
        assert_eq!(linux.system.cr0, 0x8000_0011);
        assert_eq!(linux.system.efer, 0x500);
        assert_eq!(linux.general.rsi, BOOT_PARAMS_ADDRESS);
        let pvh = InitialRegisters::pvh(0x100_0000);
        assert_eq!(pvh.system.cr0, 0x11);
        assert_eq!((pvh.system.cr4, pvh.system.efer), (0, 0));
        assert_eq!(pvh.general.rbx, PVH_START_INFO_ADDRESS);
    }
}
