#![forbid(unsafe_code)]
//! Saving a machine and going on in a new one, on real KVM.

use crate::program::STRING;
use crate::support::{Wire, anonymous_ram, boot, chain, copy_ram, spec};
use pando_vmm::kvm::host_cpuid;
use pando_vmm::machine::{HostCheck, Machine, MachineError, MachineState, Outcome, Paused};
use pando_vmm::memory::guest::GuestRam;
use pando_vmm::vcpu::state::Section;

const MSR_TSC: u32 = 0x10;

/// A machine that has counted to `B` and is paused, with its state and a copy of its RAM.
fn saved(cpus: u32) -> (Machine<Paused>, MachineState, GuestRam) {
    let (machine, mut wire) = boot(cpus);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'c', "B");
    if cpus > 1 {
        wire.ask(b'a', &"p".repeat(cpus as usize - 1));
    }
    let machine = machine.pause().unwrap();
    let state = machine.save().unwrap();
    let ram = copy_ram(machine.ram());
    (machine, state, ram)
}

fn restore(
    cpus: u32,
    ram: GuestRam,
    state: &MachineState,
) -> Result<(Machine<Paused>, Wire), MachineError> {
    let (wire, target) = Wire::new();
    Machine::restore(&spec(cpus), ram, state, target, HostCheck::Due).map(|machine| (machine, wire))
}

fn refused(cpus: u32, state: &MachineState) -> String {
    let error = restore(cpus, anonymous_ram(), state)
        .err()
        .expect("a refusal");
    chain(&error)
}

/// Everything but clocks must come back exactly.
fn assert_same(before: &MachineState, after: &MachineState) {
    assert_eq!(before.devices, after.devices);
    assert_eq!(before.vm.pic_master, after.vm.pic_master);
    assert_eq!(before.vm.pic_slave, after.vm.pic_slave);
    assert_eq!(before.vm.io_apic, after.vm.io_apic);
    assert!(
        after.vm.clock_ns >= before.vm.clock_ns,
        "the clock went back"
    );
    for (before, after) in before.cpus.iter().zip(&after.cpus) {
        assert_eq!(before.cpuid, after.cpuid);
        assert_eq!(before.sections, after.sections);
        for (before, after) in before.msrs.iter().zip(&after.msrs) {
            if before.0 == MSR_TSC {
                // A second or two of room: the counters of an emulated host are not in step.
                assert!(after.1 + (1 << 32) > before.1, "the counter went back");
            } else {
                assert_eq!(before, after, "msr {:#x}", before.0);
            }
        }
    }
}

#[test]
fn a_clone_goes_on_where_its_original_was_saved() {
    for cpus in [1, 8] {
        let (original, state, ram) = saved(cpus);
        let (clone, mut wire) = restore(cpus, ram, &state).unwrap();
        assert_same(&state, &clone.save().unwrap());
        let clone = clone.resume().unwrap();
        wire.ask(b'c', "C");
        wire.ask(b'o', STRING);
        wire.send(b'q');
        assert_eq!(clone.wait(), Outcome::PowerOff);
        // The original is not disturbed by any of this.
        assert_same(&state, &original.save().unwrap());
    }
}

#[test]
fn state_survives_its_encoding() {
    let (_machine, state, _ram) = saved(2);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<MachineState>(&bytes).unwrap(), state);
}

#[test]
fn a_machine_can_be_rebuilt_on_its_own_ram_many_times() {
    let (machine, mut wire) = boot(1);
    let mut machine = machine.resume().unwrap();
    wire.expect("R");
    for round in 1..=10_u8 {
        wire.ask(b'c', &char::from(b'A' + round % 16).to_string());
        let paused = machine.pause().unwrap();
        let state = paused.save().unwrap();
        let ram = paused.into_ram().unwrap();
        let (rebuilt, new_wire) = restore(1, ram, &state).unwrap();
        wire = new_wire;
        machine = rebuilt.resume().unwrap();
    }
}

#[test]
fn a_pause_in_the_middle_of_an_access_loses_nothing() {
    // The guest prints all the time, so pauses fall into port exits; every letter must come once.
    let (machine, mut wire) = boot(1);
    let mut machine = machine.resume().unwrap();
    wire.expect("R");
    for round in 0..30 {
        wire.send(b'o');
        let paused = machine.pause().unwrap();
        if round % 10 == 9 {
            paused.save().unwrap();
        }
        machine = paused.resume().unwrap();
        wire.expect(STRING);
    }
}

#[test]
fn state_of_another_machine_is_refused() {
    let (_machine, state, _ram) = saved(2);
    assert!(refused(1, &state).contains("has 2 vcpus, the machine 1"));
    let mut headless = state.clone();
    headless.cpus.clear();
    assert!(refused(2, &headless).contains("has 0 vcpus, the machine 2"));
}

#[test]
fn a_feature_that_this_host_lacks_is_named() {
    let (_machine, mut state, _ram) = saved(1);
    let host = host_cpuid().unwrap();
    let host_leaf7 = host
        .iter()
        .find(|e| e.function == 7 && e.index == 0)
        .unwrap()
        .ebx;
    let lacking = (0..32).find(|bit| host_leaf7 & (1 << bit) == 0).unwrap();
    let leaf7 = state.cpus[0]
        .cpuid
        .iter_mut()
        .find(|e| e.function == 7 && e.index == 0)
        .unwrap();
    leaf7.registers[1] |= 1 << lacking;
    let text = refused(1, &state);
    assert!(text.contains("lacks cpu features"), "{text}");
    assert!(text.contains(&format!("ebx bit {lacking}")), "{text}");
}

#[test]
fn damaged_sections_are_refused_and_never_panic() {
    let (_machine, state, _ram) = saved(1);
    let sections: Vec<Section> = state.cpus[0].sections.iter().map(|(s, _)| *s).collect();
    for (index, section) in sections.into_iter().enumerate() {
        let mut gone = state.clone();
        gone.cpus[0].sections.remove(index);
        assert!(refused(1, &gone).contains(&format!("has no {section:?}")));
        for length in [0, 1, state.cpus[0].sections[index].1.len() - 1] {
            let mut short = state.clone();
            short.cpus[0].sections[index].1.truncate(length);
            assert!(refused(1, &short).contains(&format!("has {length} bytes where")));
        }
        for fill in [0x00, 0xff, 0x5a] {
            let mut junk = state.clone();
            junk.cpus[0].sections[index].1.fill(fill);
            // Some junk is valid state; then the guest runs into whatever it runs into.
            if let Ok((machine, _wire)) = restore(1, anonymous_ram(), &junk) {
                let machine = machine.resume().unwrap();
                let _ = machine.pause();
            }
        }
    }
}

#[test]
fn damaged_chips_timers_and_clocks_never_panic() {
    type Field = fn(&mut MachineState) -> &mut Vec<u8>;
    let fields: [Field; 4] = [
        |s| &mut s.vm.pic_master,
        |s| &mut s.vm.pic_slave,
        |s| &mut s.vm.io_apic,
        |s| &mut s.vm.pit,
    ];
    let (_machine, state, _ram) = saved(1);
    for field in fields {
        let mut short = state.clone();
        field(&mut short).pop();
        assert!(refused(1, &short).contains("bytes where"));
        let mut junk = state.clone();
        field(&mut junk).fill(0xff);
        if let Ok((machine, _wire)) = restore(1, anonymous_ram(), &junk) {
            let _ = machine.resume().unwrap().pause();
        }
    }
    for clock_ns in [0, u64::MAX] {
        for realtime_ns in [None, Some(0), Some(u64::MAX)] {
            let mut odd = state.clone();
            odd.vm.clock_ns = clock_ns;
            odd.vm.realtime_ns = realtime_ns;
            let _ = restore(1, anonymous_ram(), &odd);
        }
    }
}

#[test]
fn registers_that_cannot_be_set_are_named() {
    let (_machine, mut state, _ram) = saved(1);
    state.cpus[0].msrs.push((0xdead_beef, 7));
    let text = refused(1, &state);
    assert!(
        text.contains("cannot restore vcpu 0: msr 0xdeadbeef (unnamed)"),
        "{text}"
    );
    assert!(text.contains("cannot be set to 0x7"), "{text}");
}

#[test]
fn more_cpuid_leaves_than_kvm_takes_are_refused() {
    let (_machine, mut state, _ram) = saved(1);
    let leaf = state.cpus[0].cpuid[0];
    state.cpus[0].cpuid.resize(1000, leaf);
    assert!(refused(1, &state).contains("1000 cpuid leaves are more than the"));
}

#[test]
fn a_tsc_rate_that_this_host_cannot_give_is_refused_or_given() {
    let (_machine, mut state, ram) = saved(1);
    let Some(host_khz) = state.tsc_khz else {
        panic!("this host has no stable TSC: the test needs one")
    };
    // Within KVM's tolerance: the same.
    state.tsc_khz = Some(host_khz + host_khz / 10_000);
    restore(1, copy_ram(&ram), &state).unwrap();
    state.tsc_khz = Some(host_khz / 2);
    match restore(1, ram, &state) {
        Ok((machine, _wire)) => assert_eq!(machine.save().unwrap().tsc_khz, Some(host_khz / 2)),
        Err(_) => {
            let text = refused(1, &state);
            assert!(
                text.contains(&format!("this host's at {host_khz} kHz")),
                "{text}"
            );
        }
    }
}

#[test]
fn the_time_of_a_clone_goes_on_while_its_state_lay_on_disk() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    let (_machine, mut state, ram) = saved(1);
    let khz = u64::from(state.tsc_khz.expect("a host with a stable TSC"));
    let tsc = |state: &MachineState| {
        let msrs = &state.cpus[0].msrs;
        msrs.iter().find(|(index, _)| *index == MSR_TSC).unwrap().1
    };
    *state.vm.realtime_ns.as_mut().unwrap() -= HOUR_NS;
    let (clone, _wire) = restore(1, copy_ram(&ram), &state).unwrap();
    let after = clone.save().unwrap();
    assert!(after.vm.clock_ns - state.vm.clock_ns >= HOUR_NS);
    // A KVM that gives guests the host's own counter ignores what is written to it. It shows: the
    // counter of a new machine does not begin near zero.
    let tsc_can_be_set = tsc(&state) < 600 * 1000 * khz;
    if tsc_can_be_set {
        assert!(tsc(&after) - tsc(&state) >= 3600 * 1000 * khz);
    } else {
        eprintln!("this KVM gives guests the host's counter: only the clock is compared");
    }
    // Without the time of the save both go on from where they stopped.
    state.vm.realtime_ns = None;
    let (clone, _wire) = restore(1, ram, &state).unwrap();
    let after = clone.save().unwrap();
    assert!(after.vm.clock_ns - state.vm.clock_ns < HOUR_NS);
    assert!(tsc(&after) - tsc(&state) < 3600 * 1000 * khz);
}
