#![forbid(unsafe_code)]
//! Where Pando does not do what QEMU does, and why.

/// What a difference is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// QEMU crashes, hangs, corrupts, or runs a machine that cannot work.
    Better,
    /// It is so on purpose.
    Other,
    /// Pando does not have it.
    NotHere,
}

/// Cases with one reason.
#[derive(Debug, Clone, Copy)]
pub struct Difference {
    /// Ids; one that ends with `*` stands for all that begin so.
    pub ids: &'static [&'static str],
    /// Which kind.
    pub kind: Kind,
    /// Why, in words.
    pub why: &'static str,
    /// What Pando exits with.
    pub code: i32,
    /// Whether some hosts do what QEMU's did.
    pub depends_on_host: bool,
}

impl Difference {
    /// Whether a case is meant.
    pub fn covers(&self, id: &str) -> bool {
        self.ids
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(begin) => id.starts_with(begin),
                None => *pattern == id,
            })
    }

    /// Whether it came as it is listed.
    pub fn fits(&self, code: Option<i32>) -> bool {
        code == Some(self.code)
    }
}

const fn listed(
    ids: &'static [&'static str],
    kind: Kind,
    code: i32,
    why: &'static str,
) -> Difference {
    Difference {
        ids,
        kind,
        why,
        code,
        depends_on_host: false,
    }
}

/// All of them. The first that covers a case counts.
pub const DIFFERENCES: &[Difference] = &[
    listed(
        &["tpl-empty-ro", "tpl-empty-ro-touch"],
        Kind::Better,
        1,
        "refused: the file is empty, and a clone of nothing dies of SIGBUS at its first access",
    ),
    listed(
        &["tpl-truncated-under"],
        Kind::Better,
        0,
        "goes on: pages come through the pager; one that is gone ends the clone with a message when it is touched",
    ),
    listed(
        &["tpl-size-unaligned", "tpl-size-unaligned-nom"],
        Kind::Better,
        1,
        "refused before a file is made: none is left behind",
    ),
    listed(
        &["clone-norom"],
        Kind::Better,
        1,
        "refused: RAM that cannot be written (`readonly=on` without `rom=off`) runs no guest",
    ),
    listed(
        &["tpl-devzero"],
        Kind::Better,
        0,
        "the same without QEMU's message about ftruncate",
    ),
    listed(
        &["tpl-symlink-dangling"],
        Kind::Better,
        1,
        "refused: the link leads nowhere; QEMU tries to open it for ever",
    ),
    listed(
        &["tpl-prealloc-rom", "tpl-prealloc-rom-shared"],
        Kind::Better,
        1,
        "refused: pages of read-only memory cannot be written ahead; QEMU crashes",
    ),
    Difference {
        depends_on_host: true,
        ..listed(
            &["tpl-perm-nonroot-clone"],
            Kind::Other,
            1,
            "a user without access to userfaultfd is told how to get it (`pando doctor`)",
        )
    },
    listed(
        &["tpl-discard-data-off"],
        Kind::NotHere,
        0,
        "the recording wrote memory through qtest, which Pando does not have; the file stays as it was",
    ),
    listed(
        &["tpl-pmem"],
        Kind::NotHere,
        1,
        "`pmem=on` is refused by name",
    ),
    listed(
        &["tpl-hostnodes"],
        Kind::NotHere,
        1,
        "memory is not bound to host nodes: start Pando under numactl",
    ),
    listed(
        &["tpl-none"],
        Kind::NotHere,
        1,
        "a machine without a CPU is refused by name",
    ),
    listed(
        &["mp-*"],
        Kind::Better,
        1,
        "`-mem-path` is refused with the reason that the templating page gives",
    ),
    listed(
        &["vmem-hotplug-nobus"],
        Kind::Better,
        0,
        "devices come and go on the one bus that there is",
    ),
    listed(
        &["vmem-priv*"],
        Kind::Better,
        1,
        "virtio-mem on a file that is only read is refused at the start: QEMU punches the file",
    ),
    listed(
        &["vmem-incoming"],
        Kind::Better,
        1,
        "virtio-mem on a template's file is refused at the start, not when the state is loaded",
    ),
    listed(
        &[
            "mig-caps-src",
            "mig-caps-src-postcopy",
            "mig-caps-dst-postcopy-shm",
        ],
        Kind::Better,
        0,
        "`release-ram` and `postcopy-ram` are refused when they are set, not when they fail",
    ),
    listed(
        &["mig-cpr"],
        Kind::NotHere,
        0,
        "there is no live update: `mode` is `normal`",
    ),
    listed(
        &["id-mac*"],
        Kind::NotHere,
        1,
        "networks are taps: `-netdev user` and `e1000` are refused by name",
    ),
];
