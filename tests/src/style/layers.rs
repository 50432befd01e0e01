#![forbid(unsafe_code)]
//! Which module may name which: the arrows of the architecture, as a table.

use super::{Finding, Project, SourceFile};

/// A part of a crate, and what it must not name.
///
/// A place is a path from the root: a folder with a `/` at its end, or a module without `.rs`, which
/// then is the file and the folder of that name. A name is a path as in a `use` line; what is below
/// it counts too.
struct Layer {
    place: &'static str,
    never: &'static [&'static str],
    why: &'static str,
}

const LAYERS: &[Layer] = &[
    Layer {
        place: "vmm/src/spec",
        never: &[
            "crate::arch",
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::device",
            "crate::kvm",
            "crate::machine",
            "crate::sandbox",
            "crate::template",
            "crate::vcpu",
            "pando_pager",
        ],
        why: "a specification is words that cannot be wrong, nothing else",
    },
    Layer {
        place: "vmm/src/memory",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::device",
            "crate::kvm",
            "crate::machine",
            "crate::template",
            "crate::vcpu",
        ],
        why: "memory is below the machine",
    },
    Layer {
        place: "vmm/src/arch",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::device",
            "crate::kvm",
            "crate::machine",
            "crate::sandbox",
            "crate::template",
            "crate::vcpu",
            "pando_pager",
        ],
        why: "facts of the architecture are plain data",
    },
    Layer {
        place: "vmm/src/device",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::kvm",
            "crate::machine",
            "crate::template",
            "crate::vcpu",
            "pando_pager",
        ],
        why: "a device sees guest memory and its interrupt line",
    },
    Layer {
        place: "vmm/src/device/virtio/queue",
        never: &[
            "crate::device::virtio::transport",
            "crate::device::virtio::block",
        ],
        why: "a queue sees neither transport nor backend",
    },
    Layer {
        place: "vmm/src/kvm",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::device",
            "crate::machine",
            "crate::template",
            "crate::vcpu::run",
            "crate::vcpu::thread",
            "pando_pager",
        ],
        why: "KVM is the bottom: it speaks the vCPU's vocabulary and nothing above it",
    },
    Layer {
        place: "vmm/src/vcpu",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::machine",
            "crate::template",
            "pando_pager",
        ],
        why: "a vCPU does not know whose it is",
    },
    Layer {
        place: "vmm/src/machine",
        never: &[
            "crate::cli",
            "crate::clone",
            "crate::config",
            "crate::farm",
            "crate::template",
        ],
        why: "a machine does not know where its memory came from",
    },
    Layer {
        place: "vmm/src/template",
        never: &["crate::cli", "crate::clone", "crate::farm"],
        why: "a template does not know its clones",
    },
    Layer {
        place: "vmm/src/clone",
        never: &["crate::cli", "crate::config", "crate::farm"],
        why: "a clone does not know who asked for it",
    },
    Layer {
        place: "vmm/src/cli",
        never: &["crate::kvm", "crate::device", "pando_pager"],
        why: "the command line is words",
    },
    Layer {
        place: "vmm/src/config",
        never: &["crate::kvm", "crate::device", "pando_pager"],
        why: "configuration is words",
    },
    Layer {
        place: "vmm/src/qemu/words",
        never: &[
            "crate::clone",
            "crate::config",
            "crate::device",
            "crate::kvm",
            "crate::machine",
            "crate::memory",
            "crate::template",
            "pando_pager",
        ],
        why: "words are taken apart before anybody understands them",
    },
    Layer {
        place: "vmm/src/qemu",
        never: &["crate::cli", "crate::clone", "crate::kvm"],
        why: "QEMU's words end in a machine, whoever typed them",
    },
    Layer {
        place: "pager/src",
        never: &["pando_vmm"],
        why: "the pager knows no machine",
    },
    Layer {
        place: "pager/src/page",
        never: &["crate"],
        why: "page arithmetic depends on nothing",
    },
    Layer {
        place: "pager/src/image",
        never: &[
            "crate::budget",
            "crate::fault",
            "crate::handle",
            "crate::install",
            "crate::queue",
            "crate::residency",
            "crate::serve",
            "crate::source",
        ],
        why: "an image is a file's content, whoever asks",
    },
    Layer {
        place: "pager/src/working_set",
        never: &[
            "crate::handle",
            "crate::install",
            "crate::queue",
            "crate::serve",
            "crate::source",
        ],
        why: "what is learned does not depend on how pages are served",
    },
    Layer {
        place: "pager/src/source",
        never: &[
            "crate::install",
            "crate::serve",
            "crate::sys::userfaultfd",
            "userfaultfd",
        ],
        why: "a source brings bytes and never puts them in place",
    },
    Layer {
        place: "pager/src/install",
        never: &[
            "crate::serve",
            "crate::source",
            "io_uring",
            "std::fs",
            "std::os::unix::fs",
        ],
        why: "installing a page reads no file",
    },
    Layer {
        place: "pager/src/serve",
        never: &["io_uring", "std::fs", "std::os::unix::fs"],
        why: "the loop asks `source` for bytes and reads no file itself",
    },
];

/// Modules that compute and nothing else: no files, no clocks, no threads, no system calls.
const PURE: &[&str] = &[
    "vmm/src/spec",
    "vmm/src/memory/layout",
    "vmm/src/memory/slots",
    "vmm/src/machine/request",
    "vmm/src/vcpu/exit",
    "vmm/src/payload/protocol",
    "vmm/src/qemu/line/argv",
    "vmm/src/qemu/line/device",
    "vmm/src/qemu/line/global",
    "vmm/src/qemu/line/identity",
    "vmm/src/qemu/line/machine",
    "vmm/src/qemu/line/memory",
    "vmm/src/qemu/line/options",
    "vmm/src/qemu/line/refused",
    "vmm/src/qemu/line/wanted",
    "vmm/src/qemu/migration/address",
    "vmm/src/qemu/migration/capability",
    "vmm/src/qemu/qmp/arguments",
    "vmm/src/qemu/qmp/json",
    "vmm/src/qemu/qmp/message",
    "vmm/src/qemu/vm/status",
    "vmm/src/qemu/words",
    "vmm/src/payload/model",
    "pager/src/page",
    "pager/src/client/check",
    "pager/src/registry",
    "pager/src/residency",
    "pager/src/prefetch/plan",
    "pager/src/working_set",
];

const IMPURE: &[&str] = &[
    "crate::kvm",
    "crate::sys",
    "io_uring",
    "libc",
    "memmap2",
    "nix",
    "rustix",
    "std::env",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "userfaultfd",
];

/// Crates that only some places may name.
const CRATES: &[(&str, &[&str], &str)] = &[
    (
        "kvm_ioctls",
        &["vmm/src/kvm/", "bench/src/sys/"],
        "KVM is spoken in one place",
    ),
    (
        "kvm_bindings",
        &["vmm/src/kvm/", "bench/src/sys/"],
        "KVM's structures stay in one place",
    ),
    (
        "userfaultfd",
        &["pager/", "bench/src/sys/"],
        "userfaultfd is the pager's",
    ),
    (
        "anyhow",
        &[
            "vmm/src/main.rs",
            "vmm/src/cli/",
            "vmm/src/clone/attend.rs",
            "vmm/src/clone/forked.rs",
            "vmm/src/clone/worker.rs",
            "vmm/src/root/worker.rs",
            "vmm/src/pager_process/worker.rs",
            "vmm/src/demo/",
            "vmm/src/host/doctor.rs",
            "vmm/examples/",
            "bench/",
            "tests/",
        ],
        "libraries have typed errors; only what ends in a message to a person has others",
    ),
];

/// Devices: none names another one.
const DEVICES: &[&str] = &[
    "legacy::i8042",
    "legacy::power",
    "legacy::rtc",
    "legacy::serial",
    "virtio::balloon",
    "virtio::block",
    "virtio::console",
    "virtio::mem",
    "virtio::net",
    "virtio::rng",
    "virtio::vsock",
];

/// Every name that its place must not use.
pub fn findings(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in project
        .sources
        .iter()
        .filter(|file| !file.is_test() || file.path.starts_with("tests/"))
    {
        for (line, path) in file.paths() {
            for why in reasons(file, &path) {
                found.push(format!("{}:{line}: names {path}: {why}", file.path));
            }
        }
    }
    found.dedup();
    found
}

fn reasons(file: &SourceFile, path: &str) -> Vec<&'static str> {
    let mut reasons = Vec::new();
    for layer in LAYERS.iter().filter(|layer| is_in(&file.path, layer.place)) {
        if layer.never.iter().any(|name| is_below(path, name)) {
            reasons.push(layer.why);
        }
    }
    if PURE.iter().any(|place| is_in(&file.path, place))
        && IMPURE.iter().any(|name| is_below(path, name))
    {
        reasons.push("a pure module has no files, clocks, threads or system calls");
    }
    for (name, places, why) in CRATES {
        let inside = places.iter().any(|place| file.path.starts_with(place));
        if is_below(path, name) && !inside {
            reasons.push(why);
        }
    }
    let module = format!("crate::{}", file.module());
    for device in DEVICES
        .iter()
        .map(|device| format!("crate::device::{device}"))
    {
        let other = DEVICES
            .iter()
            .any(|own| is_below(&module, &format!("crate::device::{own}")));
        if other && !is_below(&module, &device) && is_below(path, &device) {
            reasons.push("a device never names another device");
        }
    }
    reasons
}

/// Whether a file is the module `place`, or in its folder.
fn is_in(file: &str, place: &str) -> bool {
    file.strip_prefix(place)
        .is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// Whether a path is `name` or something in it.
fn is_below(path: &str, name: &str) -> bool {
    path.strip_prefix(name)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> usize {
        let sources = vec![SourceFile::new(path, text)];
        findings(&Project {
            sources,
            texts: Vec::new(),
        })
        .len()
    }

    #[test]
    fn arrows_are_kept() {
        assert_eq!(
            found("vmm/src/machine/build.rs", "use crate::kvm::vm::Vm;"),
            0
        );
        assert_eq!(
            found("vmm/src/machine/build.rs", "use crate::{kvm, cli::Args};"),
            1
        );
        assert_eq!(
            found("vmm/src/machine/build.rs", "use super::super::cli;"),
            1
        );
        assert_eq!(
            found(
                "vmm/src/machine/build.rs",
                "fn f() { kvm_ioctls::Kvm::new() }"
            ),
            1
        );
        assert_eq!(found("vmm/src/kvm/vm.rs", "use kvm_ioctls::Kvm;"), 0);
        assert_eq!(
            found("vmm/src/device/legacy/serial.rs", "use super::i8042::X;"),
            1
        );
        assert_eq!(
            found("vmm/src/device/legacy/serial.rs", "use super::console::X;"),
            0
        );
    }

    #[test]
    fn pure_modules_do_nothing() {
        assert_eq!(found("pager/src/page.rs", "use std::fs::File;"), 1);
        assert_eq!(found("pager/src/page.rs", "use std::time::Duration;"), 0);
        assert_eq!(
            found("vmm/src/spec.rs", "let now = std::time::Instant::now();"),
            1
        );
    }
}
