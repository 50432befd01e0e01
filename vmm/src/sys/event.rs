// UNSAFETY: borrows the descriptor of an event, whose type only tells its number.
#![expect(
    unsafe_code,
    reason = "borrows the descriptor of an event by its number"
)]
//! The descriptor of an event.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an event, for as long as the event is there.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor, which is open as long as it is there, and it is borrowed for no
    // longer.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
