#![forbid(unsafe_code)]
//! Kernel structures as bytes and back, with the length checked.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::KvmError;

/// The bytes of a kernel structure.
pub(super) fn to_bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// A kernel structure from bytes that may come from anywhere: only the length is checked here; KVM
/// checks the content when it is set.
pub(super) fn from_bytes<T: FromBytes>(what: &'static str, bytes: &[u8]) -> Result<T, KvmError> {
    T::read_from_bytes(bytes).map_err(|_| KvmError::BadLength {
        what,
        expected: size_of::<T>(),
        actual: bytes.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_regs;

    #[test]
    fn bytes_of_another_length_are_refused_by_number() {
        let regs = kvm_regs {
            rip: 0xfff0,
            ..Default::default()
        };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>("registers", &bytes).unwrap(), regs);
        for length in [0, 1, bytes.len() - 1] {
            let error = from_bytes::<kvm_regs>("registers", &bytes[..length]).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("has {length} bytes where 144 are")),
                "{error}"
            );
        }
    }
}
