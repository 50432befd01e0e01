#![expect(
    clippy::unwrap_used,
    reason = "a failure anywhere in a test is a failure of the test"
)]
//! The embedded guest on real KVM, in the smallest machine that can hold it: no device of Pando,
//! no loader but `linux-loader`, so that a failure here is the payload's own.

mod harness;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::model::{DataPages, pages, place_bytes, word};
use pando_vmm::payload::protocol::{Command, Outcome, Pattern, READY_LINE, Reason, Reply, Visit};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use vm_memory::{Bytes, GuestAddress};

use harness::{END_PAGE, End, Guest, HANG, write_memory_map};

/// Any command whose answer follows from the pages; now and then one that is refused.
fn any_command() -> impl Strategy<Value = Command> {
    let range = (
        LAYOUT.first_data_page..LAYOUT.first_data_page + 64,
        0_u64..40,
    );
    let pattern = prop_oneof![
        Just(Pattern::Sequential),
        (0_u64..20).prop_map(|stride_pages| Pattern::Strided { stride_pages }),
        any::<u64>().prop_map(|seed| Pattern::Random { seed }),
    ];
    let visit = (range.clone(), 0_u64..50, pattern).prop_map(
        |((first_page, range_pages), count, pattern)| Visit {
            first_page,
            range_pages,
            count: if count > 45 {
                count
            } else {
                count.min(range_pages)
            },
            pattern,
        },
    );
    let salt = prop_oneof![Just(1), Just(u64::MAX), any::<u64>()];
    prop_oneof![
        visit.clone().prop_map(Command::Touch),
        (visit.clone(), salt.clone()).prop_map(|(visit, salt)| Command::Verify { visit, salt }),
        (visit, salt).prop_map(|(visit, salt)| Command::Write { visit, salt }),
        range
            .clone()
            .prop_map(|(first_page, pages)| Command::Checksum {
                first_page,
                pages: pages % 4
            }),
        range.prop_map(|(first_page, pages)| Command::Scan { first_page, pages }),
        proptest::collection::vec(any::<u64>(), 0..9).prop_map(Command::Echo),
    ]
}

#[test]
fn any_commands_in_any_order_answer_as_the_model_says() {
    let guest = Guest::ready();
    let mut model = DataPages::new(END_PAGE);
    let mut runner = TestRunner::deterministic();
    for _ in 0..300 {
        let command = any_command().new_tree(&mut runner).unwrap().current();
        assert_eq!(
            guest.ask(&command),
            model.obey(&command).unwrap(),
            "{command:?}"
        );
    }
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

fn patterns() -> [Pattern; 3] {
    [
        Pattern::Sequential,
        Pattern::Strided { stride_pages: 7 },
        Pattern::Random { seed: 0xa59e4 },
    ]
}

#[test]
fn every_command_answers_as_the_model_says() {
    let guest = Guest::ready();
    let mut model = DataPages::new(END_PAGE);
    let first_page = LAYOUT.first_data_page;
    for (turn, pattern) in patterns().into_iter().enumerate() {
        let visit = Visit {
            first_page: first_page + 100 * turn as u64,
            range_pages: 77,
            count: 50,
            pattern,
        };
        let salt = 0x1111_2222_3333_4444 * (turn as u64 + 1);
        let whole = Visit { count: 77, ..visit };
        for command in [
            Command::Write { visit, salt },
            Command::Verify { visit, salt },
            Command::Verify { visit: whole, salt },
            Command::Verify {
                visit,
                salt: salt + 1,
            },
            Command::Touch(whole),
            Command::Scan {
                first_page: visit.first_page - u64::from(turn > 0),
                pages: 90,
            },
            Command::Checksum {
                first_page: visit.first_page,
                pages: 3,
            },
        ] {
            let expected = model.obey(&command).unwrap();
            assert_eq!(guest.ask(&command), expected, "{command:?}");
        }
        for page in pages(&visit) {
            let mut bytes = [0; 4096];
            guest
                .memory
                .read_slice(&mut bytes, GuestAddress(page * 4096))
                .unwrap();
            assert_eq!(bytes, model.page(page), "page {page:#x}, {pattern:?}");
        }
    }
    for command in [
        Command::Echo(vec![]),
        Command::Echo(vec![0, 1, 0x1_0000_0000, u64::MAX, 5, 6, 7, 8]),
        Command::Spin { turns: 0 },
        Command::Spin { turns: 1000 },
    ] {
        assert_eq!(
            guest.ask(&command),
            model.obey(&command).unwrap(),
            "{command:?}"
        );
    }
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn identity_is_what_the_host_wrote_and_ports_are_what_they_are() {
    let guest = Guest::start(|memory| {
        for (word, value) in [7_u64, 0xaaaa, 0xbbbb].into_iter().enumerate() {
            let address = LAYOUT.identity_address + 8 * word as u64;
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
    });
    assert_eq!(guest.line(), READY_LINE.trim_end());
    let Outcome::Identity {
        generation,
        id,
        apic_id: _,
        tsc,
    } = guest.ask(&Command::Identity)
    else {
        panic!("no identity");
    };
    assert_eq!((generation, id), (7, [0xaaaa, 0xbbbb]));
    assert_ne!(tsc, 0);
    guest
        .memory
        .write_obj(8_u64, GuestAddress(LAYOUT.identity_address))
        .unwrap();
    let Outcome::Identity {
        generation,
        tsc: later,
        ..
    } = guest.ask(&Command::Identity)
    else {
        panic!("no identity");
    };
    assert_eq!(generation, 8);
    assert!(later > tsc, "time goes on");

    assert_eq!(
        guest.ask(&Command::In { port: 0x80 }),
        Outcome::In { value: 0x5a }
    );
    assert_eq!(
        guest.ask(&Command::Out {
            port: 0x80,
            value: b'\n'
        }),
        Outcome::Out
    );
    assert_eq!(guest.end(&Command::Reset), End::Reset);
}

#[test]
fn what_cannot_be_obeyed_is_refused_and_the_next_line_is_obeyed() {
    let guest = Guest::ready();
    let first = LAYOUT.first_data_page;
    let refusal = |line: &str| match guest.ask_raw(line).outcome {
        Outcome::Refused { command, reason } => (command, reason),
        other => panic!("{line:?} was obeyed: {other:?}"),
    };
    for line in ["q\n", "a 1\n", "d\n"] {
        assert_eq!(
            refusal(line),
            (line.chars().next().unwrap(), Reason::Unknown)
        );
    }
    for line in ["?\n", "W 1\n", "\x7f\n", "\u{fc}\n", "{\n"] {
        assert_eq!(refusal(line), ('?', Reason::Unknown), "{line:?}");
    }
    let mut long = "9 ".repeat(500);
    long.insert(0, 'e');
    for line in [
        "w\n",
        "w 200 1 1 0 0\n",
        "w 200 1 1 0 0 0 0\n",
        "s\n",
        "s g\n",
        "s 1-\n",
        "s 12345678123456781\n",
        "e 1 2 3 4 5 6 7 8 9\n",
        "i 1\n",
        "s 1\x01\n",
        &format!("{long}\n"),
        &format!("s {}\n", "0".repeat(4000)),
    ] {
        let command = line.chars().next().unwrap();
        assert_eq!(refusal(line), (command, Reason::Parameters), "{line:?}");
    }
    let own = LAYOUT.image_first_page;
    for line in [
        format!("w {own:x} 1 1 0 0 0\n"),
        format!("w {:x} 2 1 0 0 0\n", first - 1),
        "w 0 1 1 0 0 0\n".into(),
        format!("w {first:x} 0 0 0 0 0\n"),
        format!("w {first:x} 1 0 0 0 0\n"),
        format!("w {first:x} 4 5 0 0 0\n"),
        format!("w {first:x} 4 4 3 0 0\n"),
        format!("w {first:x} 4 4 ffffffffffffffff 0 0\n"),
        format!("w {first:x} 4 4 1 0 0\n"),
        format!("w {first:x} 4 4 1 5 0\n"),
        format!("w {first:x} ffffffffffffffff 1 0 0 0\n"),
        format!("w {first:x} bfe01 1 0 0 0\n"),
        "w c0000 1 1 0 0 0\n".into(),
        "w fffff 2 1 0 0 0\n".into(),
        "w ffffffffffffffff 1 1 0 0 0\n".into(),
        format!("w {:x} 1 1 0 0 0\n", LAYOUT.mapped_end_page),
        "c 0 1\n".into(),
        format!("c {first:x} 0\n"),
        "z 100 1\n".into(),
        "o 10000 0\n".into(),
        "o 80 100\n".into(),
        "n 10000\n".into(),
    ] {
        let command = line.chars().next().unwrap();
        assert_eq!(refusal(&line), (command, Reason::Range), "{line:?}");
    }
    // Empty lines and returns are no commands and get no answer.
    assert_eq!(
        guest.ask_raw("\n\r\n \n  e  a \r\n").outcome,
        Outcome::Echo(vec![10])
    );
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn a_line_may_come_in_pieces_and_lines_may_come_at_once() {
    let guest = Guest::ready();
    for piece in ["e", " 1", "2", "", " ", "3"] {
        guest.send(piece.as_bytes());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        guest.ask_raw("4\n").outcome,
        Outcome::Echo(vec![0x12, 0x34])
    );
    let lines: Vec<u8> = (0..100)
        .flat_map(|n| Command::Echo(vec![n]).encode())
        .collect();
    guest.send(&lines);
    for n in 0..100 {
        assert_eq!(
            Reply::parse(&guest.line()).unwrap().outcome,
            Outcome::Echo(vec![n])
        );
    }
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn pages_outside_of_the_memory_map_are_refused() {
    let guest = Guest::start(|memory| {
        write_memory_map(
            memory,
            &[
                (0, 0x9fc00, 1),
                (0x10_0000, 63 << 20, 1),
                (0xfec0_0000, 0x1000, 2),
                (1 << 32, 1 << 30, 1),
                (8 << 32, 1 << 40, 2),
            ],
        );
    });
    assert_eq!(guest.line(), READY_LINE.trim_end());
    let write = |first_page, range_pages| {
        guest.ask(&Command::Write {
            visit: Visit {
                first_page,
                range_pages,
                count: 1,
                pattern: Pattern::Sequential,
            },
            salt: 1,
        })
    };
    let refused = Outcome::Refused {
        command: 'w',
        reason: Reason::Range,
    };
    assert_eq!(write(END_PAGE - 1, 1), Outcome::Written { count: 1 });
    assert_eq!(write(END_PAGE - 1, 2), refused);
    assert_eq!(write(END_PAGE, 1), refused);
    assert_eq!(write((5 << 18) - 1, 2), refused);
    assert_eq!(write(5 << 18, 1), refused);
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn an_idle_guest_sleeps_in_the_kernel() {
    let guest = Guest::ready();
    let deadline = Instant::now() + HANG;
    loop {
        let before = guest.exits.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(100));
        if before == guest.exits.load(Ordering::SeqCst) && guest.vcpu_sleeps() {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "an idle guest keeps its vCPU busy"
        );
    }
    assert_eq!(guest.ask(&Command::Echo(vec![])), Outcome::Echo(vec![]));
    guest.ask(&Command::Halt);
    while !guest.vcpu_sleeps() {
        assert!(
            Instant::now() < deadline,
            "a halted guest keeps its vCPU busy"
        );
    }
}

#[test]
fn an_exception_is_reported_and_survived() {
    let guest = Guest::start(|memory| write_memory_map(memory, &[(0, 2 << 30, 1)]));
    assert_eq!(guest.line(), READY_LINE.trim_end());
    // The guest's own page tables: behind its writable page, the root and then the table whose
    // second word is the directory of the second GiB.
    let pointers = LAYOUT.identity_address + 2 * 4096;
    guest
        .memory
        .write_obj(0_u64, GuestAddress(pointers + 8))
        .unwrap();
    let visit = Visit::all((1 << 30) / 4096, 1);
    for _ in 0..2 {
        let Outcome::Refused {
            command: 'w',
            reason:
                Reason::Fault {
                    vector: 14,
                    error_code: 2,
                    instruction,
                    address,
                },
        } = guest.ask(&Command::Write { visit, salt: 0 })
        else {
            panic!("no page fault");
        };
        assert_eq!(address & !0xfff, 1 << 30);
        assert_eq!(instruction / 4096 / 2, LAYOUT.image_first_page / 2);
    }
    assert_eq!(guest.ask(&Command::Echo(vec![1])), Outcome::Echo(vec![1]));
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn the_last_words_of_a_page_are_where_the_model_has_them() {
    let guest = Guest::ready();
    let visit = Visit::all(LAYOUT.first_data_page, 600);
    guest.ask(&Command::Write { visit, salt: 9 });
    let mut places = std::collections::BTreeSet::new();
    for page in pages(&visit) {
        let found: u64 = guest
            .memory
            .read_obj(GuestAddress(page * 4096 + place_bytes(page)))
            .unwrap();
        assert_eq!(found, word(page, 9));
        places.insert(place_bytes(page));
    }
    assert!(
        places.len() > 400,
        "words lie in {} places only",
        places.len()
    );
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}
