#![forbid(unsafe_code)]
//! What CPUID says about the machine's shape: one package, or one for each node, one thread a core, the
//! last level cache shared by all cores of a package. The local APIC id of CPU `n` is `n`, as the ACPI tables say too.

use super::{CpuidEntry, INDEX_MATTERS, find};

/// Leaf 1 EDX: more than one logical CPU in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ECX: the logical CPUs of the package are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Level types of leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// One CPU's place among all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Topology {
    apic_id: u32,
    /// Of one package.
    cpus: u32,
    /// Bits of the APIC id that tell cores apart.
    core_bits: u32,
}

impl Topology {
    /// CPUs whose numbers differ in the lowest `package_bits` bits only are in one package.
    pub(super) fn new(cpu: u8, cpus: u8, package_bits: u32) -> Self {
        let most = 1_u32.checked_shl(package_bits).unwrap_or(u32::MAX);
        let cpus = u32::from(cpus.max(1)).min(most);
        let core_bits = cpus.next_power_of_two().trailing_zeros();
        Self {
            apic_id: u32::from(cpu),
            cpus,
            core_bits,
        }
    }

    /// Puts the topology into the leaves that show it.
    pub(super) fn apply(self, leaves: &mut Vec<CpuidEntry>) {
        let amd = find(leaves, 0, 0).is_some_and(is_amd);
        for entry in leaves.iter_mut() {
            match entry.function {
                0x1 => self.basic(entry),
                0x4 => self.cache(entry, true),
                0x8000_0001 => {
                    entry.ecx &= !CMP_LEGACY;
                    if amd && self.cpus > 1 {
                        entry.ecx |= CMP_LEGACY;
                    }
                }
                // ECX: number of cores less one, and the bits of the APIC id that they take.
                0x8000_0008 if amd => entry.ecx = (self.cpus - 1) | self.core_bits << 12,
                0x8000_001d => self.cache(entry, false),
                // Extended APIC id; core id with one thread a core; the package's one node.
                0x8000_001e => {
                    let core = self.apic_id & (self.id_space() - 1);
                    let node = self.apic_id >> self.core_bits;
                    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (self.apic_id, core, node, 0);
                }
                _ => {}
            }
        }
        if find(leaves, 0, 0).is_some_and(|entry| entry.eax >= 0xb) {
            leaves.extend(self.extended());
        }
    }

    /// How many APIC ids the package takes.
    fn id_space(self) -> u32 {
        1 << self.core_bits
    }

    fn basic(self, entry: &mut CpuidEntry) {
        entry.ebx = (entry.ebx & 0xffff) | self.apic_id << 24 | self.id_space().min(0xff) << 16;
        entry.edx &= !HTT;
        if self.cpus > 1 {
            entry.edx |= HTT;
        }
    }

    /// A cache leaf: levels 1 and 2 are a core's own, level 3 is everybody's. Intel's leaf also
    /// counts the cores of the package.
    fn cache(self, entry: &mut CpuidEntry, counts_cores: bool) {
        let kind = entry.eax & 0x1f;
        if kind == 0 {
            return;
        }
        let level = entry.eax >> 5 & 0x7;
        let sharing = if level >= 3 { self.id_space() - 1 } else { 0 };
        entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        if counts_cores {
            entry.eax |= (self.id_space() - 1).min(0x3f) << 26;
        }
    }

    /// Leaf 0xb: threads of a core (one), cores of the package, end.
    fn extended(self) -> [CpuidEntry; 3] {
        let level = |index, shift, count, kind: u32| CpuidEntry {
            function: 0xb,
            index,
            flags: INDEX_MATTERS,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: self.apic_id,
        };
        [
            level(0, 0, 1, LEVEL_THREAD),
            level(1, self.core_bits, self.cpus, LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

/// Whether the vendor's leaves are AMD's (AMD itself, Hygon).
fn is_amd(leaf_0: &CpuidEntry) -> bool {
    matches!(&leaf_0.ebx.to_le_bytes(), b"Auth" | b"Hygo")
}
