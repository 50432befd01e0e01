#![forbid(unsafe_code)]
//! QEMU's words: what is typed behind an option, taken apart and not yet understood. Pure.
//!
//! ```text
//! memory-backend-file,id=ram,mem-path=/a,,b      key=value; `,,` is a comma; the first may leave its key out
//! {"qom-type": "memory-backend-file", ...}       the same as JSON
//! ```

pub mod config_file;
pub mod props;
pub mod size;

pub use props::{Form, Props, again, short_forms};
