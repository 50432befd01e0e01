#![forbid(unsafe_code)]
//! Keeps the first touches of a clone, for a working set: demand faults alone, in their order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::client::ClientId;
use crate::page::PageIndex;
use crate::working_set::{Touch, Trace};

/// Touches of one clone, written by the pager thread and read by others.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    began: Instant,
    max_touches: usize,
    trace: Arc<Mutex<Trace>>,
}

impl Recorder {
    /// A recorder that keeps at most `max_touches` of a client.
    pub(crate) fn new(client: ClientId, max_touches: usize) -> Self {
        let empty = Trace {
            client: client.get(),
            is_complete: true,
            ..Trace::default()
        };
        Self {
            began: Instant::now(),
            max_touches,
            trace: Arc::new(Mutex::new(empty)),
        }
    }

    /// A page that was absent is asked for.
    pub(crate) fn touched(&self, image: usize, page: PageIndex, write: bool) {
        let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.touches.len() >= self.max_touches {
            trace.is_complete = false;
            return;
        }
        trace.touches.push(Touch {
            image: u32::try_from(image).unwrap_or(u32::MAX),
            page,
            write,
            at: self.began.elapsed(),
        });
    }

    /// All touches until now.
    pub(crate) fn trace(&self) -> Trace {
        let trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        trace.clone()
    }
}
