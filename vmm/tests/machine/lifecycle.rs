#![forbid(unsafe_code)]
//! A machine from boot to end, on real KVM, with a guest of a few hundred bytes.

use crate::program::STRING;
use crate::support::boot;
use pando_vmm::machine::{Failure, MachineError, Outcome};

#[test]
fn one_vcpu_prints_and_obeys() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'c', "B");
    wire.ask(b'c', "C");
    wire.ask(b'o', STRING);
    wire.ask(b'!', "?");
    wire.send(b'q');
    assert_eq!(machine.wait(), Outcome::PowerOff);
}

#[test]
fn eight_vcpus_start_one_another() {
    let (machine, mut wire) = boot(8);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'a', "ppppppp");
    wire.ask(b'c', "B");
    wire.send(b'q');
    assert_eq!(machine.wait(), Outcome::PowerOff);
}

#[test]
fn vcpus_that_wait_to_be_started_can_be_paused_and_stopped() {
    let (machine, mut wire) = boot(8);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    let machine = machine.pause().unwrap().resume().unwrap();
    wire.ask(b'c', "B");
    machine.handle().stop("the test is over");
    assert_eq!(machine.wait(), Outcome::Stopped);
}

#[test]
fn what_is_not_there_reads_as_ones() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'u', "U");
    wire.ask(b'c', "B");
    drop(machine);
}

#[test]
fn resets_of_both_kinds_end_the_machine_as_resets() {
    for command in [b'r', b'k'] {
        let (machine, mut wire) = boot(2);
        let machine = machine.resume().unwrap();
        wire.expect("R");
        wire.send(command);
        assert_eq!(machine.wait(), Outcome::Reset, "{}", char::from(command));
    }
}

#[test]
fn a_triple_fault_is_a_failure_that_says_where() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.send(b't');
    let outcome = machine.wait();
    assert!(
        matches!(
            outcome,
            Outcome::Failed(Failure::TripleFault { cpu: 0, .. })
        ),
        "{outcome:?}"
    );
    assert!(
        outcome.to_string().contains("vcpu 0 had a triple fault"),
        "{outcome}"
    );
}

#[test]
fn an_instruction_that_cannot_be_run_is_a_failure_that_says_where() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.send(b'i');
    let outcome = machine.wait();
    let Outcome::Failed(failure) = &outcome else {
        panic!("{outcome:?}")
    };
    // The first where KVM emulates, the second where the guest runs on the processor.
    match failure {
        Failure::InternalError { suberror, .. } => {
            assert_eq!(*suberror, 1, "{outcome}");
            assert!(outcome.to_string().contains("cannot emulate"), "{outcome}");
        }
        Failure::TripleFault { .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn a_pause_finds_a_vcpu_in_a_tight_loop() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'l', "L");
    let machine = machine.pause().unwrap();
    drop(machine);
}

#[test]
fn a_pause_finds_a_halted_vcpu() {
    let (machine, mut wire) = boot(2);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'h', "H");
    // Give it the time to fall asleep in the kernel; awake it is found too.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let machine = machine.pause().unwrap();
    let machine = machine.resume().unwrap();
    machine.handle().stop("the test is over");
    assert_eq!(machine.wait(), Outcome::Stopped);
}

#[test]
fn no_kick_is_lost_in_two_hundred_rounds() {
    let (machine, mut wire) = boot(2);
    let mut machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'a', "p");
    for round in 0..200 {
        if round % 7 == 0 {
            wire.send(b'c');
        }
        machine = machine.pause().unwrap().resume().unwrap();
    }
    let answers: String = (1..=29).map(|n| char::from(b'A' + n % 16)).collect();
    wire.expect(&answers);
    wire.send(b'q');
    assert_eq!(machine.wait(), Outcome::PowerOff);
}

#[test]
fn a_handle_pauses_and_resumes_from_other_threads() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let handle = machine.handle();
            std::thread::spawn(move || {
                for _ in 0..25 {
                    handle.pause().unwrap();
                    match handle.resume() {
                        Ok(()) | Err(MachineError::Refused(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    machine.handle().resume().unwrap();
    wire.ask(b'c', "B");
    let handle = machine.handle();
    drop(machine);
    assert!(matches!(handle.pause(), Err(MachineError::Gone)));
}

#[test]
fn a_pause_after_the_end_says_how_it_ended() {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.send(b'q');
    let error = loop {
        // The command may not have been read yet.
        match machine.handle().pause() {
            Ok(()) => machine.handle().resume().unwrap(),
            Err(_) => break machine.pause().unwrap_err(),
        }
    };
    assert!(
        matches!(error, MachineError::Ended(Outcome::PowerOff)),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "the machine has ended: the guest switched itself off"
    );
}

#[test]
fn the_stages_of_a_boot_are_named() {
    let (machine, _wire) = boot(1);
    for stage in ["vm", "slots+irqchip", "vcpus", "state"] {
        assert!(machine.stages().get(stage).is_some(), "{stage}");
    }
}
