#![forbid(unsafe_code)]
//! One memory backend: where the bytes of a piece of guest memory are, and who may write them.
//!
//! The options are those of QEMU's `memory-backend-*` objects. `share`, `readonly` and `rom` together
//! say what a file backend is; [`FileAccess`] has only the combinations that exist:
//!
//! | share | readonly | rom | what it is |
//! |---|---|---|---|
//! | on | off | auto, off | [`FileAccess::Template`] |
//! | off | off | auto, off | [`FileAccess::Private`] |
//! | off | on | off | [`FileAccess::Clone`] |
//! | any | on | auto, on | [`FileAccess::Rom`] |
//! | on | on | off | refused |
//! | any | off | on | refused |

mod error;

use std::path::{Path, PathBuf};

use crate::memory::layout::PAGE_BYTES;

pub use error::BackendError;

/// A switch with a default that depends on other switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOffAuto {
    /// On.
    On,
    /// Off.
    Off,
    /// As it fits.
    #[default]
    Auto,
}

/// Which of QEMU's objects a backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendKind {
    /// `memory-backend-file`
    File,
    /// `memory-backend-ram`
    #[default]
    Ram,
    /// `memory-backend-memfd`
    Memfd,
}

impl BackendKind {
    /// The name of the object.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::File => "memory-backend-file",
            Self::Ram => "memory-backend-ram",
            Self::Memfd => "memory-backend-memfd",
        }
    }
}

/// A backend as it was asked for, unchecked. `Default` has the defaults of QEMU's objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendOptions {
    /// Which object.
    pub kind: BackendKind,
    /// What it is called.
    pub id: String,
    /// The file (`mem-path`).
    pub path: Option<PathBuf>,
    /// Size in bytes.
    pub bytes: u64,
    /// Whether writes go to the file; off unless given, on for a memfd.
    pub share: Option<bool>,
    /// Whether the file is opened for reading only.
    pub readonly: bool,
    /// Whether the guest can only read it.
    pub rom: OnOffAuto,
    /// Where in the file it begins, in bytes.
    pub offset_bytes: u64,
    /// Alignment of the mapping in bytes; 0 for the default.
    pub align_bytes: u64,
    /// Whether every page is allocated before the guest runs.
    pub prealloc: bool,
    /// How many threads allocate.
    pub prealloc_threads: u32,
    /// Whether swap space is set aside for it, as far as anybody asks: memory is taken as it is used.
    pub reserve: bool,
    /// Whether the kernel may merge equal pages.
    pub merge: bool,
    /// Whether a core dump has it.
    pub dump: bool,
    /// Whether the file's content is dropped when the machine ends.
    pub discard_data: bool,
    /// Whether memory of a clone that is discarded goes back to the host and reads as zero (`discard=zero`).
    pub discards_to_zero: bool,
}

impl Default for BackendOptions {
    fn default() -> Self {
        Self {
            kind: BackendKind::default(),
            id: String::new(),
            path: None,
            bytes: 0,
            share: None,
            readonly: false,
            rom: OnOffAuto::Auto,
            offset_bytes: 0,
            align_bytes: 0,
            prealloc: false,
            prealloc_threads: 1,
            reserve: true,
            merge: true,
            dump: true,
            discard_data: false,
            discards_to_zero: false,
        }
    }
}

/// What may happen between guest memory and its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// The file is the memory: what the guest writes is in the file. It is made if it is missing.
    Template,
    /// The memory begins as the file and goes its own way. A missing file is made, for QEMU does so;
    /// it is opened for reading only all the same.
    Private,
    /// The memory begins as the file, which is only ever read, by the pager.
    Clone,
    /// The guest can read the file and write nothing.
    Rom {
        /// As it was asked for; it makes no difference.
        share: bool,
    },
}

/// The file of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSource {
    path: PathBuf,
    access: FileAccess,
    offset_bytes: u64,
    discard_data: bool,
    discards_to_zero: bool,
}

impl FileSource {
    /// Which file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What may happen to it.
    pub fn access(&self) -> FileAccess {
        self.access
    }

    /// Where in the file the memory begins, in bytes.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Whether the file's content is dropped when the machine ends. Only a template's file ever is.
    pub fn discard_data(&self) -> bool {
        self.discard_data
    }
}

/// Where the bytes of a backend are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendSource {
    /// In memory without a name.
    Ram {
        /// Whether the mapping is shared.
        share: bool,
    },
    /// In a file that exists in memory only.
    Memfd {
        /// Whether writes go to it.
        share: bool,
    },
    /// In a file.
    File(FileSource),
}

/// One memory backend: proven when it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSpec {
    id: String,
    bytes: u64,
    source: BackendSource,
    align_bytes: u64,
    prealloc: bool,
    prealloc_threads: u32,
    reserve: bool,
    merge: bool,
    dump: bool,
}

/// Whether a name can be an id, and part of a file name.
pub(super) fn is_id(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=64).contains(&id.len()) && !id.starts_with('.') && id.chars().all(allowed)
}

impl BackendSpec {
    /// Memory without a name, of `bytes` bytes. The id becomes part of a file name where the machine
    /// is made a template.
    pub fn new(id: impl Into<String>, bytes: u64) -> Result<Self, BackendError> {
        Self::from_options(BackendOptions {
            id: id.into(),
            bytes,
            ..BackendOptions::default()
        })
    }

    /// Checks what was asked for.
    pub fn from_options(options: BackendOptions) -> Result<Self, BackendError> {
        let id = options.id.clone();
        if !is_id(&id) {
            return Err(BackendError::Id { id });
        }
        if options.bytes == 0 {
            let kind = options.kind.qemu_name();
            return Err(BackendError::Empty { id, kind });
        }
        let source = source(&options)?;
        if !options.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(BackendError::Size {
                id,
                kind: options.kind.qemu_name(),
                bytes: options.bytes,
            });
        }
        let spec = Self {
            id: options.id,
            bytes: options.bytes,
            source,
            align_bytes: options.align_bytes,
            prealloc: options.prealloc,
            prealloc_threads: options.prealloc_threads,
            reserve: options.reserve,
            merge: options.merge,
            dump: options.dump,
        };
        if spec.prealloc && spec.is_rom() {
            return Err(BackendError::PreallocRom { id: spec.id });
        }
        Ok(spec)
    }

    /// What the backend is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How many threads were to allocate; it makes no difference.
    pub fn prealloc_threads(&self) -> u32 {
        self.prealloc_threads
    }

    /// Whether swap space was to be set aside; it makes no difference.
    pub fn reserve(&self) -> bool {
        self.reserve
    }

    /// Size in bytes, a positive number of whole pages.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where its bytes are.
    pub fn source(&self) -> &BackendSource {
        &self.source
    }

    /// Its file, if it has one.
    pub fn file(&self) -> Option<&FileSource> {
        match &self.source {
            BackendSource::File(file) => Some(file),
            BackendSource::Ram { .. } | BackendSource::Memfd { .. } => None,
        }
    }

    /// Which of QEMU's objects it is.
    pub fn kind(&self) -> BackendKind {
        match &self.source {
            BackendSource::Ram { .. } => BackendKind::Ram,
            BackendSource::Memfd { .. } => BackendKind::Memfd,
            BackendSource::File(_) => BackendKind::File,
        }
    }

    /// Whether writes can be seen outside this machine (`share=on`).
    pub fn is_shared(&self) -> bool {
        match &self.source {
            BackendSource::Ram { share } | BackendSource::Memfd { share } => *share,
            BackendSource::File(file) => match file.access {
                FileAccess::Template => true,
                FileAccess::Private | FileAccess::Clone => false,
                FileAccess::Rom { share } => share,
            },
        }
    }

    /// Whether the guest can only read it.
    pub fn is_rom(&self) -> bool {
        self.file()
            .is_some_and(|file| matches!(file.access, FileAccess::Rom { .. }))
    }

    /// Whether its file is opened for reading only (`readonly=on`).
    pub fn is_readonly(&self) -> bool {
        self.file()
            .is_some_and(|file| matches!(file.access, FileAccess::Clone | FileAccess::Rom { .. }))
    }

    /// Whether memory that is discarded goes back to the host and reads as zero, though it began as a file that
    /// is only read.
    pub fn discards_to_zero(&self) -> bool {
        self.file().is_some_and(|file| file.discards_to_zero)
    }

    /// Alignment in the guest and in this process, in bytes; 0 where none was asked for.
    pub fn align_bytes(&self) -> u64 {
        self.align_bytes
    }

    /// Whether every page is allocated before the guest runs.
    pub fn prealloc(&self) -> bool {
        self.prealloc
    }

    /// Whether the kernel may merge equal pages.
    pub fn merge(&self) -> bool {
        self.merge
    }

    /// Whether a core dump has it.
    pub fn dump(&self) -> bool {
        self.dump
    }
}

fn source(options: &BackendOptions) -> Result<BackendSource, BackendError> {
    let id = || options.id.clone();
    let align_bytes = options.align_bytes;
    if let Some(option) = option_of_files(options) {
        return Err(BackendError::NotAFile {
            id: id(),
            kind: options.kind.qemu_name(),
            option,
        });
    }
    let share = options.share;
    let source = match options.kind {
        BackendKind::Ram => BackendSource::Ram {
            share: share.unwrap_or(false),
        },
        BackendKind::Memfd => BackendSource::Memfd {
            share: share.unwrap_or(true),
        },
        BackendKind::File => BackendSource::File(FileSource {
            path: options
                .path
                .clone()
                .ok_or_else(|| BackendError::NoPath { id: id() })?,
            access: access(options)?,
            offset_bytes: options.offset_bytes,
            discard_data: options.discard_data,
            discards_to_zero: discards_to_zero(options)?,
        }),
    };
    if !align_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(BackendError::AlignPages {
            id: id(),
            align_bytes,
        });
    }
    if align_bytes != 0 && !align_bytes.is_power_of_two() {
        return Err(BackendError::AlignPower {
            id: id(),
            align_bytes,
        });
    }
    let offset_bytes = options.offset_bytes;
    if !offset_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(BackendError::Offset {
            id: id(),
            offset_bytes,
        });
    }
    if offset_bytes.saturating_add(options.bytes) > i64::MAX.unsigned_abs() {
        return Err(BackendError::TooFar {
            id: id(),
            offset_bytes,
            bytes: options.bytes,
        });
    }
    Ok(source)
}

/// An option that was given although the backend has no file.
fn option_of_files(options: &BackendOptions) -> Option<&'static str> {
    if options.kind == BackendKind::File {
        return None;
    }
    [
        (options.path.is_some(), "mem-path"),
        (options.readonly, "readonly"),
        (options.rom != OnOffAuto::Auto, "rom"),
        (options.offset_bytes != 0, "offset"),
        (options.align_bytes != 0, "align"),
        (options.discard_data, "discard-data"),
        (options.discards_to_zero, "discard"),
    ]
    .into_iter()
    .find_map(|(given, option)| given.then_some(option))
}

/// `discard=zero`, which is for memory that begins as a file and goes its own way.
fn discards_to_zero(options: &BackendOptions) -> Result<bool, BackendError> {
    let access = access(options)?;
    let is_clone = matches!(access, FileAccess::Private | FileAccess::Clone);
    if options.discards_to_zero && !is_clone {
        return Err(BackendError::DiscardZero {
            id: options.id.clone(),
        });
    }
    Ok(options.discards_to_zero)
}

/// What `share`, `readonly` and `rom` mean together.
fn access(options: &BackendOptions) -> Result<FileAccess, BackendError> {
    let id = || options.id.clone();
    let share = options.share.unwrap_or(false);
    match (share, options.readonly, options.rom) {
        (_, false, OnOffAuto::On) => Err(BackendError::RomWritable { id: id() }),
        (true, true, OnOffAuto::Off) => Err(BackendError::SharedReadonlyRam { id: id() }),
        (true, false, OnOffAuto::Off | OnOffAuto::Auto) => Ok(FileAccess::Template),
        (false, false, OnOffAuto::Off | OnOffAuto::Auto) => Ok(FileAccess::Private),
        (false, true, OnOffAuto::Off) => Ok(FileAccess::Clone),
        (share, true, OnOffAuto::On | OnOffAuto::Auto) => Ok(FileAccess::Rom { share }),
    }
}
