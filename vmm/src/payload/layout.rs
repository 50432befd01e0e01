#![forbid(unsafe_code)]
//! Where the embedded guest lies in guest physical memory.
//!
//! Everything is below 2 MiB. One page ([`RW_PAGE`]) holds all that the guest ever writes of its
//! own: a clone that only talks dirties that page alone.

use crate::memory::layout::PAGE_BYTES;

/// First address of the image.
pub(super) const BASE: u64 = 0x10_0000;
/// The GDT: null, 64-bit code, data.
pub(super) const GDT: u64 = BASE;
/// Pseudo descriptor (limit and base) of the GDT, then that of the IDT.
pub(super) const GDT_POINTER: u64 = BASE + 0x20;
/// See [`GDT_POINTER`].
pub(super) const IDT_POINTER: u64 = BASE + 0x30;
/// The IDT.
pub(super) const IDT: u64 = BASE + 0x40;
/// Vectors in the IDT: the exceptions, then the two interrupt controllers.
pub(super) const IDT_VECTORS: u64 = 0x30;
/// One word per command letter `a` to `z`: address (low half) and number of parameters (high half).
pub(super) const COMMAND_TABLE: u64 = IDT + IDT_VECTORS * 16;
/// The sixteen hex digits.
pub(super) const HEX_DIGITS: u64 = COMMAND_TABLE + 26 * 8;
/// First instruction.
pub(super) const CODE: u64 = HEX_DIGITS + 16;
/// First address behind the code.
pub(super) const CODE_END: u64 = RW_PAGE;

/// The one page that the guest writes.
pub(super) const RW_PAGE: u64 = BASE + 2 * PAGE_BYTES;
/// The parameters of the command line being read.
pub(super) const PARAMETERS: u64 = RW_PAGE + 0x40;
/// How many parameters a command may have.
pub(super) const MAX_PARAMETERS: u64 = 8;
/// First page number behind the RAM below the MMIO gap.
pub(super) const LOW_RAM_END: u64 = PARAMETERS + 8 * MAX_PARAMETERS;
/// First page number behind the RAM above 4 GiB; zero if there is none.
pub(super) const HIGH_RAM_END: u64 = LOW_RAM_END + 8;
/// Time stamp at which the running command began.
pub(super) const STARTED: u64 = HIGH_RAM_END + 8;
/// Where the reply line is put together.
pub(super) const REPLY_LINE: u64 = RW_PAGE + 0x200;
/// The stack grows down from here.
pub(super) const STACK_TOP: u64 = RW_PAGE + PAGE_BYTES;

/// Page tables: one root, one directory of directories, one directory per mapped GiB.
pub(super) const PAGE_TABLES: u64 = RW_PAGE + PAGE_BYTES;
/// How much guest memory the page tables map, from address 0.
pub(super) const MAPPED_GIB: u64 = 16;
/// First address behind the image.
pub(super) const END: u64 = PAGE_TABLES + (2 + MAPPED_GIB) * PAGE_BYTES;

const _: () = assert!(END <= LAYOUT.first_data_page * PAGE_BYTES);
const _: () = assert!(CODE < CODE_END && STARTED + 8 <= REPLY_LINE);

/// Where an address of the image (or its end) is found in the image.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the image is smaller than 2 MiB"
)]
pub(super) const fn offset(address: u64) -> usize {
    assert!(BASE <= address && address <= END);
    (address - BASE) as usize
}

/// What a host needs to know of the embedded guest's place in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// First page number of the image.
    pub image_first_page: u64,
    /// Pages of the image, stack included.
    pub image_pages: u64,
    /// Guest address of three little-endian words that the host may set while the guest is not
    /// running, and that the guest reports: the generation, and two words of identity.
    pub identity_address: u64,
    /// Commands may name pages from this one on; what is below is refused.
    pub first_data_page: u64,
    /// First page number that the guest's page tables do not map.
    pub mapped_end_page: u64,
}

/// The embedded guest's place in memory.
pub const LAYOUT: Layout = Layout {
    image_first_page: BASE / PAGE_BYTES,
    image_pages: (END - BASE) / PAGE_BYTES,
    identity_address: RW_PAGE,
    first_data_page: (2 << 20) / PAGE_BYTES,
    mapped_end_page: MAPPED_GIB << 30 >> 12,
};
