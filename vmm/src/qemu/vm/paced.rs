#![forbid(unsafe_code)]
//! Events that come at most once a second of a kind, as QEMU sends them: the first at once, of those that
//! follow the last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, at, never};
use serde_json::Value;

/// Between two events of one kind.
const PACE: Duration = Duration::from_secs(1);

/// What was sent, and what waits.
#[derive(Debug, Default)]
pub(super) struct Paced {
    /// By the event, and what it is about.
    kinds: BTreeMap<(&'static str, String), Kind>,
}

#[derive(Debug)]
struct Kind {
    sent: Instant,
    waiting: Option<Value>,
}

impl Paced {
    /// Takes an event about something; gives it back if it is to be sent now.
    pub(super) fn take(
        &mut self,
        event: &'static str,
        about: &str,
        data: Value,
        now: Instant,
    ) -> Option<Value> {
        let key = (event, about.to_owned());
        if let Some(kind) = self.kinds.get_mut(&key)
            && now.saturating_duration_since(kind.sent) < PACE
        {
            kind.waiting = Some(data);
            return None;
        }
        let kind = Kind {
            sent: now,
            waiting: None,
        };
        self.kinds.insert(key, kind);
        Some(data)
    }

    /// What has waited long enough.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(&'static str, Value)> {
        let mut due = Vec::new();
        for ((event, _), kind) in &mut self.kinds {
            if now.saturating_duration_since(kind.sent) >= PACE
                && let Some(data) = kind.waiting.take()
            {
                kind.sent = now;
                due.push((*event, data));
            }
        }
        due
    }

    /// Tells when something is due.
    pub(super) fn when(&self) -> Receiver<Instant> {
        let waiting = self.kinds.values().filter(|kind| kind.waiting.is_some());
        let next = waiting.map(|kind| kind.sent + PACE).min();
        next.map_or_else(never, at)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_comes_at_once_and_of_the_others_the_last() {
        let mut paced = Paced::default();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(paced.take("A", "x", json!(1), start), Some(json!(1)));
        assert_eq!(paced.take("A", "x", json!(2), after(1)), None);
        assert_eq!(paced.take("A", "x", json!(3), after(999)), None);
        assert_eq!(paced.take("A", "y", json!(7), after(999)), Some(json!(7)));
        assert!(paced.due(after(999)).is_empty());
        assert_eq!(paced.due(after(1000)), [("A", json!(3))]);
        assert!(paced.due(after(5000)).is_empty());
        assert_eq!(paced.take("A", "x", json!(4), after(1500)), None);
        assert_eq!(paced.due(after(2000)), [("A", json!(4))]);
        assert_eq!(paced.take("A", "x", json!(5), after(9000)), Some(json!(5)));
    }
}
