#![forbid(unsafe_code)]
//! Files of a template. The first byte says which:
//!
//! 0. the manifest, with a right checksum if it has a place for one;
//! 1. the body of the page index;
//! 2. the body of the machine's state;
//! 3. the bodies of a page index and of a working set, and what a clone touched: the set is planned
//!    with, and taught;
//! 4. any of them as it is.

use std::path::Path;

use pando_pager::image::{ChunkIndex, Index, PageKind};
use pando_pager::working_set::{MergeRules, Plan, PlanRules, WorkingSet};
use pando_vmm::clone::record::{Arriving, TracePiece};
use pando_vmm::template::device_entry::{DeviceEntry, DiskEntry, PortEntry};
use pando_vmm::template::limits_entry::{LimitsEntry, RateEntry};
use pando_vmm::template::manifest::{
    BackendEntry, FORMAT, FileEntry, HostEntry, Manifest, ManifestFile,
};
use pando_vmm::template::seal::Seal;
use pando_vmm::template::state_file;

use crate::{parts, state};

/// Magic and version of page indexes.
pub(crate) const INDEX: ([u8; 8], u32) = (*b"PANDOIDX", 1);
/// Magic and version of machine states.
pub(crate) const STATE: ([u8; 8], u32) = (*b"PANDOST\0", state_file::FORMAT);
const WORKING_SET: ([u8; 8], u32) = (*b"PANDOWS\0", 1);

/// Takes a file.
pub fn run(data: &[u8]) {
    let Some((kind, content)) = parts::kind(data, 5) else {
        return;
    };
    match kind {
        0 => manifest(content),
        1 => _ = index(&parts::framed(INDEX.0, INDEX.1, content)),
        2 => machine_state(&parts::framed(STATE.0, STATE.1, content)),
        3 => working_set(content),
        _ => {
            _ = Manifest::parse(path(), content);
            _ = index(content);
            machine_state(content);
            _ = WorkingSet::decode(content);
        }
    }
}

fn path() -> &'static Path {
    Path::new("t")
}

fn manifest(content: &[u8]) {
    let _ = Manifest::parse(path(), content);
    let Ok(file) = serde_json::from_slice::<ManifestFile>(content) else {
        return;
    };
    let Ok(manifest) = Manifest::seal(path(), file) else {
        return;
    };
    // Of a format that never was, nothing is written.
    if let Ok(again) = Manifest::parse(path(), &manifest.to_json()) {
        assert_eq!(again, manifest);
    }
    let _ = manifest.cpuid();
}

fn index(content: &[u8]) -> Option<Index> {
    let index = Index::decode(content).ok()?;
    assert_eq!(Index::decode(&index.encode()).ok().as_ref(), Some(&index));
    for (_, backend) in index.backends() {
        let of = |kind| backend.count(kind).get();
        let total = of(PageKind::Data) + of(PageKind::Zero) + of(PageKind::Hole);
        assert_eq!(total, backend.pages().get());
        let in_runs: u64 = backend.runs().map(|(pages, _)| pages.count().get()).sum();
        assert_eq!(in_runs, total, "runs cover a backend");
        let chunks = total.div_ceil(pando_pager::image::CHUNK_PAGES);
        let _ = (0..=chunks)
            .filter_map(|chunk| backend.checksum(ChunkIndex::new(chunk)))
            .count();
    }
    Some(index)
}

fn machine_state(content: &[u8]) {
    if let Ok(state) = state_file::decode(path(), content) {
        let _ = (state.cpuid(), state.msr_numbers());
        let encoded = state_file::encode(path(), &state).expect("a state can be encoded");
        let again = state_file::decode(path(), &encoded).expect("and decoded");
        assert_eq!(again, state);
    }
}

fn working_set(content: &[u8]) {
    let read = postcard::take_from_bytes::<(Vec<u8>, Vec<u8>)>(content);
    let Ok(((index_body, set_body), trace)) = read else {
        return;
    };
    let decoded = WorkingSet::decode(&parts::framed(WORKING_SET.0, WORKING_SET.1, &set_body));
    if let Ok(set) = &decoded {
        assert_eq!(WorkingSet::decode(&set.encode()).ok().as_ref(), Some(set));
    }
    let Some(index) = index(&parts::framed(INDEX.0, INDEX.1, &index_body)) else {
        return;
    };
    let mut set = match decoded {
        Ok(set) if set.is_of(MARK, &index) => set,
        _ => WorkingSet::new(MARK, &index),
    };
    plan(&set, &index);
    let Ok(pieces) = postcard::from_bytes::<Vec<TracePiece>>(trace) else {
        return;
    };
    let mut arriving = Arriving::default();
    pieces.into_iter().for_each(|piece| arriving.add(piece));
    if let Some(trace) = arriving.finish(0) {
        set.merge(&trace, &index, &MergeRules::default());
        assert_eq!(WorkingSet::decode(&set.encode()).ok().as_ref(), Some(&set));
        plan(&set, &index);
    }
}

/// The mark of the template whose working sets these are.
const MARK: u64 = 7;

fn plan(set: &WorkingSet, index: &Index) {
    for whole_ranges in [false, true] {
        let rules = PlanRules {
            share_pages: 1 << 20,
            private_pages: 64,
            zero_pages: 64,
            whole_ranges,
        };
        let plan = Plan::new(set, index, &rules);
        assert!(Plan::pages_of(&plan.private) <= rules.private_pages);
    }
}

/// The body of an index with one backend that has data in its first page alone, or none.
pub(crate) fn index_body(id: &str, pages: u64, has_data: bool) -> Vec<u8> {
    let mut body = 1_u32.to_le_bytes().to_vec();
    body.extend(u16::try_from(id.len()).unwrap_or_default().to_le_bytes());
    body.extend(id.as_bytes());
    let words = pages.div_ceil(32);
    let data = u64::from(has_data);
    for number in [pages, data, 2 * data] {
        body.extend(number.to_le_bytes());
    }
    for _ in 1..words {
        body.extend(0_u64.to_le_bytes());
    }
    if has_data {
        body.extend(1_u64.to_le_bytes());
    }
    body
}

fn manifest_file() -> ManifestFile {
    let seal = Seal {
        inode: 7,
        bytes: 64 << 20,
        mtime_s: 1,
        mtime_ns: 2,
    };
    let entry = |name: &str| FileEntry {
        file: name.into(),
        digest: "sha256:00".into(),
        seal,
    };
    ManifestFile {
        format: 1,
        tool: "pando".into(),
        created_unix_s: 1,
        cpus: 2,
        machine: None,
        identity: None,
        pci: false,
        devices: vec![],
        generation_id: false,
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
            tsc_khz: Some(1),
        },
        checksum: String::new(),
    }
}

/// The same with devices of each kind.
fn with_devices() -> ManifestFile {
    let mut file = manifest_file();
    let seal = file.state.seal;
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
        bytes: 1 << 20,
        readonly: false,
        serial: Some("aspen".into()),
        digest: "sha256-sparse:00".into(),
        seal,
    };
    file.format = FORMAT;
    file.generation_id = true;
    file.devices = vec![
        device("rng0", 1, "virtio-rng", None, None),
        device("root", 4, "virtio-blk", Some(disk), None),
        device("vsock0", 5, "virtio-vsock", None, Some(3)),
        console,
    ];
    let rate = RateEntry {
        per_second: 500,
        burst: 50,
    };
    file.devices[1].limits = Some(LimitsEntry {
        bytes: None,
        requests: Some(rate),
    });
    file
}

/// A file of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let json = serde_json::to_vec(&manifest_file()).unwrap_or_default();
    seeds.push(parts::of(0, &json));
    seeds.push(parts::of(0, WITH_NODES.as_bytes()));
    for file in [manifest_file(), with_devices()] {
        if let Ok(sealed) = Manifest::seal(path(), file) {
            seeds.push(parts::of(4, &sealed.to_json()));
        }
    }
    let index = index_body("ram0", 600, true);
    seeds.push(parts::of(1, &index));
    seeds.push(parts::of(4, &parts::framed(INDEX.0, INDEX.1, &index)));
    let state = postcard::to_stdvec(&state::machine_state()).unwrap_or_default();
    seeds.push(parts::of(2, &state));
    seeds.push(parts::of(4, &parts::framed(STATE.0, STATE.1, &state)));
    for known in [0, 3] {
        let set = set_body("ram0", 600, known);
        let both = postcard::to_stdvec(&(&index, &set)).unwrap_or_default();
        // One piece that is the last: two touches, and one range that was seen.
        let trace: Vec<Trace> = vec![(
            vec![(0, 0, true, 5), (0, 9, false, 6)],
            vec![(0, 8, 4, 1)],
            true,
            true,
        )];
        let trace = postcard::to_stdvec(&trace).unwrap_or_default();
        seeds.push(parts::of(3, &[both, trace].concat()));
    }
    seeds
}

type Trace = (
    Vec<(u32, u64, bool, u64)>,
    Vec<(u32, u64, u64, u32)>,
    bool,
    bool,
);

/// The body of a working set of one backend, of which the first `known` pages are known.
fn set_body(id: &str, pages: u64, known: u64) -> Vec<u8> {
    let mut body = Vec::new();
    for number in [MARK, 4, 0] {
        body.extend(number.to_le_bytes());
    }
    for number in [4_u32, 1] {
        body.extend(number.to_le_bytes());
    }
    body.extend(u16::try_from(id.len()).unwrap_or_default().to_le_bytes());
    body.extend(id.as_bytes());
    for number in [pages, known] {
        body.extend(number.to_le_bytes());
    }
    for page in 0..known {
        body.extend(page.to_le_bytes());
        for number in [3_u32, 1, 0] {
            body.extend(number.to_le_bytes());
        }
    }
    body
}

const WITH_NODES: &str = r#"{"format":2,"tool":"pando","created_unix_s":1,"cpus":2,"machine":{"nodes":[{"cpus":[0],
"backend":"a"},{"cpus":[1],"backend":"b"}],"distances":[[10,30],[30,10]],"slots":1,"max_bytes":201326592,
"dimms":[{"id":"d","backend":"c","node":0,"slot":0,"guest_address":4294967296}]},"backends":[{"id":"a","file":"a.mem",
"bytes":67108864,"guest_address":0,"digest":"","seal":{"inode":1,"bytes":67108864,"mtime_s":1,"mtime_ns":1}},
{"id":"b","file":"b.mem","bytes":67108864,"guest_address":67108864,"digest":"","seal":{"inode":1,"bytes":67108864,
"mtime_s":1,"mtime_ns":1}},{"id":"c","file":"c.mem","bytes":67108864,"guest_address":4294967296,"digest":"","seal":{
"inode":1,"bytes":67108864,"mtime_s":1,"mtime_ns":1}}],"state":{"file":"state.bin","digest":"","seal":{"inode":1,
"bytes":1,"mtime_s":1,"mtime_ns":1}},"index":{"file":"pages.idx","digest":"","seal":{"inode":1,"bytes":1,"mtime_s":1,
"mtime_ns":1}},"host":{"cpuid":[[1,0,0,2,3,4,5]],"msrs":[],"tsc_khz":null},"checksum":""}"#;

/// Keys of the manifest.
pub fn words() -> Vec<String> {
    WITH_NODES
        .split('"')
        .filter(|word| {
            word.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
        .filter(|word| !word.is_empty())
        .chain(["PANDOIDX", "PANDOWS", "PANDOST"])
        .map(str::to_owned)
        .collect()
}
