#![forbid(unsafe_code)]
//! `-numa`: nodes and distances, each checked against those before it, as QEMU does.

use crate::qemu::error::{OptionError, expects, missing, not_accepted};
use crate::qemu::words::{Form, Props};
use crate::spec::{DistanceParts, NodeParts};

/// Nodes that QEMU has at most.
const MAX_NODES: u32 = 128;
/// Distance of a node to itself.
const LOCAL_DISTANCE: u32 = 10;

/// What the `-numa` options say together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NumaOptions {
    /// Nodes, each with its number.
    pub nodes: Vec<NodeParts>,
    /// Distances.
    pub distances: Vec<DistanceParts>,
}

impl NumaOptions {
    /// Reads one more `-numa`.
    pub fn read(&mut self, text: &str) -> Result<(), OptionError> {
        let mut props = Props::parse(text, Some("type"), Form::SwitchesOrJson)?;
        match props.required("type")?.as_str() {
            "node" => {
                let node = self.node(&mut props)?;
                props.finish()?;
                self.add_node(node)
            }
            "dist" => {
                let distance = distance(&mut props)?;
                props.finish()?;
                self.add_distance(distance)
            }
            "hmat-lb" | "hmat-cache" => Err(no_hmat()),
            kind @ "cpu" => Err(OptionError::new(format!(
                "-numa {kind} cannot be had: give each node its vCPUs with -numa node,cpus="
            ))),
            other => Err(not_accepted("type", other)),
        }
    }

    fn node(&self, props: &mut Props) -> Result<NodeParts, OptionError> {
        let id = props.number_to("nodeid", u16::MAX.into(), "uint16_t")?;
        let cpus = props.numbers("cpus")?;
        let has_mem = props.size("mem")?.is_some();
        let backend = props.backend("memdev")?;
        if props.has("initiator") {
            return Err(no_hmat());
        }
        let mixes = backend.is_some() || self.nodes.iter().any(|node| node.backend.is_some());
        if has_mem && mixes {
            return Err(OptionError::new(
                "numa configuration should use either mem= or memdev=,mixing both is not allowed",
            ));
        }
        if has_mem {
            return Err(OptionError::new(
                "Parameter -numa node,mem is not supported by this machine type",
            )
            .hint("Use -numa node,memdev instead"));
        }
        let cpus = cpus.into_iter();
        Ok(NodeParts {
            id,
            cpus: cpus
                .map(|cpu| u32::try_from(cpu).unwrap_or(u32::MAX))
                .collect(),
            backend,
        })
    }

    fn add_node(&mut self, mut node: NodeParts) -> Result<(), OptionError> {
        let count = u32::try_from(self.nodes.len()).unwrap_or(MAX_NODES);
        let id = node.id.unwrap_or(count);
        if id >= MAX_NODES {
            return Err(OptionError::new(format!(
                "Max number of NUMA nodes reached: {id}"
            )));
        }
        if self.is_node(id) {
            return Err(OptionError::new(format!("Duplicate NUMA nodeid: {id}")));
        }
        let owner = self.nodes.iter().find(|other| {
            let mut cpus = node.cpus.iter();
            cpus.any(|cpu| other.cpus.contains(cpu))
        });
        if let Some(owner) = owner {
            return Err(OptionError::new(format!(
                "CPU is already assigned to node-id: {}",
                owner.id.unwrap_or_default()
            )));
        }
        node.id = Some(id);
        self.nodes.push(node);
        Ok(())
    }

    fn add_distance(&mut self, new: DistanceParts) -> Result<(), OptionError> {
        let DistanceParts { from, to, distance } = new;
        for (name, node) in [("src", from), ("dst", to)] {
            if node >= MAX_NODES {
                let what = format!("an integer between 0 and {}", MAX_NODES - 1);
                return Err(expects(name, &what));
            }
        }
        if !self.is_node(from) || !self.is_node(to) {
            return Err(OptionError::new(
                "Source/Destination NUMA node is missing. Please use '-numa node' option to declare it first.",
            ));
        }
        if distance < LOCAL_DISTANCE {
            return Err(OptionError::new(format!(
                "NUMA distance ({distance}) is invalid, it shouldn't be less than 10."
            )));
        }
        if from == to && distance != LOCAL_DISTANCE {
            return Err(OptionError::new(format!(
                "Local distance of node {from} should be 10."
            )));
        }
        self.distances.push(new);
        Ok(())
    }

    fn is_node(&self, id: u32) -> bool {
        self.nodes.iter().any(|node| node.id == Some(id))
    }

    /// What can be said when all are there. `is_backend` is whether an id is a memory backend's.
    pub fn check(&self, is_backend: &dyn Fn(&str) -> bool) -> Result<(), OptionError> {
        let mut used: Vec<&str> = Vec::new();
        for node in &self.nodes {
            let Some(id) = node.backend.as_deref() else {
                continue;
            };
            if !is_backend(id) {
                return Err(OptionError::new(format!(
                    "memdev={id} is ambiguous: there is no memory backend '{id}'"
                )));
            }
            if used.contains(&id) {
                return Err(OptionError::new(format!(
                    "memory backend {id} can't be used multiple times."
                )));
            }
            used.push(id);
        }
        let last = self.nodes.iter().filter_map(|node| node.id).max();
        match (0..last.unwrap_or(0)).rev().find(|&id| !self.is_node(id)) {
            Some(id) => Err(OptionError::new(format!("numa: Node ID missing: {id}"))),
            None => Ok(()),
        }
    }

    /// QEMU's warnings of vCPUs that no node names, where some are named. A socket has `cores`.
    pub fn warnings(&self, cpus: u32, cores: u32) -> Vec<String> {
        let named = |cpu: &u32| self.nodes.iter().any(|node| node.cpus.contains(cpu));
        let missing: Vec<String> = (0..cpus)
            .filter(|cpu| !named(cpu))
            .map(|cpu| {
                let (socket, core) = (cpu / cores.max(1), cpu % cores.max(1));
                format!("CPU {cpu} [socket-id: {socket}, core-id: {core}, thread-id: 0]")
            })
            .collect();
        if missing.is_empty() || self.nodes.iter().all(|node| node.cpus.is_empty()) {
            return Vec::new();
        }
        vec![
            format!(
                "warning: CPU(s) not present in any NUMA nodes: {}",
                missing.join(", ")
            ),
            "warning: All CPU(s) up to maxcpus should be described in NUMA config, ability to start up with \
             partial NUMA mappings is obsoleted and will be removed in future"
                .to_owned(),
        ]
    }
}

fn no_hmat() -> OptionError {
    OptionError::new(
        "ACPI Heterogeneous Memory Attribute Table (HMAT) is disabled, enable it with -machine hmat=on before \
         using any of hmat specific options: Pando has no such table, leave them out",
    )
}

fn distance(props: &mut Props) -> Result<DistanceParts, OptionError> {
    let mut number = |name: &str, most: u32, kind: &str| {
        let value = props.number_to(name, most, kind)?;
        value.ok_or_else(|| missing(name))
    };
    Ok(DistanceParts {
        from: number("src", u16::MAX.into(), "uint16_t")?,
        to: number("dst", u16::MAX.into(), "uint16_t")?,
        distance: number("val", u8::MAX.into(), "uint8_t")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Result<NumaOptions, String> {
        let mut options = NumaOptions::default();
        for text in texts {
            options.read(text).map_err(|error| error.to_string())?;
        }
        options
            .check(&|id| id.starts_with('m'))
            .map_err(|error| error.to_string())?;
        Ok(options)
    }

    #[test]
    fn nodes_and_distances_are_read_in_their_order() {
        let two = ["node,cpus=0-1,memdev=m0", "node,memdev=m1"];
        let options = read(&[two[0], two[1], "dist,src=0,dst=1,val=20"]).unwrap();
        assert_eq!(options.nodes[1].id, Some(1));
        assert_eq!(options.nodes[0].cpus, [0, 1]);
        assert_eq!(options.distances.len(), 1);
        assert_eq!(options.warnings(2, 2).len(), 0);
        let warned = options.warnings(3, 1);
        assert!(warned[0].ends_with("CPU 2 [socket-id: 2, core-id: 0, thread-id: 0]"));
    }

    #[test]
    fn what_is_wrong_is_said_as_qemu_says_it() {
        let message = |texts: &[&str]| read(texts).unwrap_err();
        let node = "node,nodeid=0,cpus=0,memdev=m0";
        assert_eq!(message(&[node, node]), "Duplicate NUMA nodeid: 0");
        assert_eq!(
            message(&[node, "node,cpus=0"]),
            "CPU is already assigned to node-id: 0"
        );
        assert_eq!(
            message(&["node,nodeid=3", "node,nodeid=1"]),
            "numa: Node ID missing: 2"
        );
        assert_eq!(
            message(&[node, "node,memdev=m0"]),
            "memory backend m0 can't be used multiple times."
        );
        assert!(message(&["node,memdev=zz"]).starts_with("memdev=zz is ambiguous"));
        assert!(message(&[node, "node,mem=1M"]).contains("mixing both"));
        assert!(message(&["node,mem=32M"]).contains("not supported by this machine"));
        assert!(message(&["dist,src=0,dst=1,val=20"]).contains("declare it first."));
        assert!(message(&[node, "dist,src=0,dst=0,val=9"]).contains("(9) is invalid"));
        assert!(message(&[node, "dist,src=0,dst=0,val=256"]).ends_with("expects uint8_t"));
        assert!(message(&[node, "dist,src=0,dst=128,val=20"]).contains("between 0 and 127"));
        assert!(message(&["node,nodeid=65536"]).ends_with("expects uint16_t"));
        assert!(message(&["node,nodeid=128"]).ends_with("NUMA nodes reached: 128"));
    }
}
