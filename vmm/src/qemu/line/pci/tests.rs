#![forbid(unsafe_code)]
use super::*;

fn read(options: &[(&str, &str)]) -> Result<Vec<DeviceParts>, OptionError> {
    let mut devices = PciDevices::default();
    for (name, value) in options {
        match *name {
            "device" => {
                let props = Props::parse(value, Some("driver"), Form::SwitchesOrJson)?;
                assert!(devices.device(props, "-device ...")?.is_none());
            }
            "object" => assert!(devices.object(value)?),
            name => assert!(devices.option(name, value, "-drive ...")?),
        }
    }
    devices.parts()
}

fn disk(id: Option<&str>, slot: Option<u8>, access: DiskAccess) -> DeviceParts {
    DeviceParts {
        id: id.map(str::to_owned),
        slot,
        kind: DeviceKind::Block(DiskParts {
            path: "d.img".into(),
            access,
            ..DiskParts::default()
        }),
    }
}

#[test]
fn a_port_is_a_name_of_the_bus() {
    let port = "pcie-root-port,id=rp0,chassis=1,slot=1,bus=pcie.0,addr=0x2.0x1,multifunction=on";
    let json = r#"{"driver": "pcie-root-port", "id": "rp0", "chassis": 1, "port": 16}"#;
    for port in [port, json] {
        for (device, slot) in [
            ("virtio-rng-pci,bus=rp0", None),
            ("virtio-rng-pci,bus=rp0,addr=0x0", None),
            ("virtio-rng-pci,bus=pcie.0,addr=5", Some(5)),
        ] {
            let parts = read(&[("device", port), ("device", device)]).unwrap();
            assert_eq!(parts.len(), 1, "{device}");
            assert_eq!(parts[0].slot, slot, "{device}");
        }
    }
    let wrong = |options: &[&str]| {
        let options: Vec<_> = options.iter().map(|&value| ("device", value)).collect();
        read(&options).unwrap_err().to_string()
    };
    for (options, text) in [
        (&["virtio-rng-pci,bus=rp0"][..], "Bus 'rp0' not found"),
        (
            &[port, "virtio-rng-pci,bus=rp0,addr=1"],
            "only allows plugging into slot 0.",
        ),
        (&["pcie-root-port,bus=rp9"], "Bus 'rp9' not found"),
        (&["pcie-root-port,hotplug=off"], "hotplug=off cannot be had"),
        (
            &["pcie-root-port,x-speed=16"],
            "Property 'pcie-root-port.x-speed' not found",
        ),
    ] {
        let said = wrong(options);
        assert!(said.contains(text), "{said}");
    }
}

#[test]
fn a_drive_keeps_its_limits_in_its_device() {
    let drive = "file=d.img,if=none,id=a,throttling.iops-total=50,throttling.iops-total-max=80";
    let parts = read(&[("drive", drive), ("device", "virtio-blk-pci,drive=a")]).unwrap();
    let DeviceKind::Block(disk) = &parts[0].kind else {
        panic!("{parts:?}");
    };
    let rate = disk.limits.requests.unwrap();
    assert_eq!((rate.per_second(), rate.burst()), (50, 80));
    assert_eq!(disk.limits.bytes, None);
}

#[test]
fn a_drive_is_a_disk_by_itself_or_by_its_device() {
    let drive = "file=d.img,if=virtio,format=raw,cache=writeback,aio=threads";
    let expected = [disk(Some("virtio0"), None, DiskAccess::Write)];
    assert_eq!(read(&[("drive", drive)]).unwrap(), expected);
    let device = "virtio-blk-pci,drive=a,id=x,addr=0x1f.0,bus=pcie.0";
    for (option, image, access) in [
        (
            "drive",
            "file=d.img,if=none,id=a,readonly=on",
            DiskAccess::Read,
        ),
        (
            "drive",
            "file=d.img,if=none,id=a,snapshot=on",
            DiskAccess::Snapshot,
        ),
        (
            "blockdev",
            "file,node-name=a,filename=d.img",
            DiskAccess::Write,
        ),
        (
            "blockdev",
            "driver=raw,node-name=a,file.driver=file,file.filename=d.img,read-only=on",
            DiskAccess::Read,
        ),
        (
            "blockdev",
            r#"{"driver": "file", "node-name": "a", "filename": "d.img", "read-only": true}"#,
            DiskAccess::Read,
        ),
    ] {
        let parts = read(&[(option, image), ("device", device)]).unwrap();
        assert_eq!(parts, [disk(Some("x"), Some(31), access)], "{image}");
    }
    let chain = [
        ("blockdev", "file,node-name=f,filename=d.img,read-only=on"),
        ("blockdev", "raw,node-name=a,file=f"),
        ("device", "virtio-blk,drive=a"),
    ];
    assert_eq!(read(&chain).unwrap(), [disk(None, None, DiskAccess::Read)]);
}

#[test]
fn entropy_has_the_kernels_source() {
    let source = ("object", "rng-random,id=r,filename=/dev/urandom");
    let parts = read(&[source, ("device", "virtio-rng-pci,rng=r")]).unwrap();
    assert_eq!(parts[0].kind, DeviceKind::Rng);
    assert_eq!(read(&[("device", "virtio-rng-pci")]).unwrap(), parts);
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    for (options, text) in [
        (&[("drive", "file=a")][..], "if=ide cannot be had"),
        (&[("drive", "if=virtio")], "'file' is missing"),
        (
            &[("drive", "file=a,if=virtio,format=qcow2")],
            "format=qcow2 cannot be had: format=raw",
        ),
        (
            &[("drive", "file=a,if=virtio,cache=none")],
            "cache=none cannot be had",
        ),
        (
            &[("drive", "file=a,if=virtio,throttle=5")],
            "Invalid parameter 'throttle'",
        ),
        (
            &[
                ("blockdev", "file,node-name=a,filename=d"),
                ("blockdev", "file,node-name=a,filename=d"),
            ],
            "Duplicate nodes with node-name='a'",
        ),
        (
            &[("blockdev", "file,filename=d")],
            "'node-name' must be specified for the root node",
        ),
        (
            &[("blockdev", "qcow2,node-name=a")],
            "driver 'qcow2' cannot be had",
        ),
        (&[("blockdev", "raw,node-name=a,file=b")], "node-name='b'"),
        (&[("device", "virtio-blk-pci")], "drive property not set"),
        (
            &[("device", "virtio-blk-pci,drive=a")],
            "can't find value 'a'",
        ),
        (
            &[("device", "virtio-rng-pci,rng=r")],
            "Device 'r' not found",
        ),
        (
            &[("device", "virtio-rng-pci,max-bytes=5")],
            "'virtio-rng-pci.max-bytes' not found",
        ),
        (
            &[("device", "virtio-rng-pci,addr=20")],
            "addr=20 cannot be had",
        ),
        (
            &[("device", "virtio-rng-pci,addr=4.1")],
            "addr=4.1 cannot be had",
        ),
        (
            &[("device", "virtio-rng-pci,bus=pci.1")],
            "Bus 'pci.1' not found",
        ),
        (
            &[("object", "rng-random,id=r,filename=/x")],
            "filename=/x cannot be had",
        ),
    ] {
        let error = read(options).unwrap_err().to_string();
        assert!(error.contains(text), "{options:?}: {error}");
    }
    let twice = [
        ("drive", "file=a,if=virtio,id=d"),
        ("device", "virtio-blk-pci,drive=d"),
    ];
    assert!(
        read(&twice)
            .unwrap_err()
            .to_string()
            .contains("already in use")
    );
}
