#![forbid(unsafe_code)]
//! Memory: `-m` and `-object memory-backend-*`, as parts of a machine.

use std::path::Path;

use super::refused::MULTI_PROCESS;
use crate::qemu::error::{
    OptionError, expects, invalid_parameter, missing, no_identifier, not_accepted,
};
use crate::qemu::words::{Form, Props, size};
use crate::spec::{BackendKind, BackendOptions, BackendSpec, MAX_SLOTS, MemoryParts, OnOffAuto};

/// The id that QEMU gives to RAM of its own making, and the size of that RAM.
pub const DEFAULT_RAM_ID: &str = "pc.ram";
/// RAM of a machine for which no size is given, in bytes, as QEMU has it.
pub const DEFAULT_RAM_BYTES: u64 = 128 << 20;
/// QEMU rounds RAM up to a multiple of this.
const RAM_UNIT_BYTES: u64 = 8192;

/// Reads `-m`: a number without suffix counts MiB.
pub fn sizes(text: &str) -> Result<MemoryParts, OptionError> {
    let mut props = Props::parse(text, Some("size"), Form::Switches)?;
    let mut size = |name: &str, unit: u64| match props.text(name)? {
        Some(typed) => match size::parse(&typed, unit) {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(no_size(name, &typed)),
        },
        None => Ok(None),
    };
    let bytes = size("size", 1 << 20)?
        .filter(|&bytes| bytes > 0)
        .map(|bytes| {
            bytes
                .checked_next_multiple_of(RAM_UNIT_BYTES)
                .unwrap_or(bytes)
        });
    let max_bytes = size("maxmem", 1)?;
    let slots = match props.text("slots")? {
        Some(typed) => Some(slots(&typed)?),
        None => None,
    };
    props.finish()?;
    if slots.is_some() && max_bytes.is_none() {
        return Err(OptionError::new(
            "slots specified but no max-size: invalid -m option value: missing 'maxmem' option",
        ));
    }
    let least_bytes = bytes.unwrap_or(DEFAULT_RAM_BYTES);
    match max_bytes {
        Some(max_bytes) if max_bytes < least_bytes => {
            return Err(OptionError::new(format!(
                "invalid value of maxmem: maximum memory size ({max_bytes:#x}) must be at least the initial \
                 memory size ({least_bytes:#x})"
            )));
        }
        Some(max_bytes) if max_bytes == least_bytes && slots.is_some_and(|slots| slots > 0) => {
            return Err(OptionError::new(format!(
                "invalid value of maxmem: memory slots were specified but maximum memory size \
                 ({max_bytes:#x}) is equal to the initial memory size ({least_bytes:#x})"
            )));
        }
        Some(max_bytes) if max_bytes >= least_bytes && max_bytes % 4096 != 0 => {
            return Err(OptionError::new(format!(
                "maximum memory size must by aligned to multiple of 4096 bytes, {max_bytes} is not"
            )));
        }
        _ => (),
    }
    Ok(MemoryParts {
        bytes,
        slots: slots.unwrap_or(0),
        max_bytes,
    })
}

/// What QEMU says of a text that is no size.
fn no_size(name: &str, typed: &str) -> OptionError {
    let is_number = typed
        .strip_prefix('-')
        .is_some_and(|digits| size::parse(digits, 1).is_some());
    let digits = typed.trim_end_matches(|c: char| "bkmgtpeBKMGTPE".contains(c));
    let is_great = digits.len() + 1 >= typed.len()
        && !digits.is_empty()
        && digits.bytes().all(|c| c.is_ascii_digit());
    if is_number || is_great {
        return OptionError::new(format!(
            "Value '{typed}' is out of range for parameter '{name}'"
        ));
    }
    expects(name, "a non-negative number below 2^64").hint(
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively.",
    )
}

fn slots(typed: &str) -> Result<u32, OptionError> {
    let mut one = Props::default();
    one.add("slots", typed);
    let number = one
        .integer("slots", "slots")
        .ok()
        .flatten()
        .ok_or_else(|| expects("slots", "a number"))?;
    match u32::try_from(number) {
        Ok(slots) if slots <= MAX_SLOTS => Ok(slots),
        _ => Err(OptionError::new(format!(
            "unsupported amount of memory slots: {}, a machine has at most {MAX_SLOTS}",
            number.cast_unsigned()
        ))),
    }
}

/// What holds for a backend that does not say it itself.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// `-mem-prealloc`
    pub prealloc: bool,
    /// `-machine mem-merge=`
    pub merge: bool,
    /// `-machine dump-guest-core=`
    pub dump: bool,
}

/// Reads `-object`.
pub fn object(text: &str, defaults: Defaults) -> Result<BackendSpec, OptionError> {
    let props = Props::parse(text, Some("qom-type"), Form::SwitchesOrJson)?;
    backend(props, defaults)
}

/// A memory backend from the properties of an object.
pub fn backend(mut props: Props, defaults: Defaults) -> Result<BackendSpec, OptionError> {
    let kind = match props.required("qom-type")?.as_str() {
        "memory-backend-file" => BackendKind::File,
        "memory-backend-ram" => BackendKind::Ram,
        "memory-backend-memfd" => BackendKind::Memfd,
        "memory-backend-shm" => {
            no_memfd_options(&props)?;
            if props.switch("share")? == Some(false) {
                return Err(OptionError::new(
                    "can't create shm backend with `share=off`",
                ));
            }
            // Shared memory without a name, either way.
            props.add("share", "on");
            BackendKind::Memfd
        }
        "x-remote-object" => {
            return Err(OptionError::new(format!(
                "object 'x-remote-object' cannot be had: {MULTI_PROCESS}"
            )));
        }
        other => {
            let error = not_accepted("qom-type", other);
            return Err(OptionError::new(format!(
                "{}: memory-backend-file, memory-backend-ram and memory-backend-memfd are the objects that \
                 Pando has",
                error.message()
            )));
        }
    };
    let id = props.required("id")?;
    if !is_identifier(&id) {
        return Err(no_identifier());
    }
    let is_file = kind == BackendKind::File;
    let mut options = BackendOptions {
        kind,
        id,
        share: props.switch("share")?,
        prealloc: props.switch("prealloc")?.unwrap_or(defaults.prealloc),
        merge: props.switch("merge")?.unwrap_or(defaults.merge),
        dump: props.switch("dump")?.unwrap_or(defaults.dump),
        ..BackendOptions::default()
    };
    if is_file {
        file_options(&mut props, &mut options)?;
    }
    options.reserve = reserve(&mut props, options.prealloc)?;
    host_nodes(&mut props)?;
    if kind == BackendKind::Memfd {
        memfd_options(&mut props)?;
    }
    let bytes = props.size("size")?;
    // Threads only make it faster.
    let threads = props.number_to("prealloc-threads", u32::MAX, "uint32_t")?;
    if props.switch("x-use-canonical-path-for-ramblock-id")? == Some(true) {
        return Err(OptionError::new(
            "x-use-canonical-path-for-ramblock-id=on cannot be had: a backend's id names it in the state",
        ));
    }
    props.finish()?;
    options.bytes = bytes.ok_or_else(|| missing("size"))?;
    if threads == Some(0) {
        return Err(OptionError::new(format!(
            "property 'prealloc-threads' of {} doesn't take value '0'",
            kind.qemu_name()
        )));
    }
    options.prealloc_threads = threads.unwrap_or(1);
    if is_file && options.path.is_none() {
        return Err(missing("mem-path"));
    }
    BackendSpec::from_options(options).map_err(|error| OptionError::new(error.to_string()))
}

/// What only memory without a file has.
fn memfd_options(props: &mut Props) -> Result<(), OptionError> {
    let is_huge = props.switch("hugetlb")? == Some(true);
    let huge_bytes = props.size("hugetlbsize")?;
    props.switch("seal")?;
    match huge_bytes {
        Some(0) => Err(OptionError::new(
            "Property 'memory-backend-memfd.hugetlbsize' doesn't take value '0'",
        )),
        Some(bytes) if is_huge && !bytes.is_power_of_two() => {
            Err(OptionError::new("Hugepage size must be a power of 2"))
        }
        _ if is_huge => Err(OptionError::new(
            "hugetlb=on cannot be had: huge pages are the kernel's to give (transparent_hugepage)",
        )),
        _ => Ok(()),
    }
}

/// QEMU has shared memory without a name as an object of its own, which has less to say.
fn no_memfd_options(props: &Props) -> Result<(), OptionError> {
    let mut options = ["hugetlb", "hugetlbsize", "seal"].iter();
    match options.find(|name| props.has(name)) {
        Some(name) => Err(invalid_parameter(name)),
        None => Ok(()),
    }
}

/// Whether QEMU takes it for an id.
pub fn is_identifier(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(allowed)
}

fn file_options(props: &mut Props, options: &mut BackendOptions) -> Result<(), OptionError> {
    options.path = props.text("mem-path")?.map(Into::into);
    options.readonly = props.switch("readonly")?.unwrap_or(false);
    options.rom = match props.word("rom", &["on", "off", "auto"])?.as_deref() {
        Some("on") => OnOffAuto::On,
        Some("off") => OnOffAuto::Off,
        _ => OnOffAuto::Auto,
    };
    options.offset_bytes = props.size("offset")?.unwrap_or(0);
    options.align_bytes = props.size("align")?.unwrap_or(0);
    options.discard_data = props.switch("discard-data")?.unwrap_or(false);
    let discard = props.word("discard", &["off", "zero"])?;
    options.discards_to_zero = discard.as_deref() == Some("zero");
    if props.switch("pmem")? == Some(true) {
        return Err(OptionError::new(
            "pmem=on cannot be had: Pando gives no persistence across a crash of the host; leave it out",
        ));
    }
    Ok(())
}

/// Memory is never reserved ahead; `prealloc=on` takes it.
fn reserve(props: &mut Props, prealloc: bool) -> Result<bool, OptionError> {
    match props.switch("reserve")? {
        Some(false) if prealloc => Err(OptionError::new(
            "'prealloc=on' and 'reserve=off' are incompatible",
        )),
        reserve => Ok(reserve.unwrap_or(true)),
    }
}

/// Most nodes of a host that QEMU counts with.
const MAX_HOST_NODES: u64 = 128;

fn is_host_node(node: u64) -> bool {
    Path::new(&format!("/sys/devices/system/node/node{node}")).exists()
}

fn host_nodes(props: &mut Props) -> Result<(), OptionError> {
    let nodes = props.numbers("host-nodes")?;
    let policies = ["default", "preferred", "bind", "interleave"];
    let policy = props.word("policy", &policies)?.unwrap_or_default();
    match (policy.as_str(), nodes.is_empty()) {
        ("" | "default", true) => Ok(()),
        ("" | "default", false) => Err(OptionError::new(
            "host-nodes must be empty for policy default, or you should explicitly specify a policy other \
             than default",
        )),
        (policy, true) => Err(OptionError::new(format!(
            "host-nodes must be set for policy {policy}"
        ))),
        _ if nodes.iter().any(|&node| node >= MAX_HOST_NODES) => Err(OptionError::new(format!(
            "Invalid host-nodes value: {}",
            nodes.iter().max().unwrap_or(&0)
        ))),
        _ if nodes.iter().any(|node| !is_host_node(*node)) => Err(OptionError::new(
            "cannot bind memory to host NUMA nodes: Invalid argument: this host has no such node",
        )),
        (policy, false) => Err(OptionError::new(format!(
            "policy={policy} cannot be had: start Pando under numactl to bind its memory"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Defaults = Defaults {
        prealloc: false,
        merge: true,
        dump: true,
    };

    fn message(text: &str) -> String {
        object(text, PLAIN).unwrap_err().to_string()
    }

    #[test]
    fn sizes_count_mib() {
        let all = sizes("64,slots=4,maxmem=1G").unwrap();
        assert_eq!(all.bytes, Some(64 << 20));
        assert_eq!((all.slots, all.max_bytes), (4, Some(1 << 30)));
        assert_eq!(sizes("size=2g").unwrap().bytes, Some(2 << 30));
        assert!(
            sizes("64X")
                .unwrap_err()
                .to_string()
                .contains("expects a non-negative number")
        );
        assert!(
            sizes("64M,foo=1")
                .unwrap_err()
                .to_string()
                .contains("Invalid parameter 'foo'")
        );
    }

    #[test]
    fn objects_are_refused_in_qemus_words() {
        let file = "memory-backend-file,id=pc.ram,mem-path=/t,size=64M";
        assert_eq!(object(file, PLAIN).unwrap().bytes(), 64 << 20);
        assert_eq!(
            message("memory-backend-file,id=r,mem-path=/t"),
            "Parameter 'size' is missing"
        );
        assert_eq!(
            message("memory-backend-file,id=r,size=1M"),
            "Parameter 'mem-path' is missing"
        );
        assert_eq!(
            message(&format!("{file},foo=bar")),
            "Invalid parameter 'foo'"
        );
        assert_eq!(
            message(&format!("{file},rom=maybe")),
            "Parameter 'rom' does not accept value 'maybe'"
        );
        assert!(message(&format!("{file},rom=on")).contains("'rom' = 'on' is not supported"));
        assert!(
            message("memory-backend-ram,id=r,size=1M,mem-path=/t").contains("Invalid parameter")
        );
        assert!(
            message("rng-random,id=r").contains("'qom-type' does not accept value 'rng-random'")
        );
    }
}
