#![forbid(unsafe_code)]
//! Names and places of devices.

use super::*;
use proptest::prelude::*;

fn part(id: Option<&str>, slot: Option<u8>) -> DeviceParts {
    DeviceParts {
        id: id.map(str::to_owned),
        slot,
        kind: DeviceKind::Rng,
    }
}

fn disk(path: &str, serial: Option<&str>) -> DeviceParts {
    DeviceParts {
        id: None,
        slot: None,
        kind: DeviceKind::Block(DiskParts {
            path: path.into(),
            access: DiskAccess::Write,
            serial: serial.map(str::to_owned),
            limits: Limits::default(),
        }),
    }
}

#[test]
fn defaults_leave_alone_what_was_asked_for() {
    let devices = place(vec![
        part(None, None),
        part(Some("rng0"), Some(1)),
        disk("d", None),
    ])
    .unwrap();
    let seen: Vec<_> = devices.iter().map(|d| (d.id(), d.slot())).collect();
    assert_eq!(seen, [("rng1", 2), ("rng0", 1), ("disk0", 3)]);
    let again = place(devices.iter().map(DeviceSpec::to_parts).collect()).unwrap();
    assert_eq!(again, devices);
}

#[test]
fn what_cannot_be_is_named() {
    let fault = |parts| place(parts).unwrap_err();
    assert_eq!(fault(vec![part(Some(".1"), None)]).1, DeviceFault::BadId);
    let twice = vec![part(Some("a"), None), part(Some("a"), None)];
    assert_eq!(fault(twice), ("a".to_owned(), DeviceFault::DuplicateId));
    for slot in [0, 32, 255] {
        let (name, fault) = fault(vec![part(None, Some(slot))]);
        assert_eq!(
            (name.as_str(), fault),
            ("virtio-rng", DeviceFault::NoSlot { slot })
        );
    }
    let vsock = |cid, path: Option<&str>| DeviceParts {
        id: None,
        slot: None,
        kind: DeviceKind::Vsock(VsockParts {
            cid,
            path: path.map(PathBuf::from),
        }),
    };
    for cid in [0, 1, 2, u32::MAX] {
        assert_eq!(fault(vec![vsock(cid, None)]).1, DeviceFault::BadCid { cid });
    }
    let long = "x".repeat(MAX_VSOCK_PATH_BYTES + 1);
    for path in ["", &long] {
        let (_, fault) = fault(vec![vsock(3, Some(path))]);
        assert!(matches!(fault, DeviceFault::BadVsockPath { .. }), "{path}");
    }
    let two = vec![vsock(3, None), vsock(4, None)];
    assert_eq!(fault(two).1, DeviceFault::SecondVsock);
    assert_eq!(
        place(vec![vsock(3, Some(&long[1..]))]).unwrap()[0].id(),
        "vsock0"
    );
    let (_, taken) = fault(vec![part(Some("a"), Some(3)), part(Some("b"), Some(3))]);
    assert_eq!(taken.to_string(), "PCI slot 3 is taken by device \"a\"");
    assert_eq!(fault(vec![part(None, None); 32]).1, DeviceFault::NoFreeSlot);
    assert_eq!(fault(vec![disk("", None)]).1, DeviceFault::NoPath);
    for serial in ["", "x\ny", "123456789012345678901"] {
        let (_, fault) = fault(vec![disk("d", Some(serial))]);
        assert!(matches!(fault, DeviceFault::BadSerial { .. }), "{serial:?}");
    }
}

proptest! {
    #[test]
    fn places_and_names_never_meet(
        asked in proptest::collection::vec(proptest::option::of(1_u8..=31), 0..31),
    ) {
        if let Ok(devices) = place(asked.iter().map(|&slot| part(None, slot)).collect()) {
            let mut slots: Vec<_> = devices.iter().map(DeviceSpec::slot).collect();
            slots.sort_unstable();
            slots.dedup();
            prop_assert_eq!(slots.len(), asked.len());
            let mut ids: Vec<_> = devices.iter().map(DeviceSpec::id).collect();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), asked.len());
        }
    }
}
