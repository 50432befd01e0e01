#![forbid(unsafe_code)]
//! The timer comes into the kernel with the guest's first access, and nobody can tell.

use crate::support::{Wire, boot, copy_ram, spec};
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::{HostCheck, Machine, MachineState};

const COUNTER_0: u8 = 0x40;
const COUNTER_2: u8 = 0x42;
const CONTROL: u8 = 0x43;
const SPEAKER: u8 = 0x61;
/// Bytes of one counter in `struct kvm_pit_state2`; its last 8 are when it was loaded.
const COUNTER_BYTES: usize = 24;

/// One access of the guest: a port, and what it writes, or nothing to read.
type Access = (u8, Option<u8>);

fn run(wire: &mut Wire, accesses: &[Access]) -> Vec<Option<u8>> {
    let mut once = |&(port, value): &Access| match value {
        Some(value) => {
            wire.write_port(port, value);
            None
        }
        None => Some(wire.read_port(port)),
    };
    accesses.iter().map(&mut once).collect()
}

/// The registers that a guest leaves, but for what depends on when it did so.
fn left_by(accesses: &[Access]) -> Vec<u8> {
    let (machine, mut wire) = boot(1);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    run(&mut wire, accesses);
    let state = machine.pause().unwrap().save().unwrap();
    without_times(&state)
}

fn without_times(state: &MachineState) -> Vec<u8> {
    let mut pit = state.vm.pit.clone();
    for counter in pit.chunks_exact_mut(COUNTER_BYTES).take(3) {
        counter[16..].fill(0);
        // A latched count.
        counter[4..6].fill(0);
    }
    pit
}

/// Each access once as the first, which the process answers, and once behind another that has no
/// effect, so that the kernel does.
#[test]
fn the_first_access_does_what_the_kernel_would_do() {
    let words = [
        // Modes and bytes of each counter, a latch, all read-backs.
        0x30, 0x34, 0x36, 0x3a, 0x3e, 0x11, 0x22, 0x70, 0x76, 0x92, 0xa8, 0xb0, 0xb6, 0x00, 0x80,
        0xc2, 0xde, 0xee, 0xce,
    ];
    let controls = words.map(|word| vec![(CONTROL, Some(word))]);
    let mut firsts = controls.to_vec();
    for port in [COUNTER_0, 0x41, COUNTER_2] {
        firsts.extend([vec![(port, Some(0x21))], vec![(port, None)]]);
    }
    firsts.extend([0, 1, 2, 3].map(|value| vec![(SPEAKER, Some(value))]));
    firsts.push(vec![(CONTROL, None)]);
    for first in firsts {
        let mut behind = vec![(CONTROL, None)];
        behind.extend(&first);
        assert_eq!(left_by(&first), left_by(&behind), "{first:x?}");
    }
}

/// As Linux calibrates its clock: one shot of counter 2, waited for at the speaker's port.
#[test]
fn a_guest_waits_for_the_timer() {
    let (machine, mut wire) = boot(1);
    let _machine = machine.resume().unwrap();
    wire.expect("R");
    let before = wire.read_port(SPEAKER);
    wire.write_port(SPEAKER, before & !2 | 1);
    for (port, value) in [(CONTROL, 0xb0), (COUNTER_2, 0xff), (COUNTER_2, 0x10)] {
        wire.write_port(port, value);
    }
    // 3.6 ms, in which a loop over COM1 may go round once or a thousand times.
    while wire.read_port(SPEAKER) & 0x20 == 0 {}
}

/// A state goes through clones that touch the timer and through those that do not.
#[test]
fn a_clone_has_the_timer_of_its_original() {
    for accesses in [
        &[][..],
        &[
            (CONTROL, Some(0x30)),
            (COUNTER_0, Some(9)),
            (COUNTER_0, Some(0)),
        ],
        &[
            (CONTROL, Some(0x34)),
            (COUNTER_0, Some(0)),
            (COUNTER_0, Some(0x80)),
        ],
    ] {
        let (machine, mut wire) = boot(1);
        let machine = machine.resume().unwrap();
        wire.expect("R");
        run(&mut wire, accesses);
        let original = machine.pause().unwrap();
        let mut state = original.save().unwrap();
        let ram = copy_ram(original.ram());
        for _ in 0..2 {
            let clone = Machine::restore(
                &spec(1),
                copy_ram(&ram),
                &state,
                SerialTarget::Null,
                HostCheck::Due,
            )
            .unwrap();
            let again = clone.save().unwrap();
            assert_eq!(
                without_times(&state),
                without_times(&again),
                "{accesses:x?}"
            );
            state = again;
        }
        let (mut wire, target) = Wire::new();
        let clone = Machine::restore(&spec(1), ram, &state, target, HostCheck::Due).unwrap();
        let _clone = clone.resume().unwrap();
        wire.write_port(CONTROL, 0xb6);
    }
}
