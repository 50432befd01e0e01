#![forbid(unsafe_code)]
//! MSI-X (PCI 3.0, 6.8.2): a table of messages, one for each interrupt of a function. A message that is
//! masked waits in the pending bits until it is not.
//!
//! Messages reach the VM by one call each, without an event and a route of the kernel's per interrupt:
//! a route costs a grace period of the kernel whenever the table changes, which each clone would pay at
//! its start, and an event is a descriptor more in each of a thousand clones.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::config::ConfigSpace;
use super::state::MsixState;

/// Bytes of one entry of the table.
pub const ENTRY_BYTES: u64 = 16;
/// The capability's id.
const CAPABILITY: u8 = 0x11;
/// Message control: messages are sent.
const ENABLE: u16 = 1 << 15;
/// Message control: all are masked.
const MASK_ALL: u16 = 1 << 14;
/// Vector control: this one is masked.
const MASKED: u32 = 1;
/// Words of an entry: address low and high, data, control.
const CONTROL: usize = 3;

/// A message of an interrupt: what the function would write where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Whoever delivers messages.
pub trait MessageSink: Send + Sync {
    /// Delivers one. Must not block.
    fn send(&self, message: Message) -> io::Result<()>;
}

/// Table, pending bits and control of a function.
pub struct Msix {
    entries: Vec<[u32; 4]>,
    pending: Vec<bool>,
    control: u16,
    /// Where messages go; before there is anybody they wait.
    sink: Option<Arc<dyn MessageSink>>,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("entries", &self.entries.len())
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl Msix {
    /// A table of `vectors` messages, all masked.
    pub fn new(vectors: u16) -> Self {
        let vectors = usize::from(vectors);
        Self {
            entries: vec![[0, 0, 0, MASKED]; vectors],
            pending: vec![false; vectors],
            control: 0,
            sink: None,
        }
    }

    /// Adds the capability to the registers of a function whose table and pending bits are at these
    /// offsets of its base address 0. Returns the offset of message control.
    pub fn add_capability(
        &self,
        config: &mut ConfigSpace,
        table: u32,
        pending: u32,
    ) -> Option<usize> {
        let last = u16::try_from(self.entries.len().saturating_sub(1)).ok()?;
        let mut body = last.to_le_bytes().to_vec();
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        let writable = (ENABLE | MASK_ALL).to_le_bytes();
        let at = config.add_capability(CAPABILITY, &body, &writable)?;
        Some(at + 2)
    }

    /// From now on messages go to `sink`, first those that wait.
    pub fn connect(&mut self, sink: Arc<dyn MessageSink>) {
        self.sink = Some(sink);
        self.send_pending();
    }

    /// From now on messages go nowhere.
    pub fn disconnect(&mut self) {
        self.sink = None;
    }

    /// Message control has been written.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
        self.send_pending();
    }

    /// Raises an interrupt. A number that the table does not have is none.
    pub fn raise(&mut self, vector: u16) {
        if let Some(pending) = self.pending.get_mut(usize::from(vector)) {
            *pending = true;
            self.send_pending();
        }
    }

    /// Whether the table has this vector.
    pub fn has(&self, vector: u16) -> bool {
        usize::from(vector) < self.entries.len()
    }

    /// Reads the table, in words of four bytes; what is none reads as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        read_words(offset, data, |word| {
            let entry = self.entries.get(word / 4)?;
            entry.get(word % 4).copied()
        });
    }

    /// Writes the table: words of four bytes, or two of them at once.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        let Ok(first) = usize::try_from(offset / 4) else {
            return;
        };
        for (word, bytes) in (first..).zip(data.chunks_exact(4)) {
            let value = bytes
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u32::from(byte));
            if let Some(entry) = self.entries.get_mut(word / 4) {
                entry[word % 4] = if word % 4 == CONTROL {
                    value & MASKED
                } else {
                    value
                };
            }
        }
        self.send_pending();
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        read_words(offset, data, |word| {
            let bits = self.pending.chunks(32).nth(word)?;
            let set = bits.iter().enumerate().filter(|(_, is_set)| **is_set);
            Some(set.fold(0, |word, (bit, _)| word | 1 << bit))
        });
    }

    /// As after a reset of the function.
    pub fn reset(&mut self) {
        let vectors = self.entries.len();
        self.entries = vec![[0, 0, 0, MASKED]; vectors];
        self.pending = vec![false; vectors];
        self.control = 0;
    }

    /// Everything that [`Self::restore`] needs; control is in the registers.
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: self.entries.clone(),
            pending: self.pending.clone(),
        }
    }

    /// Goes on where a table was saved; `false` where it is of another size.
    pub fn restore(&mut self, state: &MsixState, control: u16) -> bool {
        let vectors = self.entries.len();
        if state.entries.len() != vectors || state.pending.len() != vectors {
            return false;
        }
        self.entries.clone_from(&state.entries);
        for entry in &mut self.entries {
            entry[CONTROL] &= MASKED;
        }
        self.pending.clone_from(&state.pending);
        self.set_control(control);
        true
    }

    fn send_pending(&mut self) {
        if self.control & ENABLE == 0 || self.control & MASK_ALL != 0 {
            return;
        }
        let Some(sink) = &self.sink else {
            return;
        };
        for (pending, [low, high, data, control]) in self.pending.iter_mut().zip(&self.entries) {
            if *pending && control & MASKED == 0 {
                *pending = false;
                let address = u64::from(*high) << 32 | u64::from(*low);
                let message = Message {
                    address,
                    data: *data,
                };
                // The guest wrote the message: what cannot be delivered is its own affair.
                if let Err(error) = sink.send(message) {
                    tracing::debug!(?message, "an interrupt message was refused: {error}");
                }
            }
        }
    }
}

fn read_words(offset: u64, data: &mut [u8], word: impl Fn(usize) -> Option<u32>) {
    for (at, byte) in (offset..).zip(data) {
        let number = usize::try_from(at / 4).unwrap_or(usize::MAX);
        let bytes = word(number).unwrap_or(0).to_le_bytes();
        *byte = bytes[usize::try_from(at % 4).unwrap_or(0)];
    }
}
