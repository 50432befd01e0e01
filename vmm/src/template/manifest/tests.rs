#![forbid(unsafe_code)]
use super::*;
use crate::template::device_entry::{DiskEntry, PortEntry};
use crate::template::limits_entry::{LimitsEntry, RateEntry};
use crate::template::machine_entry::{DimmEntry, NodeEntry};
use proptest::prelude::*;

fn example() -> ManifestFile {
    let seal = Seal {
        inode: 7,
        bytes: 64 << 20,
        mtime_s: 1,
        mtime_ns: 2,
    };
    let entry = |name: &str| FileEntry {
        file: name.into(),
        digest: "sha256:00".into(),
        seal: Seal { bytes: 10, ..seal },
    };
    ManifestFile {
        format: 1,
        tool: "pando 0.1.0".into(),
        created_unix_s: 1_700_000_000,
        cpus: 2,
        machine: None,
        identity: None,
        generation_id: false,
        pci: false,
        devices: vec![],
        backends: vec![BackendEntry {
            id: "ram0".into(),
            file: "ram0.mem".into(),
            bytes: 64 << 20,
            guest_address: 0,
            digest: "sha256-sparse:00".into(),
            seal,
        }],
        state: entry("state.bin"),
        index: entry("pages.idx"),
        host: HostEntry {
            cpuid: vec![[1, 0, 0, 2, 3, 4, 5]],
            msrs: vec![0x10],
            tsc_khz: Some(2_000_000),
        },
        checksum: String::new(),
    }
}

fn path() -> &'static Path {
    Path::new("t/manifest.json")
}

#[test]
fn what_is_written_is_read_back() {
    let manifest = Manifest::seal(path(), example()).unwrap();
    assert_eq!(
        Manifest::parse(path(), &manifest.to_json()).unwrap(),
        manifest
    );
}

#[test]
fn a_newer_format_is_named_even_with_fields_unknown_here() {
    let error = Manifest::parse(path(), br#"{"format": 9, "moon": true}"#).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has format 9, and this pando reads formats up to 5")
    );
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    for name in [
        "../ram0.mem",
        "/etc/passwd",
        "",
        "a/b",
        ".",
        "..",
        "a/",
        "a\0b",
    ] {
        let mut file = example();
        file.backends[0].file = name.into();
        let error = Manifest::seal(path(), file).unwrap_err().to_string();
        assert!(
            error.contains("is not a plain file name"),
            "{name}: {error}"
        );
    }
}

#[test]
fn the_name_of_the_working_set_is_taken() {
    let mut file = example();
    file.backends[0].file = "working-set".into();
    let error = Manifest::seal(path(), file).unwrap_err().to_string();
    assert!(error.contains("the name of another file"), "{error}");
}

#[test]
fn a_backend_at_the_wrong_address_is_refused() {
    let mut file = example();
    file.backends[0].guest_address = 4096;
    let error = Manifest::seal(path(), file).unwrap_err().to_string();
    assert!(
        error.contains("backend ram0 is at 0x1000, the machine has it at 0x0;"),
        "{error}"
    );
}

/// Two backends as two nodes, and a module.
fn with_nodes() -> ManifestFile {
    let mut file = example();
    for (number, guest_address) in [(1, 64 << 20), (2, 4_u64 << 30)] {
        let mut more = file.backends[0].clone();
        more.id = format!("ram{number}");
        more.file = format!("ram{number}.mem");
        more.guest_address = guest_address;
        file.backends.push(more);
    }
    let node = |cpu: u32| NodeEntry {
        cpus: vec![cpu],
        backend: Some(format!("ram{cpu}")),
    };
    file.format = 2;
    file.machine = Some(MachineEntry {
        nodes: vec![node(0), node(1)],
        distances: vec![vec![10, 20], vec![21, 10]],
        slots: 1,
        max_bytes: 1 << 30,
        dimms: vec![DimmEntry {
            id: "dimm0".into(),
            backend: "ram2".into(),
            node: 1,
            slot: 0,
            guest_address: 4 << 30,
        }],
    });
    file
}

#[test]
fn nodes_and_modules_are_written_and_read_back() {
    let manifest = Manifest::seal(path(), with_nodes()).unwrap();
    let read = Manifest::parse(path(), &manifest.to_json()).unwrap();
    assert_eq!(read, manifest);
    let spec = read.spec();
    assert_eq!(spec.numa().nodes()[1].cpus(), [1]);
    assert_eq!(spec.numa().distance(1, 0), 21);
    assert_eq!(spec.dimms()[0].guest_address(), 4 << 30);
    assert_eq!(
        MachineEntry::of(spec).as_ref(),
        read.file().machine.as_ref()
    );
}

#[test]
fn who_a_machine_is_is_written_and_read_back() {
    let mut file = example();
    file.format = 3;
    let mut system = <[String; 6]>::default();
    system[3] = "S1".into();
    file.identity = Some(IdentityEntry {
        name: Some("web".into()),
        uuid: Some("8a1b7f0e-32a5-4f4b-9c7e-0123456789ab".into()),
        system: Some(system),
    });
    let manifest = Manifest::seal(path(), file.clone()).unwrap();
    let read = Manifest::parse(path(), &manifest.to_json()).unwrap();
    assert_eq!(read, manifest);
    let identity = read.spec().identity();
    assert_eq!(identity.name.as_deref(), Some("web"));
    assert_eq!(identity.system.as_ref().unwrap().serial, "S1");
    assert_eq!(IdentityEntry::of(read.spec()), file.identity);
    let refused = |change: &dyn Fn(&mut ManifestFile)| {
        let mut wrong = file.clone();
        change(&mut wrong);
        Manifest::seal(path(), wrong).unwrap_err().to_string()
    };
    let old = refused(&|file| file.format = 2);
    assert!(old.contains("format 2 has no identity"), "{old}");
    let uuid = refused(&|file| file.identity.as_mut().unwrap().uuid = Some("x".into()));
    assert!(uuid.contains("its uuid \"x\" is none"), "{uuid}");
}

#[test]
fn nodes_and_modules_that_do_not_fit_are_refused() {
    let refused = |change: fn(&mut ManifestFile)| {
        let mut file = with_nodes();
        change(&mut file);
        Manifest::seal(path(), file).unwrap_err().to_string()
    };
    let old = refused(|file| file.format = 1);
    assert!(old.contains("format 1 has no nodes"), "{old}");
    let order = refused(|file| file.backends.swap(0, 1));
    assert!(order.contains("not in the order of the machine"), "{order}");
    let moved = refused(|file| file.backends[2].guest_address = 5 << 30);
    assert!(moved.contains("ram2 is at 0x140000000"), "{moved}");
    let unused = refused(|file| file.machine.as_mut().unwrap().dimms.clear());
    assert!(unused.contains("\"ram2\" is used by nothing"), "{unused}");
    let cpu = refused(|file| file.machine.as_mut().unwrap().nodes[0].cpus.push(7));
    assert!(cpu.contains("CPU index (7)"), "{cpu}");
    let distance = refused(|file| file.machine.as_mut().unwrap().distances[0].push(20));
    assert!(distance.contains("node 2"), "{distance}");
}

#[test]
fn a_machine_that_cannot_be_is_refused_with_its_cause() {
    let mut file = example();
    file.backends[0].bytes = (64 << 20) + 1;
    let error = Manifest::seal(path(), file).unwrap_err().to_string();
    assert!(
        error.contains("memory size must be multiple of 4 KiB, 67108865 bytes"),
        "{error}"
    );
    let error = Manifest::parse(path(), br#"{"format": 0}"#).unwrap_err();
    assert!(error.to_string().contains("it has format 0"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(bytes: Vec<u8>) {
        prop_assert!(Manifest::parse(path(), &bytes).is_err());
    }

    #[test]
    fn any_changed_byte_is_noticed_or_means_the_same(at in 0_usize..1000, bit in 0_u8..8) {
        let manifest = Manifest::seal(path(), example()).unwrap();
        let mut json = manifest.to_json();
        let at = at % json.len();
        json[at] ^= 1 << bit;
        if let Ok(read) = Manifest::parse(path(), &json) {
            prop_assert_eq!(read, manifest);
        }
    }
}

fn with_devices() -> ManifestFile {
    let mut file = example();
    let seal = file.backends[0].seal;
    let device = |id: &str, slot, kind: &str, disk, cid| DeviceEntry {
        balloon: None,
        id: id.into(),
        slot,
        kind: kind.into(),
        disk,
        cid,
        mac: None,
        ports: None,
        limits: None,
    };
    let mut console = device("console0", 6, "virtio-console", None, None);
    console.ports = Some(vec![PortEntry {
        number: 1,
        name: Some("agent".into()),
        console: false,
    }]);
    let disk = DiskEntry {
        file: "root.disk".into(),
        bytes: 4096,
        readonly: true,
        serial: Some("aspen".into()),
        digest: "sha256-sparse:00".into(),
        seal: Seal {
            bytes: 4096,
            ..seal
        },
    };
    file.format = 4;
    file.devices = vec![
        device("rng0", 1, "virtio-rng", None, None),
        device("root", 4, "virtio-blk", Some(disk), None),
        device("vsock0", 5, "virtio-vsock", None, Some(77)),
        console,
    ];
    file
}

#[test]
fn limits_are_those_of_the_device() {
    let rate = |per_second| RateEntry {
        per_second,
        burst: 500,
    };
    let limits = |per_second| {
        Some(LimitsEntry {
            bytes: None,
            requests: Some(rate(per_second)),
        })
    };
    let mut file = with_devices();
    file.format = 5;
    file.devices[1].limits = limits(9);
    let manifest = Manifest::seal(path(), file.clone()).unwrap();
    let read = Manifest::parse(path(), &manifest.to_json()).unwrap();
    let found = read.spec().devices()[1].limits();
    let found_rate = found.requests.unwrap();
    assert_eq!((found_rate.per_second(), found_rate.burst()), (9, 500));
    assert_eq!(LimitsEntry::of(&found), limits(9));
    assert_eq!(format_of(read.spec(), &None, &None), 5);
    let refused = |change: fn(&mut ManifestFile)| {
        let mut file = file.clone();
        change(&mut file);
        Manifest::seal(path(), file).unwrap_err().to_string()
    };
    assert!(refused(|file| file.format = 4).contains("format 4 has no limits"));
    assert!(
        refused(|file| file.devices[0].limits = file.devices[1].limits)
            .contains("rng0 is a \"virtio-rng\" with limits")
    );
    file.devices[1].limits = limits(0);
    let error = Manifest::seal(path(), file).unwrap_err().to_string();
    assert!(error.contains("root: 0 requests cannot be"), "{error}");
}

#[test]
fn devices_are_those_of_the_machine() {
    let manifest = Manifest::seal(path(), with_devices()).unwrap();
    let read = Manifest::parse(path(), &manifest.to_json()).unwrap();
    assert_eq!(read, manifest);
    let devices = read.spec().devices();
    assert_eq!((devices[1].id(), devices[1].slot()), ("root", 4));
    let vsock = devices[2].vsock().unwrap();
    assert_eq!((vsock.cid, &vsock.path), (77, &None));
    let ports = &devices[3].console().unwrap().ports;
    assert_eq!(
        (ports[0].number, ports[0].name.as_deref()),
        (Some(1), Some("agent"))
    );
    let disk = devices[1].disk().unwrap();
    assert_eq!(disk.serial.as_deref(), Some("aspen"));
    let refused = |change: fn(&mut ManifestFile)| {
        let mut file = with_devices();
        change(&mut file);
        Manifest::seal(path(), file).unwrap_err().to_string()
    };
    let disk = |file: &mut ManifestFile| file.devices[1].disk.clone().unwrap();
    assert!(refused(|file| file.format = 3).contains("format 3 has no devices"));
    assert!(refused(|file| file.devices[1].slot = 1).contains("PCI slot 1 is taken"));
    assert!(refused(|file| file.devices[1].disk = None).contains("\"virtio-blk\" without a disk"));
    assert!(refused(|file| file.devices[0].kind = "tape".into()).contains("\"tape\" without"));
    assert!(refused(|file| file.devices[2].cid = None).contains("without a context id and"));
    assert!(refused(|file| file.devices[0].cid = Some(9)).contains("with a context id and"));
    assert!(refused(|file| file.devices[3].ports = None).contains("without ports"));
    assert!(refused(|file| file.devices[0].ports = Some(vec![])).contains("with ports"));
    assert!(refused(|file| file.devices[2].cid = Some(2)).contains("context id 2 is no guest's"));
    for (name, text) in [
        ("../x", "not a plain file name"),
        ("working-set", "another file"),
    ] {
        let mut file = with_devices();
        let mut named = disk(&mut file);
        named.file = name.into();
        file.devices[1].disk = Some(named);
        let error = Manifest::seal(path(), file).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let mut file = with_devices();
    let mut short = disk(&mut file);
    short.bytes = 512;
    file.devices[1].disk = Some(short);
    let error = Manifest::seal(path(), file).unwrap_err().to_string();
    assert!(
        error.contains("disk root has 512 bytes, its sealed file has 4096"),
        "{error}"
    );
}
