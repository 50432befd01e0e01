#![forbid(unsafe_code)]
//! What a host lacks of what a template's CPUs have.

use std::fmt;

use super::features::{Register, WORDS, Word};
use super::{CpuidEntry, find};

/// First extended state component that has a place of its own; x87 and SSE are always there.
const FIRST_COMPONENT: u32 = 2;

/// Something that a template's CPUs have and a host lacks. `Display` names it as Linux does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissingFeature {
    /// The host's CPUs are another vendor's.
    Vendor {
        /// The template's vendor.
        wanted: String,
        /// The host's.
        host: String,
    },
    /// A feature bit.
    Bit {
        /// Linux's name, where it has one.
        name: Option<&'static str>,
        /// CPUID leaf.
        function: u32,
        /// Its index.
        index: u32,
        /// Output register, in lower case.
        register: &'static str,
        /// Bit in it.
        bit: u32,
    },
    /// An extended state component (XSAVE).
    StateComponent {
        /// Its number: the bit in XCR0.
        number: u32,
        /// Its size and place in the template.
        wanted: ComponentPlace,
        /// Its size and place on the host, if it is there.
        host: Option<ComponentPlace>,
    },
    /// Guest physical addresses are too long for the host.
    PhysicalAddressBits {
        /// The template's.
        wanted: u32,
        /// The host's.
        host: u32,
    },
}

/// Where the XSAVE area has a component, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComponentPlace {
    /// Size.
    pub bytes: u32,
    /// Offset in the standard format.
    pub offset: u32,
}

impl fmt::Display for ComponentPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {}", self.bytes, self.offset)
    }
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { wanted, host } => write!(f, "cpu vendor {wanted} (host has {host})"),
            Self::Bit {
                name,
                function,
                index,
                register,
                bit,
            } => {
                let name = name.unwrap_or("a feature without a name");
                write!(
                    f,
                    "{name} (cpuid {function:x}.{index} {register} bit {bit})"
                )
            }
            Self::StateComponent {
                number,
                wanted,
                host,
            } => {
                write!(f, "xsave component {number} of {wanted} (host has ")?;
                match host {
                    Some(host) => write!(f, "{host})"),
                    None => write!(f, "none)"),
                }
            }
            Self::PhysicalAddressBits { wanted, host } => {
                write!(f, "{wanted} physical address bits (host has {host})")
            }
        }
    }
}

/// What `host` lacks of the features in `wanted`; empty when a machine with `wanted` can run.
///
/// `host` is what [`super::guest_cpuid`] takes: all that the host supports. Leaves that only
/// describe (topology, caches, brand) are not compared.
#[must_use]
pub fn missing_features(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<MissingFeature> {
    let mut missing: Vec<MissingFeature> = vendor(wanted, host).into_iter().collect();
    missing.extend(WORDS.iter().flat_map(|word| bits(word, wanted, host)));
    missing.extend(components(wanted, host));
    missing.extend(address_bits(wanted, host));
    missing
}

fn vendor(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Option<MissingFeature> {
    let (wanted, host) = (vendor_name(wanted)?, vendor_name(host).unwrap_or_default());
    (wanted != host).then_some(MissingFeature::Vendor { wanted, host })
}

fn vendor_name(leaves: &[CpuidEntry]) -> Option<String> {
    let leaf = find(leaves, 0, 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn bits(word: &Word, wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<MissingFeature> {
    let value =
        |leaves| find(leaves, word.function, word.index).map_or(0, |entry| word.register.of(entry));
    let missing = value(wanted) & !value(host) & !word.ignored;
    (0..u32::BITS)
        .filter(|bit| missing >> bit & 1 != 0)
        .map(|bit| MissingFeature::Bit {
            name: word.name(bit),
            function: word.function,
            index: word.index,
            register: word.register.name(),
            bit,
        })
        .collect()
}

fn components(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<MissingFeature> {
    (FIRST_COMPONENT..u64::BITS)
        .filter_map(|number| {
            let wanted = component(wanted, number)?;
            let host = component(host, number);
            (host != Some(wanted)).then_some(MissingFeature::StateComponent {
                number,
                wanted,
                host,
            })
        })
        .collect()
}

/// The place of a component, if the leaves say that there is one.
fn component(leaves: &[CpuidEntry], number: u32) -> Option<ComponentPlace> {
    let leaf = find(leaves, 0xd, 0)?;
    let mask = u64::from(leaf.eax) | u64::from(leaf.edx) << 32;
    if mask >> number & 1 == 0 {
        return None;
    }
    let place = find(leaves, 0xd, number)?;
    Some(ComponentPlace {
        bytes: place.eax,
        offset: place.ebx,
    })
}

fn address_bits(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Option<MissingFeature> {
    let bits =
        |leaves| find(leaves, 0x8000_0008, 0).map_or(0, |entry| Register::Eax.of(entry) & 0xff);
    let (wanted, host) = (bits(wanted), bits(host));
    (wanted > host).then_some(MissingFeature::PhysicalAddressBits { wanted, host })
}
