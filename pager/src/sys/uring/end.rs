#![forbid(unsafe_code)]
//! The end of a ring: no buffer is freed that the kernel may still write to.

use std::mem;
use std::time::{Duration, Instant};

use io_uring::opcode;
use io_uring::types::CancelBuilder;

use super::{MESSAGE_BUFFER_BYTES, Ring};
use crate::token::{ClientSlot, Token};

/// How long `drop` waits for the kernel to give buffers back before it leaks them.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

impl Ring {
    /// Whether the kernel may still write to a buffer, or sees a file through the ring.
    fn is_busy(&mut self) -> bool {
        self.bell_armed
            || self.in_flight.iter().any(Option::is_some)
            || self.watch.busy().next().is_some()
    }

    fn cancel_everything(&mut self) {
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        self.push(cancel, Token::Cancel);
        // Kernels before 5.19 cannot cancel everything at once: there, reads end by themselves.
        let mut pending = vec![Token::Bell];
        let busy: Vec<ClientSlot> = self.watch.busy().map(|(slot, _)| slot).collect();
        pending.extend(busy.iter().map(|&slot| Token::Uffd(slot)));
        pending.extend(busy.iter().map(|&slot| Token::Gone(slot)));
        for token in pending {
            let cancel = opcode::AsyncCancel::new(token.encode()).build();
            self.push(cancel, Token::Cancel);
        }
    }

    /// Waits for completions until nothing is pending, for at most [`DRAIN_LIMIT`].
    fn drain(&mut self) {
        let started = Instant::now();
        while self.is_busy() && started.elapsed() < DRAIN_LIMIT {
            // Not `wait`, which would arm the bell again.
            let limit = io_uring::types::Timespec::from(Duration::from_millis(50));
            let args = io_uring::types::SubmitArgs::new().timespec(&limit);
            if super::settle(self.ring.submitter().submit_with_args(1, &args)).is_err() {
                break;
            }
            while self.next().is_some() {}
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.cancel_everything();
        self.drain();
        if self.is_busy() {
            tracing::warn!(ring = ?self, "the kernel keeps buffers of a closed ring; leaking them");
            for lease in self.in_flight.drain(..).flatten() {
                mem::forget(lease);
            }
            for (_, watched) in self.watch.busy() {
                let fresh = Box::new([0; MESSAGE_BUFFER_BYTES]);
                mem::forget(mem::replace(&mut watched.messages, fresh));
            }
        }
    }
}
