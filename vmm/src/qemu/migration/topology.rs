#![forbid(unsafe_code)]
//! Nodes and memory modules of a state, compared with those of a machine. The guest was told of them
//! when it booted, and is told nothing when it goes on elsewhere.

use super::file::LoadError;
use super::state::{SavedDimm, SavedTopology};
use crate::spec::{Dimm, MachineSpec};

impl SavedTopology {
    /// That of a machine.
    pub fn of(spec: &MachineSpec) -> Self {
        let numa = spec.numa();
        let count = numa.nodes().len();
        let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
        let backend = |at: usize| spec.backends().get(at).map(|backend| backend.id());
        let dimm = |dimm: &Dimm| SavedDimm {
            id: dimm.id().to_owned(),
            backend: backend(dimm.backend()).unwrap_or_default().to_owned(),
            node: dimm.node(),
            slot: dimm.slot(),
            guest_address: dimm.guest_address(),
        };
        Self {
            node_cpus: numa.nodes().iter().map(|n| n.cpus().to_vec()).collect(),
            distances: pairs.map(|(from, to)| numa.distance(from, to)).collect(),
            backend_nodes: (0..spec.backends().len())
                .map(|backend| spec.node_of_backend(backend))
                .collect(),
            slots: spec.slots(),
            max_bytes: spec.max_bytes(),
            dimms: spec.dimms().iter().map(dimm).collect(),
        }
    }
}

fn differ(what: &str, there: &str, here: &str, advice: &str) -> LoadError {
    LoadError::invalid(format!(
        "{what} {there} in the state and {here} here: {advice}"
    ))
}

/// Refuses a state whose memory modules are not those of this machine. Its backends are.
pub fn compare_modules(there: &SavedTopology, here: &SavedTopology) -> Result<(), LoadError> {
    let module = |dimms: &[SavedDimm], backend: &str| {
        dimms.iter().find(|dimm| dimm.backend == backend).cloned()
    };
    for dimm in &there.dimms {
        let backend = &dimm.backend;
        let Some(ours) = module(&here.dimms, backend) else {
            let what = format!("memory backend \"{backend}\" is");
            let (there, here) = (format!("the memory module \"{}\"", dimm.id), "RAM");
            let advice = format!("give it -device pc-dimm,id={},memdev={backend}", dimm.id);
            return Err(differ(&what, &there, here, &advice));
        };
        let (id, backend) = (
            &dimm.id,
            format!("the memory module on backend \"{backend}\""),
        );
        let quoted = |text: &str| format!("\"{text}\"");
        let hex = |address: u64| format!("{address:#x}");
        let facts = [
            ("is called", "id", quoted(id), quoted(&ours.id), id.clone()),
            (
                "is in NUMA node",
                "node",
                dimm.node.to_string(),
                ours.node.to_string(),
                dimm.node.to_string(),
            ),
            (
                "is in slot",
                "slot",
                dimm.slot.to_string(),
                ours.slot.to_string(),
                dimm.slot.to_string(),
            ),
            (
                "is at",
                "addr",
                hex(dimm.guest_address),
                hex(ours.guest_address),
                hex(dimm.guest_address),
            ),
        ];
        for (is, key, there, here, wanted) in facts {
            if there != here {
                let advice = format!("give it -device pc-dimm,{key}={wanted}");
                return Err(differ(&format!("{backend} {is}"), &there, &here, &advice));
            }
        }
    }
    match here
        .dimms
        .iter()
        .find(|dimm| module(&there.dimms, &dimm.backend).is_none())
    {
        Some(more) => Err(differ(
            &format!("memory backend \"{}\" is", more.backend),
            "RAM",
            &format!("the memory module \"{}\"", more.id),
            "leave the -device out",
        )),
        None => Ok(()),
    }
}

/// Refuses a state whose nodes, or whose room for modules, are not those of this machine. `ids` are the
/// backends, which are the same on both sides, in the same order.
pub fn compare_nodes(
    there: &SavedTopology,
    here: &SavedTopology,
    ids: &[&str],
) -> Result<(), LoadError> {
    let (count, ours) = (there.node_cpus.len(), here.node_cpus.len());
    if count == 0 && ours == 1 {
        // A machine with room for modules has a node without being asked; older states of it had none.
        return Ok(());
    }
    if count != ours {
        return Err(differ(
            "the number of NUMA nodes is",
            &count.to_string(),
            &ours.to_string(),
            "give it the same -numa node options",
        ));
    }
    let node_of = |topology: &SavedTopology, cpu: u8| {
        let mut nodes = topology.node_cpus.iter();
        nodes.position(|cpus| cpus.contains(&cpu)).unwrap_or(0)
    };
    for cpu in there.node_cpus.iter().flatten().copied() {
        let (node, ours) = (node_of(there, cpu), node_of(here, cpu));
        if node != ours {
            return Err(differ(
                &format!("vCPU {cpu} is in NUMA node"),
                &node.to_string(),
                &ours.to_string(),
                &format!("give it -numa node,nodeid={node},cpus={cpu}"),
            ));
        }
    }
    let nodes = there.backend_nodes.iter().zip(&here.backend_nodes);
    for (id, (node, ours)) in ids.iter().zip(nodes) {
        if node != ours {
            return Err(differ(
                &format!("memory backend \"{id}\" is in NUMA node"),
                &node.to_string(),
                &ours.to_string(),
                &format!("give it -numa node,nodeid={node},memdev={id}"),
            ));
        }
    }
    let distances = there.distances.iter().zip(&here.distances).enumerate();
    for (at, (distance, ours)) in distances {
        let (from, to) = (at / count.max(1), at % count.max(1));
        if distance != ours {
            return Err(differ(
                &format!("the distance from NUMA node {from} to {to} is"),
                &distance.to_string(),
                &ours.to_string(),
                &format!("give it -numa dist,src={from},dst={to},val={distance}"),
            ));
        }
    }
    if there.slots != here.slots {
        return Err(differ(
            "the number of slots for memory modules is",
            &there.slots.to_string(),
            &here.slots.to_string(),
            &format!("give it -m slots={}", there.slots),
        ));
    }
    if there.max_bytes != here.max_bytes {
        return Err(differ(
            "the most memory (maxmem) is",
            &there.max_bytes.to_string(),
            &here.max_bytes.to_string(),
            &format!("give it -m maxmem={}B", there.max_bytes),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology() -> SavedTopology {
        SavedTopology {
            node_cpus: vec![vec![0], vec![1]],
            distances: vec![10, 20, 20, 10],
            backend_nodes: vec![0, 1, 1],
            slots: 2,
            max_bytes: 1 << 30,
            dimms: vec![SavedDimm {
                id: "dimm0".into(),
                backend: "m2".into(),
                node: 1,
                slot: 0,
                guest_address: 4 << 30,
            }],
        }
    }

    /// What is said when the machine is changed in this way.
    fn refused(change: impl Fn(&mut SavedTopology)) -> String {
        let mut here = topology();
        change(&mut here);
        let ids = ["m0", "m1", "m2"];
        let result = compare_modules(&topology(), &here)
            .and_then(|()| compare_nodes(&topology(), &here, &ids));
        result.unwrap_err().lines.remove(0)
    }

    #[test]
    fn every_difference_is_named_with_both_values() {
        let same = compare_nodes(&topology(), &topology(), &["m0", "m1", "m2"]);
        assert_eq!(same, Ok(()));
        for (said, text) in [
            (
                refused(|here| here.dimms[0].id = "d".into()),
                "the memory module on backend \"m2\" is called \"dimm0\" in the state and \"d\" here: give it \
                 -device pc-dimm,id=dimm0",
            ),
            (
                refused(|here| here.dimms[0].node = 0),
                "the memory module on backend \"m2\" is in NUMA node 1 in the state and 0 here",
            ),
            (
                refused(|here| here.dimms[0].slot = 1),
                "the memory module on backend \"m2\" is in slot 0 in the state and 1 here",
            ),
            (
                refused(|here| here.dimms[0].guest_address = 5 << 30),
                "the memory module on backend \"m2\" is at 0x100000000 in the state and 0x140000000 here: give it \
                 -device pc-dimm,addr=0x100000000",
            ),
            (
                refused(|here| here.dimms.clear()),
                "memory backend \"m2\" is the memory module \"dimm0\" in the state and RAM here",
            ),
            (
                refused(|here| here.node_cpus.truncate(1)),
                "the number of NUMA nodes is 2 in the state and 1 here",
            ),
            (
                refused(|here| here.node_cpus = vec![vec![0, 1], vec![]]),
                "vCPU 1 is in NUMA node 1 in the state and 0 here: give it -numa node,nodeid=1,cpus=1",
            ),
            (
                refused(|here| here.backend_nodes[1] = 0),
                "memory backend \"m1\" is in NUMA node 1 in the state and 0 here",
            ),
            (
                refused(|here| here.distances[2] = 31),
                "the distance from NUMA node 1 to 0 is 20 in the state and 31 here",
            ),
            (
                refused(|here| here.slots = 3),
                "the number of slots for memory modules is 2 in the state and 3 here",
            ),
            (
                refused(|here| here.max_bytes = 2 << 30),
                "the most memory (maxmem) is 1073741824 in the state and 2147483648 here",
            ),
        ] {
            assert!(said.starts_with(text), "{said}");
        }
        let mut more = topology();
        more.dimms[0].backend = "m1".into();
        more.dimms.push(topology().dimms.remove(0));
        let error = compare_modules(&topology(), &more).unwrap_err();
        assert!(error.lines[0].starts_with("memory backend \"m1\" is RAM in the state"));
    }
}
