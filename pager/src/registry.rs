#![forbid(unsafe_code)]
//! Which client is served by which shard. Pure.

use std::collections::HashMap;

use crate::client::{ClientId, SpecError};

/// All clients of a shared pager.
#[derive(Debug)]
pub(crate) struct Registry {
    shards: HashMap<ClientId, usize>,
    /// Clients of each shard.
    loads: Vec<usize>,
}

impl Registry {
    /// Of a pager with so many shards.
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            shards: HashMap::new(),
            loads: vec![0; shards],
        }
    }

    /// Takes the id for a client: the shard that was asked for, or that with the fewest clients.
    pub(crate) fn take(&mut self, id: ClientId, shard: Option<usize>) -> Result<usize, SpecError> {
        let shards = self.loads.len();
        if self.shards.contains_key(&id) {
            return Err(SpecError::Duplicate);
        }
        let fewest = || (0..shards).min_by_key(|&shard| self.loads[shard]);
        let shard = shard.or_else(fewest).unwrap_or(0);
        let Some(load) = self.loads.get_mut(shard) else {
            return Err(SpecError::UnknownShard { shard, shards });
        };
        *load += 1;
        self.shards.insert(id, shard);
        Ok(shard)
    }

    /// Frees the id.
    pub(crate) fn free(&mut self, id: ClientId) {
        if let Some(shard) = self.shards.remove(&id) {
            self.loads[shard] -= 1;
        }
    }

    /// Who serves a client.
    pub(crate) fn shard_of(&self, id: ClientId) -> Option<usize> {
        self.shards.get(&id).copied()
    }

    /// How many clients there are.
    pub(crate) fn len(&self) -> usize {
        self.shards.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_spread_and_ids_are_one_of_a_kind() {
        let mut registry = Registry::new(2);
        let id = ClientId::new;
        assert_eq!(registry.take(id(1), None).unwrap(), 0);
        assert_eq!(registry.take(id(2), None).unwrap(), 1);
        assert_eq!(registry.take(id(3), Some(1)).unwrap(), 1);
        assert_eq!(registry.take(id(4), None).unwrap(), 0);
        let again = registry.take(id(3), None).unwrap_err();
        assert!(matches!(again, SpecError::Duplicate));
        let nowhere = registry.take(id(5), Some(2)).unwrap_err();
        assert!(matches!(
            nowhere,
            SpecError::UnknownShard {
                shard: 2,
                shards: 2
            }
        ));
        registry.free(id(1));
        registry.free(id(1));
        assert_eq!(registry.take(id(6), None).unwrap(), 0);
        assert_eq!(
            (registry.shard_of(id(6)), registry.shard_of(id(1))),
            (Some(0), None)
        );
        assert_eq!(registry.len(), 4);
    }
}
