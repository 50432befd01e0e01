//! Templates on disk: what a frozen VM leaves behind, and the proof that nobody changed it.
//!
//! ```text
//! create: Machine<Running> -> freeze -> files without a name -> seal -> one rename
//! open:   directory -> manifest (raw -> proven) -> seal -> index, state -> Template
//! ```
//!
//! See `docs/template-format.md` for every byte.

pub mod build;
pub mod compat;
pub mod device_entry;
pub mod digest;
mod disk;
pub mod error;
mod files;
pub mod identity_entry;
pub mod limits_entry;
pub mod load;
pub mod machine_entry;
pub mod manifest;
pub mod map;
pub mod picture;
pub mod scratch;
pub mod seal;
pub mod staging;
pub mod state_file;
pub mod summary;
pub mod touched;
pub mod working_set;

pub use error::TemplateError;
pub use load::Template;

/// Name of the file that makes a directory a template.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the file with everything that is not RAM.
pub const STATE_FILE: &str = "state.bin";
/// Name of the page index.
pub const INDEX_FILE: &str = "pages.idx";
/// Name of the file with what clones taught, the one that changes after sealing.
pub const WORKING_SET_FILE: &str = "working-set";
