#![forbid(unsafe_code)]
//! NUMA nodes: which vCPUs and which memory belong together, and how far they are from each other.

use super::error::SpecError;
use super::parts::{DistanceParts, NodeParts};
use super::{CpuCount, MAX_NODES};

/// Distance of a node to itself.
pub const LOCAL_DISTANCE: u8 = 10;
/// Distance of two nodes of which nothing was said.
pub const REMOTE_DISTANCE: u8 = 20;
/// Greatest distance: out of reach.
const MAX_DISTANCE: u32 = 255;

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub(super) cpus: Vec<u8>,
    pub(super) backend: Option<usize>,
}

impl Node {
    /// Its vCPUs, lowest number first.
    pub fn cpus(&self) -> &[u8] {
        &self.cpus
    }

    /// Its memory, as a position among the machine's backends. The one node of a machine without nodes
    /// has none of its own: all RAM is its.
    pub fn backend(&self) -> Option<usize> {
        self.backend
    }
}

/// All nodes of a machine, node `n` at position `n`; empty where none is described to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Numa {
    nodes: Vec<Node>,
    /// Row by row.
    distances: Vec<u8>,
    was_asked_for: bool,
}

impl Numa {
    /// The node that a machine with memory modules has without being asked for one: module addresses
    /// are described by the table of nodes.
    pub(super) fn implicit(cpus: CpuCount) -> Self {
        Self {
            nodes: vec![Node {
                cpus: (0..cpus.get()).collect(),
                backend: None,
            }],
            distances: vec![LOCAL_DISTANCE],
            was_asked_for: false,
        }
    }

    /// Checks nodes and distances; `backend` finds the position of a node's memory by node and id.
    pub(super) fn new(
        cpus: CpuCount,
        parts: &[NodeParts],
        distances: &[DistanceParts],
        backend: &mut dyn FnMut(u32, &str) -> Result<usize, SpecError>,
    ) -> Result<Self, SpecError> {
        let mut ordered = number(parts)?;
        ordered.sort_by_key(|(id, _)| *id);
        if let Some((missing, _)) = (0..).zip(&ordered).find(|(at, (id, _))| at != id) {
            return Err(SpecError::MissingNode { node: missing });
        }
        let mut owner: Vec<Option<u32>> = vec![None; usize::from(cpus.get())];
        for &(node, part) in &ordered {
            for &cpu in &part.cpus {
                let place = usize::try_from(cpu).ok().and_then(|at| owner.get_mut(at));
                match place {
                    None => {
                        let cpus = cpus.get();
                        return Err(SpecError::NodeCpu { cpu, cpus, node });
                    }
                    Some(Some(first)) => {
                        return Err(SpecError::CpuTwice {
                            cpu,
                            first: *first,
                            second: node,
                        });
                    }
                    Some(free) => *free = Some(node),
                }
            }
        }
        let mut nodes = Vec::new();
        for &(node, part) in &ordered {
            let mine = |(cpu, owner): (u8, &Option<u32>)| {
                (owner.unwrap_or_default() == node).then_some(cpu)
            };
            nodes.push(Node {
                cpus: (0..).zip(&owner).filter_map(mine).collect(),
                backend: match &part.backend {
                    Some(id) => Some(backend(node, id)?),
                    None => None,
                },
            });
        }
        let distances = matrix(nodes.len(), distances)?;
        Ok(Self {
            nodes,
            distances,
            was_asked_for: true,
        })
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether the nodes were asked for. One that a machine has for its modules was not.
    pub fn was_asked_for(&self) -> bool {
        self.was_asked_for
    }

    /// How far node `to` is from node `from`; out of reach where there is no such node.
    pub fn distance(&self, from: usize, to: usize) -> u8 {
        let count = self.nodes.len();
        let inside = from < count && to < count;
        let at = inside.then(|| from * count + to);
        at.and_then(|at| self.distances.get(at))
            .copied()
            .unwrap_or(u8::MAX)
    }

    /// The greatest `n` such that vCPUs whose numbers differ in the lowest `n` bits only are always of one
    /// node.
    pub fn package_bits(&self, cpus: CpuCount) -> u32 {
        let is_one = |bits: u32| {
            (0..cpus.get()).all(|cpu| self.node_of(cpu) == self.node_of(cpu >> bits << bits))
        };
        let all = u8::BITS - 1;
        (0..=all).rev().find(|&bits| is_one(bits)).unwrap_or(0)
    }

    /// The node of a vCPU; 0 where there are no nodes.
    pub fn node_of(&self, cpu: u8) -> u32 {
        (0..)
            .zip(&self.nodes)
            .find_map(|(id, node)| node.cpus.contains(&cpu).then_some(id))
            .unwrap_or(0)
    }
}

/// Gives every node its number.
fn number(parts: &[NodeParts]) -> Result<Vec<(u32, &NodeParts)>, SpecError> {
    let mut numbered: Vec<(u32, &NodeParts)> = Vec::new();
    for part in parts {
        let is_free = |id: &u32| !numbered.iter().any(|(used, _)| used == id);
        let id = match part.id {
            Some(id) if !is_free(&id) => return Err(SpecError::DuplicateNode { node: id }),
            Some(id) => id,
            None => (0..=MAX_NODES).find(is_free).unwrap_or(MAX_NODES),
        };
        if id >= MAX_NODES {
            return Err(SpecError::TooManyNodes {
                nodes: id.saturating_add(1),
            });
        }
        numbered.push((id, part));
    }
    Ok(numbered)
}

/// The matrix of distances, row by row. One direction of a pair stands for both, where no pair differs
/// by direction.
fn matrix(count: usize, given: &[DistanceParts]) -> Result<Vec<u8>, SpecError> {
    let mut known: Vec<Option<u8>> = vec![None; count * count];
    for &DistanceParts { from, to, distance } in given {
        let place = |node: u32| {
            usize::try_from(node)
                .ok()
                .filter(|&at| at < count)
                .ok_or(SpecError::DistanceNode { node })
        };
        let at = place(from)? * count + place(to)?;
        if distance < u32::from(LOCAL_DISTANCE) || distance > MAX_DISTANCE {
            return Err(SpecError::Distance { from, to, distance });
        }
        if from == to && distance != u32::from(LOCAL_DISTANCE) {
            let node = from;
            return Err(SpecError::LocalDistance { node, distance });
        }
        known[at] = u8::try_from(distance).ok();
    }
    let pairs = || (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
    let number = |node: usize| u32::try_from(node).unwrap_or(u32::MAX);
    let between = |from: usize, to: usize| (known[from * count + to], known[to * count + from]);
    let differs =
        pairs().any(|(from, to)| matches!(between(from, to), (Some(a), Some(b)) if a != b));
    let says_something = known.iter().any(Option::is_some);
    let mut all = Vec::with_capacity(count * count);
    for (from, to) in pairs() {
        let (from_id, to_id) = (number(from), number(to));
        all.push(match between(from, to) {
            (Some(distance), _) => distance,
            _ if from == to => LOCAL_DISTANCE,
            (None, Some(_)) if differs => {
                let (from, to) = (from_id, to_id);
                return Err(SpecError::OneWayDistance { from, to });
            }
            (None, Some(back)) => back,
            (None, None) if says_something => {
                let (from, to) = (from_id, to_id);
                return Err(SpecError::MissingDistance { from, to });
            }
            (None, None) => REMOTE_DISTANCE,
        });
    }
    Ok(all)
}
