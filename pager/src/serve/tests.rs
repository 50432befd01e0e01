#![forbid(unsafe_code)]
//! The loop when the kernel refuses installs for a while: real memory, planned refusals.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use crate::counts::Counts;
use crate::health::{PoisonReason, PoisonedPage};
use crate::image::{BackendIndex, Image};
use crate::page::{PageIndex, PageRange};
use crate::region::Pinned;
use crate::sys::mmap::Addressed;
use crate::sys::userfaultfd::Answer;
use crate::{IoMode, Pager, PagerOptions};

/// By address of the memory: how many of its next installs are refused, and how.
static PLANS: Mutex<Option<HashMap<u64, (Errno, u32)>>> = Mutex::new(None);

/// The refusal of an install in `mapping`, if one is planned.
pub(super) fn planned(memory: &Pinned) -> Option<Answer> {
    let address = memory.address_of(PageRange::single(memory.pages().start()))?;
    let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    let (errno, left) = plans.as_mut()?.get_mut(&address)?;
    *left = left.checked_sub(1)?;
    Some(Answer {
        done_bytes: -i64::from(errno.raw_os_error()),
        errno: Some(*errno),
    })
}

/// Eight pages, of which four have data; the first `refusals` installs are refused. What touching
/// `page` gives, what was counted, and what was poisoned.
fn touch(
    page: u64,
    refusals: (Errno, u32),
    fault_deadline: Duration,
) -> (std::io::Result<u8>, Counts, Vec<PoisonedPage>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8 * 4096).unwrap();
    file.as_file().write_all_at(&[7; 4 * 4096], 0).unwrap();
    let index = BackendIndex::scan(file.as_file(), 8 * 4096, &mut |_, _| ()).unwrap();
    let image = Image::open(file.path(), "ram", index).unwrap();
    let mut pager = Pager::new(PagerOptions {
        io: IoMode::Auto,
        fault_deadline,
        ..PagerOptions::default()
    })
    .unwrap();
    let memory = pager.attach(image).unwrap();
    let address = memory.host_address().addr() as u64;
    let plan = |plan: Option<(Errno, u32)>| {
        let mut plans = PLANS.lock().unwrap();
        let plans = plans.get_or_insert_default();
        match plan {
            Some(plan) => _ = plans.insert(address, plan),
            None => _ = plans.remove(&address),
        }
    };
    plan(Some(refusals));
    let pager = pager.serve().unwrap();
    let byte = memory.mapping().touch(PageIndex::new(page));
    // Before the memory, whose address another test may get.
    plan(None);
    let poisoned = pager.health().poisoned();
    (byte, pager.stop().unwrap(), poisoned)
}

const DATA: u64 = 2;
const HOLE: u64 = 6;
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_shortage_that_passes_costs_a_pause_and_no_page() {
    for (page, content) in [(DATA, 7), (HOLE, 0)] {
        // Far more often than one install repeats its calls: the fault goes back to the queue.
        let (byte, counts, poisoned) = touch(page, (Errno::NOMEM, 40), LONG);
        assert_eq!((byte.unwrap(), poisoned), (content, Vec::new()));
        assert_eq!((counts.poisoned, counts.retries), (0, 40));
        let (byte, counts, _) = touch(page, (Errno::AGAIN, 200), LONG);
        assert_eq!(byte.unwrap(), content);
        assert_eq!((counts.poisoned, counts.retries), (0, 200));
    }
}

#[test]
fn a_shortage_that_stays_is_ended_by_the_deadline_and_named() {
    let again = PoisonReason::Install {
        errno: libc::EAGAIN,
    };
    for (errno, reason) in [
        (Errno::NOMEM, PoisonReason::NoMemory),
        (Errno::AGAIN, again),
    ] {
        for page in [DATA, HOLE] {
            let limit = Duration::from_millis(100);
            let (byte, counts, poisoned) = touch(page, (errno, u32::MAX), limit);
            assert_eq!(byte.unwrap_err().raw_os_error(), Some(libc::EFAULT));
            assert_eq!((counts.poisoned, poisoned.len()), (1, 1));
            assert_eq!((poisoned[0].page.get(), poisoned[0].reason), (page, reason));
            // Pauses, or there would be thousands.
            assert!(counts.retries < 1000, "{counts:?}");
        }
    }
}
