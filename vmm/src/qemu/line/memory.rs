#![forbid(unsafe_code)]
//! Memory: `-m`, `-object memory-backend-*` and `-numa`, as parts of a machine.

use crate::qemu::error::{OptionError, expects, missing, not_accepted};
use crate::qemu::words::{Form, Props, size};
use crate::spec::{
    BackendKind, BackendOptions, BackendSpec, DistanceParts, MemoryParts, NodeParts, OnOffAuto,
};

/// The id that QEMU gives to RAM of its own making, and the size of that RAM.
pub const DEFAULT_RAM_ID: &str = "pc.ram";
/// RAM of a machine for which no size is given, in bytes, as QEMU has it.
pub const DEFAULT_RAM_BYTES: u64 = 128 << 20;

/// Reads `-m`: a number without suffix counts MiB.
pub fn sizes(text: &str) -> Result<MemoryParts, OptionError> {
    let mut props = Props::parse(text, Some("size"), Form::Switches)?;
    let bytes = match props.text("size")? {
        Some(typed) => Some(size::parse(&typed, 1 << 20).ok_or_else(|| {
            OptionError::new("Parameter 'size' expects a non-negative number below 2^64").hint(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively.",
            )
        })?),
        None => None,
    };
    let slots = props.number("slots")?;
    let max_bytes = props.size("maxmem")?;
    props.finish()?;
    if slots.is_some() && max_bytes.is_none() {
        return Err(OptionError::new(
            "slots specified but no max-size: invalid -m option value: missing 'maxmem' option",
        ));
    }
    Ok(MemoryParts {
        bytes: bytes.filter(|&bytes| bytes > 0),
        slots: slots.map_or(0, |slots| u32::try_from(slots).unwrap_or(u32::MAX)),
        max_bytes: max_bytes.filter(|&bytes| bytes > 0),
    })
}

/// Reads `-object`. `prealloc` is what `-mem-prealloc` asks for.
pub fn object(text: &str, prealloc: bool) -> Result<BackendSpec, OptionError> {
    let props = Props::parse(text, Some("qom-type"), Form::KeyValue)?;
    backend(props, prealloc)
}

/// A memory backend from the properties of an object.
pub fn backend(mut props: Props, prealloc: bool) -> Result<BackendSpec, OptionError> {
    let kind = match props.required("qom-type")?.as_str() {
        "memory-backend-file" => BackendKind::File,
        "memory-backend-ram" => BackendKind::Ram,
        "memory-backend-memfd" => BackendKind::Memfd,
        "memory-backend-shm" => {
            if props.switch("share")? == Some(false) {
                return Err(OptionError::new(
                    "can't create shm backend with `share=off`",
                ));
            }
            // Shared memory without a name, either way.
            props.add("share", "on");
            BackendKind::Memfd
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
        return Err(expects("id", "an identifier").hint(
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ));
    }
    let is_file = kind == BackendKind::File;
    let mut options = BackendOptions {
        kind,
        id,
        share: props.switch("share")?,
        prealloc: props.switch("prealloc")?.unwrap_or(prealloc),
        merge: props.switch("merge")?.unwrap_or(true),
        dump: props.switch("dump")?.unwrap_or(true),
        ..BackendOptions::default()
    };
    if is_file {
        file_options(&mut props, &mut options)?;
    }
    no_reserve(&mut props, options.prealloc)?;
    host_nodes(&mut props)?;
    if kind == BackendKind::Memfd && props.switch("hugetlb")? == Some(true) {
        return Err(OptionError::new(
            "hugetlb=on cannot be had: huge pages are the kernel's to give (transparent_hugepage)",
        ));
    }
    if kind == BackendKind::Memfd {
        props.switch("seal")?;
    }
    let bytes = props.size("size")?;
    // Threads only make it faster.
    props.number("prealloc-threads")?;
    if props.switch("x-use-canonical-path-for-ramblock-id")? == Some(true) {
        return Err(OptionError::new(
            "x-use-canonical-path-for-ramblock-id=on cannot be had: a backend's id names it in the state",
        ));
    }
    props.finish()?;
    options.bytes = bytes.ok_or_else(|| missing("size"))?;
    if is_file && options.path.is_none() {
        return Err(missing("mem-path"));
    }
    BackendSpec::from_options(options).map_err(|error| OptionError::new(error.to_string()))
}

/// Whether QEMU takes it for an id.
fn is_identifier(id: &str) -> bool {
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
    if props.switch("pmem")? == Some(true) {
        return Err(OptionError::new(
            "pmem=on cannot be had: Pando gives no persistence across a crash of the host; leave it out",
        ));
    }
    Ok(())
}

/// Memory is never reserved ahead; `prealloc=on` takes it.
fn no_reserve(props: &mut Props, prealloc: bool) -> Result<(), OptionError> {
    match props.switch("reserve")? {
        Some(false) if prealloc => Err(OptionError::new(
            "'prealloc=on' and 'reserve=off' are incompatible",
        )),
        _ => Ok(()),
    }
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
        (policy, false) => Err(OptionError::new(format!(
            "policy={policy} cannot be had: start Pando under numactl to bind its memory"
        ))),
    }
}

/// What a `-numa` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Numa {
    /// A node.
    Node(NodeParts),
    /// A distance.
    Distance(DistanceParts),
}

/// Reads `-numa`.
pub fn numa(text: &str) -> Result<Numa, OptionError> {
    let mut props = Props::parse(text, Some("type"), Form::KeyValue)?;
    let numa = match props.required("type")?.as_str() {
        "node" => Numa::Node(node(&mut props)?),
        "dist" => Numa::Distance(DistanceParts {
            from: small(&mut props, "src")?.ok_or_else(|| missing("src"))?,
            to: small(&mut props, "dst")?.ok_or_else(|| missing("dst"))?,
            distance: small(&mut props, "val")?.ok_or_else(|| missing("val"))?,
        }),
        kind @ ("cpu" | "hmat-lb" | "hmat-cache") => {
            return Err(OptionError::new(format!(
                "-numa {kind} cannot be had: give each node its vCPUs with -numa node,cpus="
            )));
        }
        other => return Err(not_accepted("type", other)),
    };
    props.finish()?;
    Ok(numa)
}

fn node(props: &mut Props) -> Result<NodeParts, OptionError> {
    if props.has("mem") {
        return Err(OptionError::new(
            "Parameter -numa node,mem is not supported by this machine type",
        )
        .hint("Use -numa node,memdev instead"));
    }
    for name in ["initiator"] {
        if props.has(name) {
            return Err(OptionError::new(format!(
                "{name}= cannot be had: there is no HMAT table"
            )));
        }
    }
    let cpus = props.numbers("cpus")?;
    Ok(NodeParts {
        id: small(props, "nodeid")?,
        cpus: cpus
            .into_iter()
            .map(|cpu| u32::try_from(cpu).unwrap_or(u32::MAX))
            .collect(),
        backend: props.text("memdev")?,
    })
}

fn small(props: &mut Props, name: &str) -> Result<Option<u32>, OptionError> {
    Ok(props
        .number(name)?
        .map(|value| u32::try_from(value).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        object(text, false).unwrap_err().to_string()
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
        assert_eq!(object(file, false).unwrap().bytes(), 64 << 20);
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

    #[test]
    fn nodes_and_distances() {
        let Numa::Node(node) = numa("node,nodeid=1,cpus=0-1,memdev=m1").unwrap() else {
            panic!("a node");
        };
        assert_eq!((node.id, node.cpus.len()), (Some(1), 2));
        assert!(matches!(
            numa("dist,src=0,dst=1,val=20"),
            Ok(Numa::Distance(_))
        ));
        assert_eq!(numa("node,mem=32M").unwrap_err().lines().len(), 2);
    }
}
