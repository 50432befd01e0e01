#![forbid(unsafe_code)]
//! Saving a machine to a file and loading it: QEMU's way to make and use a template.
//!
//! ```text
//! offset  what
//! 0       the header that all binary files of Pando have, magic "PANDOMG\0" (32 bytes)
//! 32      the body: what the machine is, each backend, the state of vCPUs and devices (postcard)
//! .       zeros up to a multiple of 4096
//! .       RAM that is not left out, backend after backend
//! ```
//!
//! A backend is *left out* when its file is its memory (`share=on`) and `x-ignore-shared` is on; the
//! body then holds what each page of the file is and a checksum for each chunk, so a clone proves
//! what it reads, page by page, without reading all of it first.

pub mod address;
pub mod capability;
pub mod file;
pub mod ram;
pub mod state;
pub mod topology;
