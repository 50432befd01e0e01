#![forbid(unsafe_code)]
//! The only firmware of a machine: nine bytes at the reset vector that reset it.
//!
//! A Linux guest of hardware-reduced ACPI that was not started by EFI asks EFI to reset it all the
//! same, fails, and then jumps to the reset vector in real mode, as on a PC (Linux 6.1,
//! arch/x86/kernel/reboot.c, `efi_reboot_required` and `BOOT_BIOS`). Without code there it would
//! run through zeros for ever.

use crate::arch::x86_64::layout::RESET_VECTOR_ADDRESS;
use crate::arch::x86_64::ports::{RESET_PORT, RESET_VALUE};
use crate::memory::guest::{GuestMemoryError, GuestRam};

/// Writes the code. It lies behind the ACPI tables, in memory that the guest is told to leave alone.
pub(super) fn write_reset_vector(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let [low, high] = RESET_PORT.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, low, high,    // mov dx, RESET_PORT
        0xb0, RESET_VALUE,  // mov al, RESET_VALUE
        0xee,               // out dx, al
        0xf4,               // hlt
        0xeb, 0xfd,         // jmp back to hlt
    ];
    ram.write(RESET_VECTOR_ADDRESS, &code)
}
