#![forbid(unsafe_code)]

use super::*;
use crate::prefetch::plan::Direction;
use proptest::prelude::*;

const SINGLE: Window = Window {
    direction: Direction::Forward,
    pages: 1,
    stream: 0,
};

fn client(number: u32) -> ClientKey {
    ClientKey {
        slot: ClientSlot::new(number),
        generation: 7,
    }
}

fn key(number: u32, page: u64) -> PageKey {
    RegionKey {
        client: client(number),
        region: 0,
    }
    .page(PageIndex::new(page))
}

fn next(queue: &mut Queue) -> Option<(u32, u64)> {
    let key = queue.next_ready(|_| true)?;
    let slot = u32::try_from(key.client().slot.index()).unwrap();
    Some((slot, key.page.get()))
}

#[test]
fn each_client_has_its_limit_and_age_is_of_all() {
    let start = Instant::now();
    let later = start + Duration::from_secs(1);
    let mut queue = Queue::new(2);
    queue.push(key(0, 1), start, false, SINGLE);
    queue.push(key(0, 2), later, false, SINGLE);
    assert_eq!((queue.room(client(0)), queue.room(client(1))), (0, 2));
    queue.push(key(0, 3), later, false, SINGLE);
    assert_eq!((queue.room(client(0)), queue.len()), (0, 3));
    let limit = Duration::from_secs(10);
    assert_eq!(queue.next_deadline(limit), Some(start + limit));
    assert_eq!(queue.expired(start + limit, limit), Some(key(0, 1)));
    assert_eq!(queue.expired(later, limit), None);
    assert!(queue.answer(key(0, 1)).is_some() && queue.answer(key(0, 1)).is_none());
    assert_eq!((queue.len(), queue.room(client(0))), (2, 0));
    assert_eq!(queue.next_deadline(limit), Some(later + limit));
}

#[test]
fn a_client_that_floods_waits_as_long_as_the_others() {
    let start = Instant::now();
    let mut queue = Queue::new(100);
    (0..50).for_each(|page| queue.push(key(0, page), start, false, SINGLE));
    queue.push(key(1, 7), start, false, SINGLE);
    queue.push(key(2, 8), start, false, SINGLE);
    let order: Vec<_> = (0..4).map(|_| next(&mut queue).unwrap()).collect();
    assert_eq!(order, [(0, 0), (1, 7), (2, 8), (0, 1)]);
    // Who could not be served is the next, at the same place.
    queue.put_back(key(0, 1));
    assert_eq!(next(&mut queue), Some((0, 1)));
    // Who may not is passed, and not forgotten.
    queue.push(key(3, 9), start, false, SINGLE);
    let passed = queue.next_ready(|other| other != client(0));
    assert_eq!(passed, Some(key(3, 9)));
    assert_eq!(queue.next_ready(|other| other != client(0)), None);
    assert!(queue.has_ready());
    assert_eq!(next(&mut queue), Some((0, 2)));
}

#[test]
fn faults_on_one_page_are_one_want() {
    let start = Instant::now();
    let mut queue = Queue::new(9);
    queue.push(key(0, 5), start, false, SINGLE);
    assert!(queue.join(key(0, 5), start, true));
    assert!(!queue.join(key(1, 5), start, true));
    assert_eq!((queue.len(), queue.room(client(0))), (2, 7));
    assert_eq!(next(&mut queue), Some((0, 5)));
    assert_eq!(next(&mut queue), None);
    let read = ReadSlot::new(3);
    queue.assign(key(0, 5), read);
    assert!(queue.waits_for_read(key(0, 5), read));
    assert!(!queue.waits_for_read(key(0, 5), ReadSlot::new(4)));
    queue.narrow(key(0, 5));
    assert_eq!(next(&mut queue), Some((0, 5)));
    let want = queue.answer(key(0, 5)).unwrap();
    assert!(want.write && want.joined.len() == 1 && want.attempts == 0);
    assert_eq!(queue.len(), 0);
}

#[test]
fn a_fault_that_was_put_off_waits_longer_each_time() {
    let start = Instant::now();
    let mut queue = Queue::new(9);
    queue.push(key(0, 4), start, false, SINGLE);
    assert_eq!(next(&mut queue), Some((0, 4)));
    let mut now = start;
    for (tries, pause) in (1..).zip([1, 2, 4, 8, 16, 32, 64, 100, 100]) {
        queue.put_off(key(0, 4), now, Some(Errno::NOMEM));
        let then = now + Duration::from_millis(pause);
        assert_eq!(queue.next_try(), Some(then));
        queue.end_pauses(then.checked_sub(Duration::from_nanos(1)).unwrap());
        assert_eq!(next(&mut queue), None);
        queue.end_pauses(then);
        assert_eq!(queue.next_try(), None);
        assert_eq!(next(&mut queue), Some((0, 4)));
        let want = queue.get(key(0, 4)).unwrap();
        assert_eq!((want.attempts, want.refused), (tries, Some(Errno::NOMEM)));
        now = then;
    }
    // A read on its way needs no try.
    queue.put_off(key(0, 4), now, None);
    queue.assign(key(0, 4), ReadSlot::new(1));
    assert_eq!(queue.next_try(), None);
}

#[test]
fn a_client_that_is_gone_leaves_nothing() {
    let start = Instant::now();
    let mut queue = Queue::new(9);
    for page in 0..4 {
        queue.push(key(0, page), start, false, SINGLE);
        queue.push(key(1, page), start, false, SINGLE);
    }
    queue.put_off(key(0, 2), start, None);
    queue.remove_client(client(0));
    assert_eq!((queue.len(), queue.next_try()), (4, None));
    let left: Vec<_> = std::iter::from_fn(|| next(&mut queue)).collect();
    assert_eq!(left, [(1, 0), (1, 1), (1, 2), (1, 3)]);
    // The place is somebody else's now.
    let other = ClientKey {
        generation: 8,
        ..client(0)
    };
    assert_eq!(queue.room(other), 9);
}

#[derive(Clone, Debug)]
enum Step {
    Push(u32, u64),
    Next,
    PutOff(u32, u64),
    EndPauses,
    Answer(u32, u64),
    Remove(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let page = || (0u32..3, 0u64..4);
    prop_oneof![
        4 => page().prop_map(|(client, page)| Step::Push(client, page)),
        3 => Just(Step::Next),
        2 => page().prop_map(|(client, page)| Step::PutOff(client, page)),
        1 => Just(Step::EndPauses),
        2 => page().prop_map(|(client, page)| Step::Answer(client, page)),
        1 => (0u32..3).prop_map(Step::Remove),
    ]
}

proptest! {
    /// Whatever happens: the counts agree, and every page that may be started comes up once.
    #[test]
    fn no_page_is_lost_and_none_comes_twice(steps in prop::collection::vec(step(), 0..120)) {
        let start = Instant::now();
        let mut queue = Queue::new(50);
        let mut model: BTreeMap<PageKey, usize> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Push(number, page) => {
                    queue.push(key(number, page), start, false, SINGLE);
                    *model.entry(key(number, page)).or_default() += 1;
                }
                Step::Next => {
                    if let Some(key) = queue.next_ready(|_| true) {
                        prop_assert!(model.contains_key(&key));
                        queue.assign(key, ReadSlot::new(0));
                    }
                }
                Step::PutOff(number, page) => queue.put_off(key(number, page), start, None),
                Step::EndPauses => queue.end_pauses(start + Duration::from_secs(1)),
                Step::Answer(number, page) => {
                    let was = queue.answer(key(number, page)).map(|want| 1 + want.joined.len());
                    prop_assert_eq!(was, model.remove(&key(number, page)));
                }
                Step::Remove(number) => {
                    queue.remove_client(client(number));
                    model.retain(|key, _| key.client() != client(number));
                }
            }
            prop_assert_eq!(queue.len(), model.values().sum::<usize>());
        }
        queue.end_pauses(start + Duration::from_secs(1));
        let ready = model
            .keys()
            .filter(|&&key| queue.get(key).is_some_and(|want| want.stage == Stage::Ready))
            .count();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = queue.next_ready(|_| true) {
            prop_assert!(seen.insert(key));
        }
        prop_assert_eq!(seen.len(), ready);
    }
}
