#![expect(
    clippy::unwrap_used,
    reason = "a failure anywhere in a test is a failure of the test"
)]
//! Memory that goes back to the host and comes again: real userfaultfd, a pager of the test's own, and a
//! model of what every page must hold.

mod pager;
mod sys;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use pando_vmm::clone::give_back::{GiveBack, GiveBackError, Given, GivenRun, Subject, require};
use pando_vmm::observe::memory::ram::{Accuracy, MemoryPlace, RamMemory};
use pando_vmm::sys::pagemap::Pagemap;
use proptest::prelude::*;

use pager::{TestPager, template};
use sys::{PAGE, Served};

const PAGES: usize = 256;

/// What each page must hold. Whoever has it locked is the only one who touches the memory.
struct Model {
    memory: Arc<Served>,
    words: Vec<u64>,
}

impl Model {
    fn read(&self, page: usize) {
        assert_eq!(self.memory.load(page), self.words[page], "page {page}");
    }

    fn write(&mut self, page: usize) {
        self.words[page] += 1 << 32;
        self.memory.store(page, self.words[page]);
    }

    fn is_written(&self, page: usize) -> bool {
        self.words[page] != template(page)
    }
}

struct Clone<'a> {
    memory: Arc<Served>,
    pager: &'a TestPager,
    model: &'a Mutex<Model>,
    paused: Option<MutexGuard<'a, Model>>,
    answers: bool,
}

impl<'a> Clone<'a> {
    fn new(memory: &Arc<Served>, pager: &'a TestPager, model: &'a Mutex<Model>) -> Self {
        Self {
            memory: Arc::clone(memory),
            pager,
            model,
            paused: None,
            answers: true,
        }
    }
}

impl Subject for Clone<'_> {
    fn places(&self) -> Vec<MemoryPlace> {
        vec![place(&self.memory)]
    }

    fn pause(&mut self) -> Result<(), GiveBackError> {
        assert!(self.paused.is_none(), "one pause at a time");
        self.paused = Some(self.model.lock().unwrap());
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GiveBackError> {
        assert!(self.paused.take().is_some());
        Ok(())
    }

    fn forget(&mut self, runs: &[GivenRun]) -> bool {
        let model = self.paused.as_ref().unwrap();
        for (first, count) in runs.iter().map(pages_of) {
            for page in first..first + count {
                assert!(!model.is_written(page), "page {page} was written");
                assert_ne!(template(page), 0, "zero page {page} costs nothing");
            }
            if self.answers {
                self.pager.forget(first, count);
            }
        }
        self.answers
    }

    fn discard(&mut self, run: &GivenRun) -> io::Result<()> {
        assert!(self.paused.is_some());
        let (first, count) = pages_of(run);
        self.memory.discard(first, count)
    }
}

fn pages_of(run: &GivenRun) -> (usize, usize) {
    assert_eq!(run.backend, 0);
    let number = |pages: u64| usize::try_from(pages).unwrap();
    (
        number(run.pages.start().get()),
        number(run.pages.count().get()),
    )
}

fn place(memory: &Served) -> MemoryPlace {
    MemoryPlace {
        address: memory.address(),
        bytes: (PAGES * PAGE) as u64,
    }
}

/// Memory of which the first `present` pages came from elsewhere; `None` where this kernel cannot.
fn served(present: usize) -> Option<(Arc<Served>, TestPager, Mutex<Model>, GiveBack)> {
    let Some(memory) = Served::new(PAGES, present, template) else {
        // As the program does on such a kernel.
        let map = Pagemap::of_self().unwrap();
        assert!(matches!(
            require(false, &map),
            Err(GiveBackError::Off { .. })
        ));
        return None;
    };
    let memory = Arc::new(memory);
    let map = Pagemap::of_self().unwrap();
    require(true, &map).unwrap();
    let give_back = GiveBack::new(map, &[place(&memory)]).unwrap();
    let pager = TestPager::start(&memory, PAGES, present);
    let model = Mutex::new(Model {
        memory: Arc::clone(&memory),
        words: (0..PAGES).map(template).collect(),
    });
    Some((memory, pager, model, give_back))
}

fn data_pages(pages: std::ops::Range<usize>) -> usize {
    pages.filter(|&page| template(page) != 0).count()
}

#[test]
fn clean_pages_go_and_come_back_and_written_ones_stay() {
    let Some((memory, pager, model, mut give_back)) = served(0) else {
        return;
    };
    let mut clone = Clone::new(&memory, &pager, &model);
    let touch = |written: std::ops::Range<usize>| {
        let mut model = model.lock().unwrap();
        (0..PAGES).for_each(|page| model.read(page));
        written.for_each(|page| model.write(page));
    };
    touch(0..30);
    let clean = (data_pages(30..PAGES) * PAGE) as u64;
    let account = || RamMemory::of(std::process::id(), &[place(&memory)], true).unwrap();
    let (before, accuracy) = account();
    assert_eq!(accuracy, Accuracy::Exact);
    assert_eq!(before.private_clean_bytes, clean);
    assert_eq!(before.private_dirty_bytes, 30 * PAGE as u64);

    let given = give_back.give_back(&mut clone, 10 * PAGE as u64).unwrap();
    let expected = Given {
        clean_bytes: clean,
        given_bytes: clean - 10 * PAGE as u64,
        pauses: 1,
    };
    assert_eq!(given, expected);
    let (after, _) = account();
    assert_eq!(
        after.private_clean_bytes,
        10 * PAGE as u64,
        "down to the budget"
    );
    assert_eq!(after.private_dirty_bytes, before.private_dirty_bytes);
    assert_eq!(after.absent_bytes, given.given_bytes);

    let served_before = pager.served();
    touch(0..0);
    let came_back = (pager.served() - served_before) * PAGE;
    assert_eq!(
        came_back as u64, given.given_bytes,
        "nothing else had to be brought"
    );
    let none = give_back.give_back(&mut clone, u64::MAX).unwrap();
    assert_eq!((none.given_bytes, none.pauses), (0, 0));
    assert_eq!(pager.wrong(), Vec::<String>::new());
}

#[test]
fn what_a_root_gave_stays() {
    let Some((memory, pager, model, mut give_back)) = served(100) else {
        return;
    };
    // Even where it looks like a page that the pager installed and nobody wrote.
    memory.protect(0..100);
    (0..PAGES).for_each(|page| model.lock().unwrap().read(page));
    let mut clone = Clone::new(&memory, &pager, &model);
    let given = give_back.give_back(&mut clone, 0).unwrap();
    assert_eq!(given.given_bytes, (data_pages(100..PAGES) * PAGE) as u64);
    let served_before = pager.served();
    (0..100).for_each(|page| model.lock().unwrap().read(page));
    assert_eq!(pager.served(), served_before);
}

#[test]
fn without_the_pager_nothing_goes_and_the_guest_runs_on() {
    let Some((memory, pager, model, mut give_back)) = served(0) else {
        return;
    };
    (0..PAGES).for_each(|page| model.lock().unwrap().read(page));
    let mut clone = Clone::new(&memory, &pager, &model);
    clone.answers = false;
    let error = give_back.give_back(&mut clone, 0).unwrap_err();
    assert!(matches!(error, GiveBackError::Pager), "{error}");
    assert!(clone.paused.is_none());
    let served_before = pager.served();
    (0..PAGES).for_each(|page| model.lock().unwrap().read(page));
    assert_eq!(pager.served(), served_before);
}

#[test]
fn no_write_is_lost_while_the_guest_runs_between_pauses() {
    let Some((memory, pager, model, mut give_back)) = served(0) else {
        return;
    };
    let done = AtomicBool::new(false);
    let ops = AtomicU64::new(0);
    let mut pauses = 0;
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            while !done.load(Ordering::Relaxed) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let page = usize::try_from(state % PAGES as u64).unwrap();
                let mut model = model.lock().unwrap();
                model.read(page);
                // Few pages are written, or there would soon be nothing to give back.
                if page < PAGES / 4 && state & (1 << 40) != 0 {
                    model.write(page);
                }
                drop(model);
                ops.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        let mut clone = Clone::new(&memory, &pager, &model);
        for round in 0..1000 {
            // The guest had its turn; how many of its accesses fall into this round is open.
            let seen = ops.load(Ordering::Relaxed);
            while ops.load(Ordering::Relaxed) < seen + 16 && !guest.is_finished() {
                std::thread::yield_now();
            }
            let keep = (round % 7) * PAGE as u64;
            pauses += give_back.give_back(&mut clone, keep).unwrap().pauses;
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(pauses >= 900, "{pauses}");
    (0..PAGES).for_each(|page| model.lock().unwrap().read(page));
    assert_eq!(pager.wrong(), Vec::<String>::new());
}

#[derive(Debug, std::clone::Clone)]
enum Step {
    Read(usize),
    Write(usize),
    GiveBack(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..PAGES).prop_map(Step::Read),
        2 => (0..PAGES).prop_map(Step::Write),
        1 => (0..PAGES as u64).prop_map(|pages| Step::GiveBack(pages * PAGE as u64)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Some 1000 rounds in all, each checked page by page against the model.
    #[test]
    fn memory_is_as_the_model_whatever_goes(
        steps in proptest::collection::vec(step(), 100..250),
    ) {
        let Some((memory, pager, model, mut give_back)) = served(0) else {
            return Ok(());
        };
        let mut clone = Clone::new(&memory, &pager, &model);
        for step in steps {
            match step {
                Step::Read(page) => model.lock().unwrap().read(page),
                Step::Write(page) => model.lock().unwrap().write(page),
                Step::GiveBack(keep) => {
                    let given = give_back.give_back(&mut clone, keep).unwrap();
                    prop_assert_eq!(given.given_bytes, given.clean_bytes.saturating_sub(keep));
                    let (ram, _) = RamMemory::of(std::process::id(), &[place(&memory)], true).unwrap();
                    prop_assert_eq!(ram.private_clean_bytes, given.clean_bytes.min(keep));
                    let written = (0..PAGES).filter(|&page| model.lock().unwrap().is_written(page));
                    prop_assert_eq!(ram.private_dirty_bytes, (written.count() * PAGE) as u64);
                }
            }
        }
        (0..PAGES).for_each(|page| model.lock().unwrap().read(page));
        prop_assert_eq!(pager.wrong(), Vec::<String>::new());
    }
}
