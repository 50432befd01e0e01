#![forbid(unsafe_code)]
//! What QEMU has and Pando has not: refused by name, with what to do instead. Nothing is ignored.

/// An option with the text that follows "Pando has no ... :".
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    /// Names without `-`.
    pub names: &'static [&'static str],
    /// Whether something follows them.
    pub argument: bool,
    /// Why, and what to do.
    pub instead: &'static str,
}

const NO_BLOCK: &str =
    "disks are virtio with raw images: say -drive file=FILE,if=virtio,format=raw";
const NO_SHARE: &str = "there is no shared directory: give the guest a disk (-drive)";
const NO_DISPLAY: &str =
    "there is no graphics or input: use -nographic or -display none, and -serial";
const NO_FIRMWARE: &str = "there is no firmware: give the kernel with -kernel";
const NO_USB: &str = "there is no USB: leave the option out";
const NO_SOUND: &str = "there is no sound: leave the option out";
const NO_EMULATOR: &str = "guests run on KVM alone: leave the option out";
const NO_PROCESS: &str = "start the program with the user, directory and limits that it is to have";

/// Why `-mem-path` cannot be used: the templating page says so, and this is why.
pub const MEM_PATH: &str = "-mem-path cannot be used for VM templating, neither to create the template \
     VM nor to start new VMs based on it: its memory is share=off, so the file stays empty, and it cannot \
     say readonly=on. Use -object memory-backend-file,id=ID,mem-path=FILE,size=SIZE with share=on (template) \
     or share=off,readonly=on,rom=off (clone), and -machine memory-backend=ID";

/// Why there are no devices of QEMU's multi-process kind.
pub const MULTI_PROCESS: &str = "a device in another QEMU process shares all guest memory with it (share=on), which \
     a template's clones cannot, and Pando has no multi-process devices: say virtio-blk-pci, or on shared memory \
     vhost-user-blk-pci with qemu-storage-daemon";

/// All options that are refused by name.
pub const REFUSED: &[Refused] = &[
    Refused {
        names: &["mem-path"],
        argument: true,
        instead: MEM_PATH,
    },
    Refused {
        names: &[
            "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "mtdblock", "iscsi",
        ],
        argument: true,
        instead: NO_BLOCK,
    },
    Refused {
        names: &["fsdev", "virtfs"],
        argument: true,
        instead: NO_SHARE,
    },
    Refused {
        names: &["snapshot"],
        argument: false,
        instead: "say snapshot=on of each -drive",
    },
    Refused {
        names: &["vnc", "spice", "k", "g", "rotate"],
        argument: true,
        instead: NO_DISPLAY,
    },
    Refused {
        names: &["curses", "full-screen", "no-fd-bootchk"],
        argument: false,
        instead: NO_DISPLAY,
    },
    Refused {
        names: &[
            "bios",
            "pflash",
            "L",
            "option-rom",
            "acpitable",
            "fw_cfg",
            "dtb",
        ],
        argument: true,
        instead: NO_FIRMWARE,
    },
    Refused {
        names: &["usb"],
        argument: false,
        instead: NO_USB,
    },
    Refused {
        names: &["usbdevice"],
        argument: true,
        instead: NO_USB,
    },
    Refused {
        names: &["audio", "audiodev", "soundhw"],
        argument: true,
        instead: NO_SOUND,
    },
    Refused {
        names: &[
            "icount",
            "tb-size",
            "accel-tcg",
            "seed",
            "plugin",
            "singlestep",
            "dfilter",
        ],
        argument: true,
        instead: NO_EMULATOR,
    },
    Refused {
        names: &["loadvm"],
        argument: true,
        instead: "states are kept in files of their own: use -incoming file:PATH",
    },
    Refused {
        names: &["gdb"],
        argument: true,
        instead: "there is no debugger stub: leave the option out",
    },
    Refused {
        names: &["s"],
        argument: false,
        instead: "there is no debugger stub: leave the option out",
    },
    Refused {
        names: &["runas", "chroot", "run-with", "user"],
        argument: true,
        instead: NO_PROCESS,
    },
    Refused {
        names: &["add-fd", "set"],
        argument: true,
        instead: "give files by name, and options where they belong",
    },
    Refused {
        names: &[
            "trace",
            "semihosting-config",
            "tpmdev",
            "watchdog-action",
            "action",
            "debugcon",
        ],
        argument: true,
        instead: "leave the option out",
    },
    Refused {
        names: &["semihosting", "win2k-hack", "preconfig", "xen-attach"],
        argument: false,
        instead: "leave the option out",
    },
    Refused {
        names: &["writeconfig", "dump-vmstate"],
        argument: true,
        instead: "`pando run --print-machine` shows a machine",
    },
    Refused {
        names: &["no-acpi"],
        argument: false,
        instead: "the guest finds its CPUs by ACPI: leave the option out",
    },
];

/// Why an option is refused; `None` when it is not one of QEMU's that are.
pub fn option(name: &str) -> Option<&'static Refused> {
    REFUSED.iter().find(|refused| refused.names.contains(&name))
}

/// Devices of QEMU, by how their names begin, with what to do instead. The first that fits counts.
const DEVICES: &[(&str, &str)] = &[
    (
        "vhost-user",
        "of devices in another process, which share all guest memory with it, Pando has vhost-user-blk-pci, \
         and virtio-net-pci on -netdev vhost-user",
    ),
    ("x-pci-proxy-dev", MULTI_PROCESS),
    ("virtio-net", "network devices are virtio-net-pci"),
    ("e1000", "network devices are virtio-net-pci"),
    ("rtl8139", "network devices are virtio-net-pci"),
    ("virtio-blk", "disks are virtio-blk-pci"),
    (
        "isa-serial",
        "COM1 is there anyway: say with -serial where it goes",
    ),
    ("nvdimm", "Pando has no NVDIMM: use pc-dimm"),
];

/// What to say of a device that Pando has not.
pub fn device(driver: &str) -> String {
    let instead = DEVICES
        .iter()
        .find(|(name, _)| driver.starts_with(name))
        .map(|(_, instead)| *instead);
    match instead {
        Some(instead) => format!("device '{driver}' cannot be had: {instead}"),
        None => format!(
            "'{driver}' is not a valid device model name, or one that Pando does not have: pc-dimm, \
             virtio-mem-pci, virtio-blk-pci, virtio-net-pci, virtio-rng-pci, virtio-serial-pci, virtconsole, \
             virtserialport, virtio-balloon-pci, vhost-vsock-pci, vhost-user-blk-pci and vmgenid are the devices to add"
        ),
    }
}
