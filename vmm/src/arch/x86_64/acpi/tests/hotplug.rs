#![forbid(unsafe_code)]
//! The methods of devices that come and go, run as a guest runs them: an interpreter of the few operations
//! that they have.

use std::collections::BTreeMap;
use std::ops::Range;

use super::*;
use crate::arch::x86_64::ports::{GENERATION_ID_GSI, PCI_HOTPLUG_GSI, POWER_BUTTON_GSI};

const METHOD: u8 = 0x14;
const DEVICE: [u8; 2] = [0x5b, 0x82];

/// Code, where it is, and what it did.
struct Run<'a> {
    aml: &'a [u8],
    at: usize,
    locals: [u64; 8],
    arguments: Vec<u64>,
    /// What fields read as.
    fields: BTreeMap<&'static str, u64>,
    written: Vec<(String, u64)>,
    notified: Vec<(String, u64)>,
}

impl<'a> Run<'a> {
    fn new(aml: &'a [u8], fields: &[(&'static str, u64)]) -> Self {
        Self {
            aml,
            at: 0,
            locals: [0; 8],
            arguments: Vec::new(),
            fields: fields.iter().copied().collect(),
            written: Vec::new(),
            notified: Vec::new(),
        }
    }

    fn byte(&mut self) -> u8 {
        self.at += 1;
        self.aml[self.at - 1]
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |value, at| value | u64::from(self.byte()) << (8 * at))
    }

    /// Where a package ends.
    fn end(&mut self) -> usize {
        let start = self.at;
        let first = self.byte();
        let more = usize::from(first >> 6);
        let low = if more == 0 { first & 0x3f } else { first & 0xf };
        let mut length = usize::from(low);
        for at in 0..more {
            length |= usize::from(self.byte()) << (4 + 8 * at);
        }
        start + length
    }

    /// A name, its last part.
    fn name(&mut self) -> String {
        if self.aml[self.at] == b'\\' {
            self.at += 1;
        }
        let parts = match self.aml[self.at] {
            0x2e => {
                self.at += 1;
                2
            }
            0x2f => {
                self.at += 2;
                usize::from(self.aml[self.at - 1])
            }
            _ => 1,
        };
        self.at += 4 * parts;
        String::from_utf8(self.aml[self.at - 4..self.at].to_vec()).unwrap()
    }

    fn value(&mut self) -> u64 {
        let operation = self.byte();
        let pair = |run: &mut Self| (run.value(), run.value());
        match operation {
            0 | 1 => u64::from(operation),
            0x0a => self.number(1),
            0x0b => self.number(2),
            0x0c => self.number(4),
            0x60..=0x67 => self.locals[usize::from(operation - 0x60)],
            0x68..=0x6e => self.arguments[usize::from(operation - 0x68)],
            0x93 => {
                let (a, b) = pair(self);
                u64::from(a == b)
            }
            0x79 | 0x7b | 0x7d => {
                let (a, b) = pair(self);
                assert_eq!(self.byte(), 0, "the result goes nowhere else");
                match operation {
                    0x79 => a << b,
                    0x7b => a & b,
                    _ => a | b,
                }
            }
            _ => {
                self.at -= 1;
                let name = self.name();
                *self.fields.get(name.as_str()).unwrap()
            }
        }
    }

    fn statements(&mut self, range: Range<usize>) {
        self.at = range.start;
        while self.at < range.end {
            match self.byte() {
                0x70 => {
                    let value = self.value();
                    match self.byte() {
                        local @ 0x60..=0x67 => self.locals[usize::from(local - 0x60)] = value,
                        _ => {
                            self.at -= 1;
                            let name = self.name();
                            self.written.push((name, value));
                        }
                    }
                }
                0x86 => {
                    let place = self.name();
                    let value = self.value();
                    self.notified.push((place, value));
                }
                0xa0 => {
                    let end = self.end();
                    if self.value() != 0 {
                        self.statements(self.at..end);
                    }
                    self.at = end;
                }
                _ => {
                    self.at -= 1;
                    let called = self.name();
                    let count = if called == "PHPO" { 3 } else { 0 };
                    let arguments = (0..count).map(|_| self.value()).collect();
                    let back = self.at;
                    self.call(&called, arguments);
                    self.at = back;
                }
            }
        }
    }

    /// Runs a method of the whole table.
    fn call(&mut self, method: &str, arguments: Vec<u64>) {
        let body = method_in(self.aml, 0..self.aml.len(), method);
        let before = std::mem::replace(&mut self.arguments, arguments);
        self.statements(body);
        self.arguments = before;
    }
}

/// The body of what begins with `code` and has this name.
fn package(aml: &[u8], range: Range<usize>, code: &[u8], name: &str) -> Range<usize> {
    let found = range.clone().find_map(|at| {
        let mut run = Run::new(aml, &[]);
        run.at = at + code.len();
        if !aml[at..].starts_with(code) || run.at + 8 > range.end {
            return None;
        }
        let end = run.end();
        let is_it = aml[run.at..].starts_with(name.as_bytes()) && end <= range.end;
        is_it.then_some(run.at + 4..end)
    });
    found.unwrap_or_else(|| panic!("no {name}"))
}

/// The statements of a method, behind its flags.
fn method_in(aml: &[u8], range: Range<usize>, name: &str) -> Range<usize> {
    let Range { start, end } = package(aml, range, &[METHOD], name);
    start + 1..end
}

/// The value of a name.
fn named(aml: &[u8], range: Range<usize>, name: &str) -> u64 {
    let text = [&[8], name.as_bytes()].concat();
    let at = range.start + aml[range].windows(5).position(|w| w == text).unwrap();
    let mut run = Run::new(aml, &[]);
    run.at = at + 5;
    run.value()
}

fn dsdt_of(spec: &MachineSpec) -> Vec<u8> {
    let image = tables(ACPI_ADDRESS, spec);
    let [_, _, dsdt] = walk(&image);
    dsdt[36..].to_vec()
}

fn place(slot: u8) -> String {
    format!("S{slot:02X}_")
}

#[test]
fn each_place_has_its_number_is_emptied_by_its_bit_and_says_what_came_of_it() {
    let dsdt = dsdt_of(&plain(1).with_pci(true));
    for slot in 1_u8..=31 {
        let body = package(&dsdt, 0..dsdt.len(), &DEVICE, &place(slot));
        assert_eq!(named(&dsdt, body.clone(), "_SUN"), u64::from(slot));
        assert_eq!(named(&dsdt, body.clone(), "_ADR"), u64::from(slot) << 16);
        let mut run = Run::new(&dsdt, &[]);
        run.statements(method_in(&dsdt, body.clone(), "_EJ0"));
        assert_eq!(run.written, [("PHPJ".to_owned(), 1 << slot)]);
        let mut run = Run::new(&dsdt, &[]);
        // The system's own wish to empty it: the low byte is that of a request.
        run.arguments = vec![0x103, 0x1_0081, 0];
        run.statements(method_in(&dsdt, body, "_OST"));
        let outcome = u64::from(slot) | 3 << 8 | 0x81 << 16;
        assert_eq!(run.written, [("PHPS".to_owned(), outcome)]);
    }
}

#[test]
fn an_event_is_told_to_the_places_that_it_is_about() {
    let dsdt = dsdt_of(&plain(1).with_pci(true));
    let (look, let_go) = (1, 3);
    for (came, goes) in [
        (0, 0),
        (1 << 1, 0),
        (0, 1 << 31),
        (1 << 5 | 1 << 31, 1 << 5),
        (1, 1),
    ] {
        let mut run = Run::new(&dsdt, &[("PHPU", came), ("PHPD", goes)]);
        let event = method_in(&dsdt, 0..dsdt.len(), "_EVT");
        run.arguments = vec![PCI_HOTPLUG_GSI.into()];
        run.statements(event.clone());
        let told = |slots: u64, what: u64| {
            let slots = (1_u8..=31).filter(move |slot| slots >> slot & 1 != 0);
            slots.map(move |slot| (place(slot), what))
        };
        let expected: Vec<_> = told(came, look).chain(told(goes, let_go)).collect();
        assert_eq!(run.notified, expected);
        // The button is nobody else's.
        let mut run = Run::new(&dsdt, &[]);
        run.arguments = vec![POWER_BUTTON_GSI.into()];
        run.statements(event);
        assert_eq!(run.notified, [("PWRB".to_owned(), 0x80)]);
    }
}

#[test]
fn the_line_is_a_level_and_there_only_with_a_bus() {
    // Extended interrupts (ACPI 6.5, 6.4.3.6): length, flags, one number.
    let line = |number: u32, flags: u8| {
        let mut bytes = vec![0x89, 6, 0, flags, 1];
        bytes.extend(number.to_le_bytes());
        bytes
    };
    let has = |spec: &MachineSpec, bytes: &[u8]| {
        dsdt_of(spec)
            .windows(bytes.len())
            .any(|window| window == bytes)
    };
    let (without, with) = (plain(1), plain(1).with_pci(true));
    for edge in [POWER_BUTTON_GSI, GENERATION_ID_GSI] {
        let with = with.clone().with_generation_id(true);
        assert!(has(&with, &line(edge, 0b11)));
    }
    assert!(has(&with, &line(PCI_HOTPLUG_GSI, 0b01)));
    for spec in [&without, &without.clone().with_generation_id(true)] {
        assert!(!has(spec, &line(PCI_HOTPLUG_GSI, 0b01)));
        assert!(!has(spec, b"PHPE") && !has(spec, b"S01_"));
    }
}
