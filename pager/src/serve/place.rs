#![forbid(unsafe_code)]
//! The real kernel below the install ladder.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use userfaultfd::Uffd;

use crate::fault::Message;
use crate::install::PageOps;
use crate::page::PageRange;
use crate::port::drain;
use crate::region::Pinned;
use crate::sys::userfaultfd::{self as sys, Answer, Tracking};

/// Messages that an install may take off the userfaultfd to get it going again.
const DRAIN_ROOM: usize = 1024;

/// One region of a client, held mapped while something is installed in it.
pub(super) struct Place<'a> {
    pub(super) uffd: &'a Uffd,
    pub(super) memory: &'a Pinned,
    pub(super) pending: &'a mut VecDeque<Message>,
    pub(super) tracking: Tracking,
}

impl PageOps for Place<'_> {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        #[cfg(test)]
        if let Some(answer) = super::tests::planned(self.memory) {
            return answer;
        }
        sys::copy(self.uffd.as_fd(), self.memory, pages, source, self.tracking)
    }

    fn zero(&mut self, pages: PageRange) -> Answer {
        #[cfg(test)]
        if let Some(answer) = super::tests::planned(self.memory) {
            return answer;
        }
        sys::zero(self.uffd.as_fd(), self.memory, pages)
    }

    fn poison(&mut self, pages: PageRange) -> Answer {
        sys::poison(self.uffd.as_fd(), self.memory, pages)
    }

    fn wake(&mut self, pages: PageRange) {
        sys::wake(self.uffd, self.memory, pages);
    }

    fn drain(&mut self) {
        let room = DRAIN_ROOM.saturating_sub(self.pending.len());
        let pending = &mut *self.pending;
        if let Err(error) = drain(self.uffd, room, &mut |message| pending.push_back(message)) {
            tracing::warn!(%error, "cannot read the userfaultfd");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use std::sync::Arc;

    use super::*;
    use crate::install::{Content, Installed, Stopped, install};
    use crate::page::{PageCount, PageIndex};
    use crate::region::Region;
    use crate::sys::mmap::{Addressed, ServedMapping};

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex::new(start), PageCount::new(count))
    }

    /// Eight pages of real memory; `registered` with the userfaultfd or not.
    fn with_memory(registered: bool, test: impl FnOnce(&mut Place<'_>, &ServedMapping)) {
        let uffd = sys::open(Tracking::Off).unwrap().uffd;
        let mapping = Arc::new(ServedMapping::new(8 * 4096).unwrap());
        if registered {
            sys::register(&uffd, &mapping, pages(0, 8), Tracking::Off).unwrap();
        }
        let memory = Region::own(&mapping).pin().unwrap();
        test(
            &mut Place {
                uffd: &uffd,
                memory: &memory,
                pending: &mut VecDeque::new(),
                tracking: Tracking::Off,
            },
            &mapping,
        );
    }

    /// First byte of each page, without a fault: present pages only.
    fn first_bytes(mapping: &Pinned, count: u64) -> Vec<u8> {
        let memory = File::open("/proc/self/mem").unwrap();
        (0..count)
            .map(|page| {
                let mut byte = [0];
                let address = mapping.address_of(pages(page, 1)).unwrap();
                memory.read_exact_at(&mut byte, address).unwrap();
                byte[0]
            })
            .collect()
    }

    #[test]
    fn present_pages_cut_real_installs_short_and_are_passed() {
        with_memory(true, |place, _| {
            let bytes: Vec<u8> = (1..=8u8).flat_map(|page| [page; 4096]).collect();
            assert_eq!(install(place, pages(0, 1), Content::Zero).fresh, 1);
            assert_eq!(install(place, pages(4, 2), Content::Zero).fresh, 2);
            let report = install(place, pages(0, 8), Content::Bytes(&bytes));
            let expected = Installed {
                fresh: 5,
                present: 3,
                // The kernel stopped before page 4, with EAGAIN and a count.
                again: 1,
                ..Installed::default()
            };
            assert_eq!(report, expected);
            assert_eq!(first_bytes(place.memory, 8), [0, 2, 3, 4, 0, 0, 7, 8]);
            // The other contents meet the same ladder.
            assert_eq!(install(place, pages(0, 8), Content::Zero).present, 8);
            assert_eq!(install(place, pages(0, 8), Content::Poison).present, 8);
        });
    }

    #[test]
    fn memory_that_is_not_served_any_more_is_unmapped() {
        with_memory(false, |place, _| {
            for content in [Content::Bytes(&[0; 8192]), Content::Zero, Content::Poison] {
                let report = install(place, pages(0, 2), content);
                assert_eq!((report.done(), report.split), (0, 1));
                assert_eq!(report.stopped, Some(Stopped::Unmapped));
            }
        });
    }

    #[test]
    fn memory_of_several_mappings_is_installed_across_their_borders() {
        let bytes: Vec<u8> = (1..=8u8).flat_map(|page| [page; 4096]).collect();
        for content in [Content::Bytes(&bytes), Content::Zero, Content::Poison] {
            with_memory(true, |place, mapping| {
                mapping.split(pages(2, 3)).unwrap();
                let report = install(place, pages(0, 8), content);
                let expected = Installed {
                    fresh: 8,
                    split: 1,
                    ..Installed::default()
                };
                assert_eq!(report, expected);
                if let Content::Bytes(_) = content {
                    assert_eq!(first_bytes(place.memory, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
                }
            });
        }
    }

    #[test]
    fn pages_outside_the_memory_are_refused_before_the_kernel_sees_them() {
        with_memory(true, |place, _| {
            for content in [Content::Bytes(&[0; 8192]), Content::Zero, Content::Poison] {
                let report = install(place, pages(7, 2), content);
                let refused = Stopped::Refused(rustix::io::Errno::INVAL);
                assert_eq!(report.stopped, Some(refused));
            }
        });
    }
}
