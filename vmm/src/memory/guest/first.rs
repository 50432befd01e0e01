#![forbid(unsafe_code)]
//! Backends as they are counted by whoever met them when the machine began, such as a pager its images: modules
//! that come and go later change their places in the machine, and not this.

use std::sync::{Arc, Weak};

use super::{GuestRam, RamBacking, View};
use crate::observe::memory::ram::MemoryPlace;

impl GuestRam {
    /// The backends that it began with; `None` for what has gone since. Whoever holds them keeps them mapped.
    pub fn first_backings(&self) -> Vec<Option<Arc<RamBacking>>> {
        let view = self.view();
        let first = self.first.iter().map(Weak::upgrade);
        let is_there = |backing: &Arc<RamBacking>| view.position_of(backing).is_some();
        first.map(|backing| backing.filter(is_there)).collect()
    }

    /// Where the backends that it began with lie in this process; no bytes of what has gone since.
    pub fn places(&self) -> Vec<MemoryPlace> {
        let first = self.first_backings();
        first
            .iter()
            .map(|backing| place(backing.as_deref()))
            .collect()
    }
}

impl View {
    /// The place among the machine's backends that this one has now.
    pub fn position_of(&self, backing: &Arc<RamBacking>) -> Option<usize> {
        let mut all = self.backings.iter();
        all.position(|other| Arc::ptr_eq(other, backing))
    }
}

/// Where a backend lies in this process; no bytes where there is none.
pub fn place(backing: Option<&RamBacking>) -> MemoryPlace {
    MemoryPlace {
        address: backing.map_or(0, |backing| backing.host_address() as u64),
        bytes: backing.map_or(0, RamBacking::bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{Placed, RamLayout};

    const BYTES: u64 = 1 << 20;

    #[test]
    fn backends_keep_their_numbers_when_others_come_and_go() {
        let base = 4 << 30;
        let at = |number: u64| Placed {
            guest_address: base + number * BYTES,
            bytes: BYTES,
        };
        let layout = RamLayout::new(&[BYTES]).unwrap();
        let all = layout.clone().with_modules(&[at(0), at(1)]).unwrap();
        let backing = || RamBacking::anonymous(BYTES).unwrap();
        let ram = GuestRam::new(all, vec![backing(), backing(), backing()]).unwrap();
        let before = ram.places();
        let view = ram.view();
        let kept = [0, 2].map(|at| Arc::clone(&view.backings()[at]));
        // Another comes where one has gone.
        let next = [
            Arc::clone(&kept[0]),
            Arc::clone(&kept[1]),
            Arc::new(backing()),
        ];
        let layout = layout.with_modules(&[at(1), at(5)]).unwrap();
        ram.show(Arc::new(
            View::new(layout, next.to_vec(), Some(view.slots())).unwrap(),
        ));
        let now = ram.places();
        assert_eq!((now[0], now[2]), (before[0], before[2]));
        assert_eq!((now.len(), now[1].bytes), (3, 0));
        assert_eq!(ram.view().position_of(&kept[1]), Some(1));
        // Whoever has the view of before still has what has gone, which is not shown all the same.
        assert!(ram.first_backings()[1].is_none());
        drop(view);
        assert!(ram.first_backings()[1].is_none());
    }
}
