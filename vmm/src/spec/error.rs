#![forbid(unsafe_code)]
//! Why a machine cannot be described this way. Texts contain those of QEMU where it has one.

use thiserror::Error;

use super::mem::MemFault;

use super::backend::BackendError;
use super::device::DeviceFault;
use super::{MAX_BACKENDS, MAX_CPUS, MAX_NODES, MAX_SLOTS, MAX_SYSTEM_TEXT_BYTES, MIN_RAM_BYTES};
use crate::memory::layout::{LayoutError, PAGE_BYTES};

/// Why a machine cannot be described this way.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// A vCPU count outside what a machine can have.
    #[error("a machine has 1 to {MAX_CPUS} vCPUs, not {cpus}")]
    Cpus {
        /// The count asked for.
        cpus: u32,
    },
    /// More texts of the system than SMBIOS has room for.
    #[error(
        "the texts of the system have {bytes} bytes together, the most is {MAX_SYSTEM_TEXT_BYTES}"
    )]
    SystemTexts {
        /// How many bytes with their ends.
        bytes: usize,
    },
    /// A text of the system that SMBIOS cannot hold.
    #[error("the text {text:?} of the system has a zero byte: leave it out")]
    SystemTextZero {
        /// The text.
        text: String,
    },
    /// A backend by itself.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Two backends of one id.
    #[error("memory backend id {id:?} is given twice: ids must differ")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// A backend that does not exist.
    #[error("{user}: Memory backend '{id}' not found")]
    UnknownBackend {
        /// The id.
        id: String,
        /// Who names it.
        user: String,
    },
    /// A backend that nothing uses.
    #[error("memory backend {id:?} is used by nothing: name it as RAM, for a node or for a dimm")]
    UnusedBackend {
        /// The id.
        id: String,
    },
    /// A backend that two want.
    #[error("{user}: can't use already busy memdev: {id}")]
    BusyBackend {
        /// The id.
        id: String,
        /// Who came second.
        user: String,
    },
    /// Main memory that cannot be written.
    #[error(
        "memory backend {id:?} is read-only memory (readonly=on without rom=off), and a guest cannot \
         run on that: add rom=off for a clone of its file, or readonly=off to make a template of it"
    )]
    RomAsRam {
        /// The id.
        id: String,
    },
    /// More backends than a machine can have.
    #[error("a machine has at most {MAX_BACKENDS} memory backends, not {backends}")]
    TooManyBackends {
        /// How many were asked for.
        backends: usize,
    },
    /// Less RAM than a machine needs.
    #[error("{bytes} bytes of RAM are too few: give the machine at least {MIN_RAM_BYTES}")]
    TooSmall {
        /// RAM of all backends together.
        bytes: u64,
    },
    /// The backends cannot be placed in the guest's address map.
    #[error("the memory backends cannot be placed in the guest")]
    Layout(#[from] LayoutError),
    /// Neither a backend for all RAM nor nodes with backends, or both.
    #[error(
        "'-machine memory-backend' and '-numa memdev' properties are mutually exclusive: \
         {id:?} is all RAM, and node {node} has memory of its own"
    )]
    RamTwice {
        /// The backend that is all RAM.
        id: String,
        /// A node with memory.
        node: u32,
    },
    /// RAM of another size than its backend.
    #[error(
        "{asked_bytes} bytes were asked for, backend {id:?} has {bytes}: Machine memory size does not \
         match the size of the memory backend"
    )]
    RamSize {
        /// The backend.
        id: String,
        /// Its size.
        bytes: u64,
        /// What was asked for.
        asked_bytes: u64,
    },
    /// Nodes of another size than all RAM.
    #[error(
        "total memory for NUMA nodes ({nodes_bytes:#x}) should equal RAM size ({asked_bytes:#x})"
    )]
    NodeSizes {
        /// All nodes together.
        nodes_bytes: u64,
        /// What was asked for.
        asked_bytes: u64,
    },
    /// Less at most than at the beginning.
    #[error(
        "invalid value of maxmem: maximum memory size ({max_bytes:#x}) must be at least the initial \
         memory size ({bytes:#x})"
    )]
    MaxBelowRam {
        /// The maximum.
        max_bytes: u64,
        /// RAM without modules.
        bytes: u64,
    },
    /// Slots without room behind them.
    #[error(
        "invalid value of maxmem: memory slots were specified but maximum memory size ({bytes:#x}) is \
         equal to the initial memory size ({bytes:#x})"
    )]
    SlotsWithoutRoom {
        /// RAM without modules.
        bytes: u64,
    },
    /// More slots than a machine can have.
    #[error("unsupported number of memory slots: {slots}, a machine has at most {MAX_SLOTS}")]
    TooManySlots {
        /// The number asked for.
        slots: u32,
    },
    /// More nodes than a machine can have.
    #[error("max number of NUMA nodes reached: a machine has at most {MAX_NODES}, not {nodes}")]
    TooManyNodes {
        /// How many were asked for.
        nodes: u32,
    },
    /// Two nodes of one number.
    #[error("numa: Duplicate NUMA nodeid: {node}")]
    DuplicateNode {
        /// The number.
        node: u32,
    },
    /// Numbers with a gap.
    #[error("numa: Node ID missing: {node}")]
    MissingNode {
        /// The number that no node has.
        node: u32,
    },
    /// A vCPU that does not exist.
    #[error("CPU index ({cpu}) should be smaller than maxcpus ({cpus}): node {node} names it")]
    NodeCpu {
        /// The vCPU.
        cpu: u32,
        /// How many there are.
        cpus: u8,
        /// Which node has it.
        node: u32,
    },
    /// A vCPU in two nodes.
    #[error("CPU {cpu} is in NUMA nodes {first} and {second}: it can be in one")]
    CpuTwice {
        /// The vCPU.
        cpu: u32,
        /// The node that named it first.
        first: u32,
        /// The other.
        second: u32,
    },
    /// A distance of nodes that do not exist.
    #[error(
        "numa: Source/Destination NUMA node is missing: there is no node {node}, please use '-numa node' \
         option to declare it first"
    )]
    DistanceNode {
        /// The node.
        node: u32,
    },
    /// A distance that cannot be.
    #[error(
        "NUMA distance ({distance}) is invalid, it shouldn't be less than 10, nor more than 255: \
         from node {from} to {to}"
    )]
    Distance {
        /// From this node.
        from: u32,
        /// To this one.
        to: u32,
        /// The distance.
        distance: u32,
    },
    /// A node away from itself.
    #[error("numa: Local distance of node {node} should be 10, not {distance}")]
    LocalDistance {
        /// The node.
        node: u32,
        /// The distance.
        distance: u32,
    },
    /// Some distances and not others.
    #[error(
        "numa: The distance between node {from} and {to} is missing, at least one distance value between \
         each nodes should be provided. Give it with dist"
    )]
    MissingDistance {
        /// From this node.
        from: u32,
        /// To this one.
        to: u32,
    },
    /// Some distances differ by direction, some have one direction only.
    #[error(
        "numa: At least one asymmetrical pair of distances is given, please provide distances for both \
         directions of all node pairs: from node {from} to {to} there is none"
    )]
    OneWayDistance {
        /// From this node.
        from: u32,
        /// To this one.
        to: u32,
    },
    /// A device that does not fit the machine.
    #[error("device {id:?}: {reason}")]
    Device {
        /// What it is called.
        id: String,
        /// Why not.
        reason: DeviceFault,
    },
    /// A module that does not fit the machine.
    #[error("dimm {id:?}: {reason}")]
    Dimm {
        /// What it is called.
        id: String,
        /// Why not.
        reason: DimmFault,
    },
}

/// Why a memory module does not fit the machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DimmFault {
    /// Two modules of one id.
    #[error("id: Duplicate device ID '{id}'")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// No such backend.
    #[error("memdev: Device '{backend}' not found")]
    NoBackend {
        /// The id.
        backend: String,
    },
    /// The machine has none.
    #[error("no slots where allocated, please specify the 'slots' option")]
    NoSlots,
    /// All are taken.
    #[error("no free slots available")]
    NoFreeSlot,
    /// It has no such slot.
    #[error("invalid slot number {}, valid range is [0-{last}]", slot.cast_signed())]
    SlotRange {
        /// The slot asked for.
        slot: u32,
        /// The last one.
        last: u32,
    },
    /// Another module is there.
    #[error("slot {slot} is busy")]
    SlotBusy {
        /// The slot asked for.
        slot: u32,
    },
    /// It has no such node.
    #[error(
        "'DIMM property node has value {node}' which exceeds the number of numa nodes: {nodes}"
    )]
    Node {
        /// The node asked for.
        node: u32,
        /// How many there are.
        nodes: usize,
    },
    /// Not a size for memory of its kind.
    #[error("backend memory size must be multiple of {align_bytes:#x}, {bytes:#x} is not")]
    Size {
        /// Its size.
        bytes: u64,
        /// What it must be a multiple of.
        align_bytes: u64,
    },
    /// Not a place for memory.
    #[error("address must be aligned to {align_bytes:#x} bytes, {address:#x} is not")]
    Unaligned {
        /// The address asked for.
        address: u64,
        /// What it must be a multiple of.
        align_bytes: u64,
    },
    /// Outside the room for modules.
    #[error(
        "can't add memory device [{address:#x}:{bytes:#x}], usable range for memory devices \
         [{start:#x}:{room_bytes:#x}]"
    )]
    OutsideRange {
        /// The address asked for.
        address: u64,
        /// The module's size.
        bytes: u64,
        /// Where the room begins.
        start: u64,
        /// Its size.
        room_bytes: u64,
    },
    /// Another module is there.
    #[error("address range conflicts with memory device id='{other}'")]
    Conflict {
        /// The other module.
        other: String,
    },
    /// No room is left.
    #[error(
        "not enough space, currently {used_bytes:#x} in use of total space for memory devices \
         {room_bytes:#x}"
    )]
    NoSpace {
        /// What modules take.
        used_bytes: u64,
        /// What there is for them.
        room_bytes: u64,
    },
}

const _: () = assert!(PAGE_BYTES == 4096, "texts speak of 4 KiB");

impl SpecError {
    /// Why the memory of a device cannot grow and shrink.
    pub(super) fn of_memory(device: &str, fault: MemFault) -> Self {
        let id = match device {
            "" => "virtio-mem",
            device => device,
        };
        Self::Device {
            id: id.to_owned(),
            reason: fault.into(),
        }
    }
}
