#![forbid(unsafe_code)]
//! COM1: a 16550 UART on `vm-superio`.

use std::fmt;
use std::io;

use thiserror::Error;
use vm_superio::Serial as Uart;
use vm_superio::serial::{Error as UartError, SerialEvents, SerialState as UartState};

use super::console::{ConsoleOutput, ConsoleWaker};
use super::state::SerialState;
use crate::device::bus::{DeviceEvent, PioDevice};
use crate::device::irq::IrqLine;

/// Bytes that the receive FIFO holds.
pub const RECEIVE_FIFO_BYTES: usize = 64;

// Registers, and bits of them (PC16550D, 8.0).
const INTERRUPT_ENABLE: u8 = 1;
const DATA_ENABLED: u8 = 1;
const INTERRUPT_ID: u8 = 2;
const NO_INTERRUPT: u8 = 1;
const DATA_AVAILABLE: u8 = 4;
const LINE_CONTROL: u8 = 3;
const DIVISOR_ACCESS: u8 = 0x80;

/// Why a saved UART is refused.
#[derive(Debug, Error)]
pub enum SerialError {
    /// More received bytes than the FIFO holds.
    #[error(
        "saved serial state has {bytes} received bytes where the device holds {RECEIVE_FIFO_BYTES}"
    )]
    FifoTooLong {
        /// How many there are.
        bytes: usize,
    },
    /// The interrupt line could not be raised.
    #[error("cannot raise the serial interrupt")]
    Interrupt(#[source] io::Error),
}

/// A UART that writes to a console and is fed from it.
pub struct Serial {
    uart: Uart<IrqLine, Received, ConsoleOutput>,
}

/// Tells the console that the guest has taken everything, so that it sends more.
struct Received {
    waker: ConsoleWaker,
}

impl SerialEvents for Received {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.waker.wake();
    }
}

impl Serial {
    /// A UART as after power-on.
    #[must_use]
    pub fn new(irq: IrqLine, output: ConsoleOutput) -> Self {
        let events = Received {
            waker: output.waker(),
        };
        Self {
            uart: Uart::with_events(irq, events, output),
        }
    }

    /// A UART that goes on where a saved one stopped. An interrupt that was pending is raised
    /// again.
    pub fn restore(
        irq: IrqLine,
        output: ConsoleOutput,
        state: &SerialState,
    ) -> Result<Self, SerialError> {
        let events = Received {
            waker: output.waker(),
        };
        let uart = Uart::from_state(&to_uart(state), irq, events, output).map_err(|e| match e {
            UartError::FullFifo => SerialError::FifoTooLong {
                bytes: state.receive_fifo.len(),
            },
            UartError::Trigger(source) | UartError::IOError(source) => {
                SerialError::Interrupt(source)
            }
        })?;
        Ok(Self { uart })
    }

    /// Everything that [`Serial::restore`] needs.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            receive_fifo: in_buffer,
        }
    }

    /// Gives bytes to the guest; returns how many the FIFO took, possibly none. The console is
    /// woken when the guest has read the FIFO empty.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let before = self.uart.fifo_capacity();
        if before == 0 {
            return 0;
        }
        match self.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(error) => {
                // The bytes are in the FIFO all the same: the guest finds them when it next polls.
                tracing::warn!(%error, "serial interrupt was not raised");
                before - self.uart.fifo_capacity()
            }
        }
    }
}

fn to_uart(state: &SerialState) -> UartState {
    UartState {
        baud_divisor_low: state.baud_divisor_low,
        baud_divisor_high: state.baud_divisor_high,
        interrupt_enable: state.interrupt_enable,
        interrupt_identification: state.interrupt_identification,
        line_control: state.line_control,
        line_status: state.line_status,
        modem_control: state.modem_control,
        modem_status: state.modem_status,
        scratch: state.scratch,
        in_buffer: state.receive_fifo.clone(),
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("state", &self.save())
            .finish()
    }
}

impl Serial {
    fn read_register(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        // The UART forgets that it has data with the first byte that is read; a real one does with the last.
        // A driver that takes so many and no more looks here whether there is more, and is not interrupted again.
        if register == INTERRUPT_ID && value & NO_INTERRUPT != 0 && self.has_data_to_tell_of() {
            return value & !NO_INTERRUPT | DATA_AVAILABLE;
        }
        value
    }

    fn has_data_to_tell_of(&mut self) -> bool {
        let is_divisor = self.uart.read(LINE_CONTROL) & DIVISOR_ACCESS != 0;
        let has_data = self.uart.fifo_capacity() < RECEIVE_FIFO_BYTES;
        has_data && !is_divisor && self.uart.read(INTERRUPT_ENABLE) & DATA_ENABLED != 0
    }
}

impl PioDevice for Serial {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |r| self.read_register(r));
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        for (register, &byte) in (offset..).zip(data) {
            let Ok(register) = u8::try_from(register) else {
                continue;
            };
            if let Err(error) = self.uart.write(register, byte) {
                tracing::warn!(%error, "serial interrupt was not raised");
            }
        }
        DeviceEvent::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::legacy::console::{Console, SerialTarget};
    use proptest::prelude::*;

    const DATA: u16 = 0;
    const INTERRUPT_ENABLE: u16 = super::INTERRUPT_ENABLE as u16;
    const INTERRUPT_ID: u16 = super::INTERRUPT_ID as u16;
    const LINE_STATUS: u16 = 5;
    const SCRATCH: u16 = 7;

    fn serial() -> (Serial, IrqLine) {
        let irq = IrqLine::new().unwrap();
        let console = Console::open(SerialTarget::Null).unwrap();
        (Serial::new(irq.clone(), console.output()), irq)
    }

    fn read(serial: &mut Serial, register: u16) -> u8 {
        let mut data = [0xff];
        serial.read(register, &mut data);
        data[0]
    }

    /// Linux takes at most 256 bytes, then looks whether there are more.
    #[test]
    fn data_is_told_of_until_the_last_byte_is_read() {
        let (mut serial, _irq) = serial();
        let _ = serial.write(INTERRUPT_ENABLE, &[1]);
        serial.enqueue(b"abc");
        for left in [3, 2, 1] {
            let told = read(&mut serial, INTERRUPT_ID);
            assert_eq!(told & 0xf, 4, "{left} are left");
            read(&mut serial, DATA);
        }
        assert_eq!(read(&mut serial, INTERRUPT_ID) & 0xf, 1);
        // Nobody asked to be told.
        serial.enqueue(b"d");
        let _ = serial.write(INTERRUPT_ENABLE, &[0]);
        read(&mut serial, INTERRUPT_ID);
        assert_eq!(read(&mut serial, INTERRUPT_ID) & 0xf, 1);
    }

    #[test]
    fn received_bytes_raise_the_interrupt_and_are_read_in_order() {
        let (mut serial, irq) = serial();
        let _ = serial.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(serial.enqueue(b"ab"), 2);
        assert_eq!(irq.event().read().unwrap(), 1);
        assert_eq!(read(&mut serial, LINE_STATUS) & 1, 1);
        assert_eq!(read(&mut serial, DATA), b'a');
        assert_eq!(read(&mut serial, DATA), b'b');
        assert_eq!(read(&mut serial, LINE_STATUS) & 1, 0);
        assert_eq!(read(&mut serial, DATA), 0, "an empty FIFO reads as zero");
    }

    #[test]
    fn the_fifo_takes_what_it_has_room_for() {
        let (mut serial, _irq) = serial();
        assert_eq!(serial.enqueue(&[7; 100]), RECEIVE_FIFO_BYTES);
        assert_eq!(serial.enqueue(&[7]), 0);
        read(&mut serial, DATA);
        assert_eq!(serial.enqueue(&[8, 9]), 1);
    }

    #[test]
    fn a_restored_uart_goes_on_with_its_registers_fifo_and_interrupt() {
        let (mut serial, _irq) = serial();
        let _ = serial.write(INTERRUPT_ENABLE, &[1]);
        let _ = serial.write(SCRATCH, &[0x5a]);
        serial.enqueue(b"frozen");
        let state = serial.save();
        assert_eq!(state.receive_fifo, b"frozen");

        let irq = IrqLine::new().unwrap();
        let output = Console::open(SerialTarget::Null).unwrap().output();
        let mut clone = Serial::restore(irq.clone(), output, &state).unwrap();
        assert_eq!(clone.save(), state);
        assert_eq!(irq.event().read().unwrap(), 1, "raised again");
        assert_eq!(read(&mut clone, INTERRUPT_ID) & 0xf, 0b0100);
        assert_eq!(read(&mut clone, SCRATCH), 0x5a);
        let bytes: Vec<u8> = (0..6).map(|_| read(&mut clone, DATA)).collect();
        assert_eq!(bytes, b"frozen");
    }

    #[test]
    fn a_saved_fifo_that_is_too_long_is_refused() {
        let state = SerialState {
            receive_fifo: vec![0; 65],
            ..serial().0.save()
        };
        let output = Console::open(SerialTarget::Null).unwrap().output();
        let error = Serial::restore(IrqLine::new().unwrap(), output, &state).unwrap_err();
        assert_eq!(
            error.to_string(),
            "saved serial state has 65 received bytes where the device holds 64"
        );
    }

    proptest! {
        #[test]
        fn no_access_panics_and_any_state_can_be_saved_and_restored(
            accesses in prop::collection::vec(
                (0_u16..8, prop::collection::vec(any::<u8>(), 0..5), any::<bool>()), 0..200,
            ),
        ) {
            let (mut serial, _irq) = serial();
            for (offset, mut data, write) in accesses {
                data.truncate(usize::from(8 - offset));
                if write {
                    prop_assert_eq!(serial.write(offset, &data), DeviceEvent::None);
                } else {
                    serial.read(offset, &mut data);
                }
                serial.enqueue(&data);
            }
            let state = serial.save();
            let output = Console::open(SerialTarget::Null).unwrap().output();
            let clone = Serial::restore(IrqLine::new().unwrap(), output, &state).unwrap();
            prop_assert_eq!(clone.save(), state);
        }
    }
}
