#![forbid(unsafe_code)]
//! The order in which QEMU lists its objects: it keeps them in a hash table of GLib, and shows what it
//! finds there from the last place to the first. Programs compare such lists as they are.

/// Sizes and the primes below them, of tables of 8 places and more.
const PRIMES: [usize; 8] = [7, 13, 31, 61, 127, 251, 509, 1021];

/// Positions of `ids`, given in the order in which they were made, in the order in which QEMU lists them.
pub(super) fn listed(ids: &[&str]) -> Vec<usize> {
    let mut table: Vec<Option<usize>> = vec![None; 8];
    for made in 0..ids.len() {
        put(&mut table, ids, made);
        let count = made + 1;
        if table.len() <= count + count / 16 {
            let wanted = count * 1333 / 1000;
            let places = (wanted + 1).next_power_of_two().max(8);
            let old = std::mem::replace(&mut table, vec![None; places]);
            for position in old.into_iter().flatten() {
                put(&mut table, ids, position);
            }
        }
    }
    table.into_iter().rev().flatten().collect()
}

fn put(table: &mut [Option<usize>], ids: &[&str], position: usize) {
    let prime = PRIMES
        .iter()
        .rev()
        .find(|&&prime| prime < table.len())
        .copied()
        .unwrap_or(7);
    let hash = ids.get(position).map_or(0, |id| hash(id));
    let mut at = usize::try_from(hash.wrapping_mul(11)).unwrap_or(0) % prime;
    for step in 1..=table.len() {
        match table.get_mut(at) {
            Some(free @ None) => {
                *free = Some(position);
                return;
            }
            _ => at = (at + step) % table.len(),
        }
    }
}

/// GLib's hash of a text.
fn hash(text: &str) -> u32 {
    let hash = text.bytes().fold(5381_u32, |hash, byte| {
        // Bytes have a sign there.
        hash.wrapping_mul(33)
            .wrapping_add_signed(i32::from(byte.cast_signed()))
    });
    hash.max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_as_qemu_showed_them() {
        let shown = |ids: &[&str]| -> String {
            let order = listed(ids);
            let names: Vec<&str> = order.iter().map(|&at| ids[at]).collect();
            names.join(" ")
        };
        assert_eq!(shown(&["m0", "m1"]), "m1 m0");
        assert_eq!(shown(&["m1", "m0"]), "m1 m0");
        assert_eq!(shown(&["b", "a"]), "a b");
        assert_eq!(shown(&["d0", "pc.ram"]), "d0 pc.ram");
        assert_eq!(shown(&["m2", "m0", "m1"]), "m1 m2 m0");
        assert_eq!(shown(&["pc.ram", "d0", "d1"]), "d0 d1 pc.ram");
        assert_eq!(
            shown(&["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8"]),
            "n5 n6 n0 n7 n1 n8 n2 n3 n4"
        );
    }
}
