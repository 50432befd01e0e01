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

impl PioDevice for Serial {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |r| self.uart.read(r));
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
