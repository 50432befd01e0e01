#![forbid(unsafe_code)]

use super::*;
use crate::page::PageIndex;
use proptest::prelude::*;

/// A kernel that follows a script, and a memory that it fills.
struct Script {
    answers: Vec<Answer>,
    pages: Vec<Option<u8>>,
    woken: Vec<u64>,
    drained: u32,
    calls: u32,
}

impl Script {
    fn new(answers: &[Answer]) -> Self {
        Self {
            answers: answers.iter().rev().copied().collect(),
            pages: vec![None; 16],
            woken: Vec::new(),
            drained: 0,
            calls: 0,
        }
    }

    fn fill(&mut self, pages: PageRange, source: Option<&[u8]>) -> Answer {
        self.calls += 1;
        let answer = self.answers.pop().unwrap_or(DONE);
        let bytes = u64::try_from(answer.done_bytes)
            .unwrap_or(0)
            .min(pages.bytes());
        for (at, page) in pages
            .iter()
            .take(usize::try_from(bytes / PAGE_BYTES).unwrap())
            .enumerate()
        {
            let value = source.map_or(0, |source| source[at * 4096]);
            self.pages[usize::try_from(page.get()).unwrap()] = Some(value);
        }
        answer
    }
}

impl PageOps for Script {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        assert_eq!(source.len() as u64, pages.bytes());
        self.fill(pages, Some(source))
    }
    fn zero(&mut self, pages: PageRange) -> Answer {
        self.fill(pages, None)
    }
    fn poison(&mut self, pages: PageRange) -> Answer {
        self.fill(pages, None)
    }
    fn wake(&mut self, pages: PageRange) {
        self.woken.extend(pages.iter().map(PageIndex::get));
    }
    fn drain(&mut self) {
        self.drained += 1;
    }
}

/// The kernel does everything asked for.
const DONE: Answer = Answer {
    done_bytes: i64::MAX,
    errno: None,
};

fn short(pages: i64) -> Answer {
    Answer {
        done_bytes: pages * 4096,
        errno: Some(Errno::AGAIN),
    }
}

fn error(errno: Errno) -> Answer {
    Answer {
        done_bytes: -i64::from(errno.raw_os_error()),
        errno: Some(errno),
    }
}

fn four() -> PageRange {
    PageRange::new(PageIndex::new(2), PageCount::new(4))
}

fn bytes() -> Vec<u8> {
    (0..4u8).flat_map(|page| vec![page + 1; 4096]).collect()
}

fn run(answers: &[Answer]) -> (Installed, Script) {
    let mut script = Script::new(answers);
    let report = install(&mut script, four(), Content::Bytes(&bytes()));
    (report, script)
}

#[test]
fn everything_at_once() {
    let (report, script) = run(&[]);
    assert_eq!((report.fresh, report.stopped, script.calls), (4, None, 1));
    assert_eq!(script.pages[2..6], [Some(1), Some(2), Some(3), Some(4)]);
}

#[test]
fn a_short_copy_goes_on_behind_its_prefix() {
    let (report, script) = run(&[short(1), short(2)]);
    assert_eq!((report.fresh, report.again, script.calls), (4, 2, 3));
    assert_eq!(script.pages[2..6], [Some(1), Some(2), Some(3), Some(4)]);
    assert_eq!(script.drained, 0);
}

#[test]
fn a_present_page_is_woken_and_passed() {
    let (report, script) = run(&[error(Errno::EXIST), short(1), error(Errno::EXIST)]);
    assert_eq!((report.fresh, report.present), (2, 2));
    assert_eq!(script.woken, [2, 4]);
    assert_eq!(script.pages[2..6], [None, Some(2), None, Some(4)]);
}

#[test]
fn both_kinds_of_eagain_drain_and_try_again() {
    let untouched = Answer {
        done_bytes: 0,
        errno: Some(Errno::AGAIN),
    };
    let (report, script) = run(&[error(Errno::AGAIN), untouched]);
    assert_eq!((report.fresh, report.again, script.drained), (4, 2, 2));
}

#[test]
fn nothing_is_tried_for_ever() {
    let (report, script) = run(&[error(Errno::AGAIN); 200]);
    assert_eq!(report.stopped, Some(Stopped::Changing));
    assert_eq!(script.calls, AGAIN_LIMIT + 1);
    let (report, script) = run(&[error(Errno::NOMEM); 200]);
    assert_eq!(report.stopped, Some(Stopped::NoMemory));
    assert_eq!(script.calls, NO_MEMORY_LIMIT + 1);
    let nothing = Answer {
        done_bytes: 0,
        errno: None,
    };
    let (report, _) = run(&[nothing; 200]);
    assert_eq!(report.stopped, Some(Stopped::Changing));
}

#[test]
fn what_is_gone_is_dropped_and_what_is_wrong_is_said() {
    let (report, _) = run(&[short(1), error(Errno::SRCH)]);
    assert_eq!((report.fresh, report.stopped), (1, Some(Stopped::Gone)));
    for errno in [Errno::FAULT, Errno::INVAL] {
        let (report, _) = run(&[error(errno)]);
        assert_eq!(report.stopped, Some(Stopped::Refused(errno)));
    }
}

#[test]
fn a_border_between_mappings_is_crossed_page_by_page() {
    let (report, script) = run(&[error(Errno::NOENT)]);
    assert_eq!((report.fresh, report.split, report.stopped), (4, 1, None));
    assert_eq!(script.calls, 5);
    assert_eq!(script.pages[2..6], [Some(1), Some(2), Some(3), Some(4)]);
    // The other rungs hold on the way.
    let (report, script) = run(&[
        short(1),
        error(Errno::NOENT),
        error(Errno::EXIST),
        error(Errno::NOMEM),
    ]);
    assert_eq!((report.fresh, report.present), (3, 1));
    assert_eq!((report.split, report.no_memory), (1, 1));
    assert_eq!((script.woken, report.stopped), (vec![3], None));
}

#[test]
fn a_page_of_no_mapping_ends_the_install_there() {
    let none = error(Errno::NOENT);
    let (report, script) = run(&[none, short(1), none]);
    assert_eq!((report.fresh, report.stopped), (1, Some(Stopped::Unmapped)));
    assert_eq!((report.split, script.calls), (1, 3));
    let mut script = Script::new(&[none]);
    let one = PageRange::single(PageIndex::new(2));
    let report = install(&mut script, one, Content::Zero);
    assert_eq!((report.split, report.stopped), (0, Some(Stopped::Unmapped)));
}

proptest! {
    /// Whatever the kernel answers, the ladder ends, never claims a page that is not there, and
    /// wakes every page that it passed.
    #[test]
    fn any_answers_end(
        answers in prop::collection::vec(
            (prop_oneof![Just(0i64), -200_000..200_000i64], prop::option::of(prop::sample::select(
                &[Errno::AGAIN, Errno::EXIST, Errno::NOMEM, Errno::NOENT, Errno::SRCH, Errno::FAULT][..]
            ))),
            0..40,
        ),
    ) {
        let answers: Vec<Answer> = answers
            .into_iter()
            .map(|(done_bytes, errno)| Answer { done_bytes, errno })
            .collect();
        let (report, script) = run(&answers);
        prop_assert!(report.done() <= 4);
        prop_assert_eq!(report.stopped.is_none(), report.done() == 4);
        for (page, at) in (2..).zip(0..report.done()) {
            let filled = script.pages[page] == Some(u8::try_from(at + 1).unwrap());
            prop_assert!(filled || script.woken.contains(&(page as u64)));
        }
    }
}
