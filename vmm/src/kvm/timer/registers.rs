#![forbid(unsafe_code)]
//! The registers of an 8254 as KVM has them, and what one access does to them: Intel's data sheet
//! "8254 programmable interval timer", with KVM's liberties (arch/x86/kvm/i8254.c). No interrupt
//! comes from here.

use std::time::Instant;

use kvm_bindings::{KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state2};

use super::TimerPort;

/// Counts in a second.
const RATE_HZ: u128 = 1_193_182;
/// What a count of zero stands for.
const LONGEST: u32 = 0x1_0000;
/// KVM's mode of a counter that was never given one.
const NO_MODE: u8 = 0xff;
/// The counter behind the speaker port.
const SPEAKER_COUNTER: usize = 2;

/// Which byte of a count is next: values of the kernel's `read_state` and its like, in which 1 is the
/// low one.
const HIGH: u8 = 2;
const LOW_THEN_HIGH: u8 = 3;
const HIGH_AFTER_LOW: u8 = 4;

/// The registers, and since when its counters have run.
#[derive(Debug, Clone)]
pub(super) struct Registers {
    state: kvm_pit_state2,
    since: Instant,
}

impl Registers {
    /// As after power-on.
    pub(super) fn power_on() -> Self {
        let mut state = kvm_pit_state2::default();
        for (number, counter) in state.channels.iter_mut().enumerate() {
            counter.mode = NO_MODE;
            counter.gate = u8::from(number != SPEAKER_COUNTER);
            counter.count = LONGEST;
        }
        Self::new(state)
    }

    /// As KVM said; the counters start now, as they do when KVM is told.
    pub(super) fn new(state: kvm_pit_state2) -> Self {
        Self {
            state,
            since: Instant::now(),
        }
    }

    pub(super) fn state(&self) -> kvm_pit_state2 {
        self.state
    }

    /// Whether nobody notices that this timer does not tick until its ports are touched: it has no
    /// mode, or is to tick once, into a line that is masked. One that ticks on and on could be unmasked.
    pub(super) fn can_wait(&self, is_masked: bool) -> bool {
        match self.state.channels[0].mode {
            NO_MODE => true,
            0 | 1 | 4 | 5 => is_masked,
            _ => false,
        }
    }

    pub(super) fn read(&mut self, port: TimerPort) -> u8 {
        match port {
            TimerPort::Speaker => self.read_speaker(),
            TimerPort::Register(number) => match self.counter_of(number) {
                Some(counter) => self.read_counter(counter),
                // The control word cannot be read.
                None => 0,
            },
        }
    }

    pub(super) fn write(&mut self, port: TimerPort, value: u8) {
        match port {
            TimerPort::Speaker => self.write_speaker(value),
            TimerPort::Register(number) => match self.counter_of(number) {
                Some(counter) => self.write_counter(counter, value),
                None => self.write_control(value),
            },
        }
    }

    fn counter_of(&self, number: u8) -> Option<usize> {
        let number = usize::from(number & 3);
        (number < self.state.channels.len()).then_some(number)
    }

    fn write_control(&mut self, value: u8) {
        let Some(number) = self.counter_of(value >> 6) else {
            self.read_back(value);
            return;
        };
        let access = value >> 4 & 3;
        if access == 0 {
            self.latch_count(number);
            return;
        }
        let mode = value >> 1 & 7;
        let counter = &mut self.state.channels[number];
        counter.rw_mode = access;
        counter.read_state = access;
        counter.write_state = access;
        counter.mode = if mode > 5 { mode - 4 } else { mode };
        counter.bcd = value & 1;
    }

    /// Latches count or status, or both, of the counters that the command names.
    fn read_back(&mut self, command: u8) {
        for number in 0..self.state.channels.len() {
            if command & 2 << number == 0 {
                continue;
            }
            if command & 0x20 == 0 {
                self.latch_count(number);
            }
            if command & 0x10 == 0 && self.state.channels[number].status_latched == 0 {
                let output = self.output(number);
                let counter = &mut self.state.channels[number];
                counter.status = u8::from(output) << 7
                    | counter.rw_mode << 4
                    // Of no mode all bits are set, the one above it too.
                    | counter.mode.wrapping_shl(1)
                    | counter.bcd;
                counter.status_latched = 1;
            }
        }
    }

    fn latch_count(&mut self, number: usize) {
        let count = self.count(number);
        let counter = &mut self.state.channels[number];
        if counter.count_latched == 0 {
            counter.latched_count = count;
            counter.count_latched = counter.rw_mode;
        }
    }

    fn read_counter(&mut self, number: usize) -> u8 {
        let [low, high] = self.count(number).to_le_bytes();
        let counter = &mut self.state.channels[number];
        if counter.status_latched != 0 {
            counter.status_latched = 0;
            return counter.status;
        }
        let [latched_low, latched_high] = counter.latched_count.to_le_bytes();
        if counter.count_latched != 0 {
            let (next, byte) = match counter.count_latched {
                HIGH => (0, latched_high),
                LOW_THEN_HIGH => (HIGH, latched_low),
                _ => (0, latched_low),
            };
            counter.count_latched = next;
            return byte;
        }
        match counter.read_state {
            HIGH => high,
            LOW_THEN_HIGH => {
                counter.read_state = HIGH_AFTER_LOW;
                low
            }
            HIGH_AFTER_LOW => {
                counter.read_state = LOW_THEN_HIGH;
                high
            }
            _ => low,
        }
    }

    fn write_counter(&mut self, number: usize, value: u8) {
        let counter = &mut self.state.channels[number];
        let count = match counter.write_state {
            HIGH => u32::from(value) << 8,
            LOW_THEN_HIGH => {
                counter.write_latch = value;
                counter.write_state = HIGH_AFTER_LOW;
                return;
            }
            HIGH_AFTER_LOW => {
                counter.write_state = LOW_THEN_HIGH;
                u32::from(value) << 8 | u32::from(counter.write_latch)
            }
            _ => u32::from(value),
        };
        counter.count = if count == 0 { LONGEST } else { count };
    }

    fn read_speaker(&self) -> u8 {
        let is_on = self.state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        // Memory's refresh, which some count time by, every 15 us.
        let refresh = self.since.elapsed().as_nanos() >> 14 & 1 != 0;
        u8::from(is_on) << 1
            | self.state.channels[SPEAKER_COUNTER].gate & 1
            | u8::from(self.output(SPEAKER_COUNTER)) << 5
            | u8::from(refresh) << 4
    }

    fn write_speaker(&mut self, value: u8) {
        if value & 2 == 0 {
            self.state.flags &= !KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        } else {
            self.state.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        }
        self.state.channels[SPEAKER_COUNTER].gate = value & 1;
    }

    /// Counts since the counters have run.
    fn elapsed(&self) -> u128 {
        self.since.elapsed().as_nanos() * RATE_HZ / 1_000_000_000
    }

    /// What a counter shows.
    fn count(&self, number: usize) -> u16 {
        let counter = &self.state.channels[number];
        let (elapsed, count) = (self.elapsed(), length(counter));
        let shown = match counter.mode {
            0 | 1 | 4 | 5 => count.wrapping_sub(elapsed),
            3 => count - 2 * elapsed % count,
            _ => count - elapsed % count,
        };
        // The counter has 16 bits.
        (shown & 0xffff) as u16
    }

    /// Whether a counter's output is high.
    fn output(&self, number: usize) -> bool {
        let counter = &self.state.channels[number];
        let (elapsed, count) = (self.elapsed(), length(counter));
        match counter.mode {
            1 => elapsed < count,
            2 => elapsed != 0 && elapsed.is_multiple_of(count),
            3 => elapsed % count < count.div_ceil(2),
            4 | 5 => elapsed == count,
            _ => elapsed >= count,
        }
    }
}

/// What a counter counts down from; never zero, whatever a state from elsewhere says.
fn length(counter: &kvm_pit_channel_state) -> u128 {
    match counter.count {
        0 => LONGEST.into(),
        count => count.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_with(control: u8, bytes: &[u8]) -> u32 {
        let mut registers = Registers::power_on();
        registers.write(TimerPort::Register(3), control);
        for &byte in bytes {
            registers.write(TimerPort::Register(control >> 6), byte);
        }
        registers.state().channels[usize::from(control >> 6)].count
    }

    #[test]
    fn counts_are_written_by_bytes_as_the_control_word_says() {
        assert_eq!(count_with(0b0001_0000, &[7]), 7);
        assert_eq!(count_with(0b0110_0000, &[7]), 7 << 8);
        assert_eq!(count_with(0b1011_0000, &[7]), LONGEST, "half of a count");
        assert_eq!(count_with(0b1011_0000, &[7, 1]), 0x107);
        assert_eq!(count_with(0b1011_0000, &[0, 0]), LONGEST);
    }

    #[test]
    fn what_ticks_where_it_is_seen_cannot_wait() {
        let with_mode = |mode: u8| {
            let mut registers = Registers::power_on();
            registers.write(TimerPort::Register(3), 0b0011_0000 | mode << 1);
            registers
        };
        assert!(Registers::power_on().can_wait(false));
        assert!(with_mode(0).can_wait(true) && !with_mode(0).can_wait(false));
        for mode in [2, 3, 6, 7] {
            assert!(!with_mode(mode).can_wait(true), "{mode}");
        }
    }

    #[test]
    fn a_latched_count_comes_low_byte_first_and_once() {
        let mut registers = Registers::power_on();
        registers.write(TimerPort::Register(3), 0b0011_0000);
        registers.write(TimerPort::Register(3), 0b0000_0000);
        let latched = registers.state().channels[0].latched_count;
        let bytes = [0, 0].map(|_| registers.read(TimerPort::Register(0)));
        assert_eq!(u16::from_le_bytes(bytes), latched);
        assert_eq!(registers.state().channels[0].count_latched, 0);
    }

    #[test]
    fn any_state_and_any_access_is_borne() {
        let mut state = kvm_pit_state2::default();
        for junk in [0, 0x5a, 0xff] {
            for counter in &mut state.channels {
                counter.count = u32::from(junk);
                counter.mode = junk;
                counter.rw_mode = junk;
                counter.count_latched = junk;
                counter.read_state = junk;
                counter.write_state = junk;
            }
            for value in 0..=0xff {
                for port in (0..=3).map(TimerPort::Register).chain([TimerPort::Speaker]) {
                    let mut registers = Registers::new(state);
                    registers.write(port, value);
                    registers.read(port);
                    registers.can_wait(true);
                }
            }
        }
    }
}
