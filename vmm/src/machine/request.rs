#![forbid(unsafe_code)]
//! Which request is accepted in which phase: pure policy, no threads, no KVM.

use thiserror::Error;

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// No vCPU runs; state is consistent.
    Paused,
    /// vCPUs run.
    Running,
    /// vCPUs have been told to stop and not all have.
    Pausing,
}

/// What is asked of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Let the vCPUs run.
    Resume,
    /// Stop the vCPUs at a consistent point.
    Pause,
    /// Read all state that is not RAM.
    Save,
    /// End the machine.
    Stop,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is so already: answer at once.
    Already,
    /// Start all vCPUs, then answer.
    Start,
    /// Tell all vCPUs to stop; answer when they have.
    BeginPause,
    /// vCPUs are stopping already; answer when they have.
    JoinPause,
    /// Read the state and answer with it.
    Save,
    /// Stop everything for good.
    End,
    /// Answer that it cannot be done now.
    Refuse(Refusal),
}

/// Why a request cannot be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// State is consistent only while the machine is paused.
    #[error("the machine is running: pause it before its state is saved")]
    NotPaused,
    /// Somebody else has asked for a pause that is not complete.
    #[error("the machine is being paused: wait for that before resuming it")]
    Pausing,
}

/// What to do with `request` in `phase`.
pub fn decide(phase: Phase, request: Request) -> Verdict {
    match (phase, request) {
        (_, Request::Stop) => Verdict::End,
        (Phase::Paused, Request::Resume) => Verdict::Start,
        (Phase::Paused, Request::Pause) | (Phase::Running, Request::Resume) => Verdict::Already,
        (Phase::Paused, Request::Save) => Verdict::Save,
        (Phase::Running, Request::Pause) => Verdict::BeginPause,
        (Phase::Pausing, Request::Pause) => Verdict::JoinPause,
        (Phase::Running | Phase::Pausing, Request::Save) => Verdict::Refuse(Refusal::NotPaused),
        (Phase::Pausing, Request::Resume) => Verdict::Refuse(Refusal::Pausing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A machine of nothing but phases, with the rules that the driver relies on.
    #[derive(Debug)]
    struct Model {
        phase: Phase,
        /// vCPUs that run or have not yet said that they stopped.
        active: u32,
        waiting: u32,
        asked: u32,
        answered: u32,
    }

    const CPUS: u32 = 3;

    impl Model {
        /// Returns false when the machine has ended.
        fn request(&mut self, request: Request) -> bool {
            self.asked += 1;
            match decide(self.phase, request) {
                Verdict::Already => {
                    assert_eq!(request == Request::Resume, self.phase == Phase::Running);
                    self.answered += 1;
                }
                Verdict::Start => {
                    assert_eq!(self.active, 0, "started twice");
                    self.active = CPUS;
                    self.phase = Phase::Running;
                    self.answered += 1;
                }
                Verdict::BeginPause => {
                    assert_eq!(self.waiting, 0);
                    self.phase = Phase::Pausing;
                    self.waiting = 1;
                }
                Verdict::JoinPause => self.waiting += 1,
                Verdict::Save => {
                    assert_eq!(self.active, 0, "saved while a vCPU runs");
                    self.answered += 1;
                }
                Verdict::End => return false,
                Verdict::Refuse(_) => {
                    assert_ne!(
                        self.phase,
                        Phase::Paused,
                        "a paused machine refuses nothing"
                    );
                    self.answered += 1;
                }
            }
            true
        }

        fn cpu_parked(&mut self) {
            if self.phase == Phase::Pausing {
                self.active -= 1;
                if self.active == 0 {
                    self.phase = Phase::Paused;
                    self.answered += std::mem::take(&mut self.waiting);
                }
            }
        }
    }

    fn any_step() -> impl Strategy<Value = Option<Request>> {
        prop_oneof![
            4 => Just(None),
            3 => Just(Some(Request::Resume)),
            3 => Just(Some(Request::Pause)),
            2 => Just(Some(Request::Save)),
        ]
    }

    proptest! {
        #[test]
        fn every_request_is_answered_once_and_state_is_read_at_rest(
            steps in proptest::collection::vec(any_step(), 0..200),
        ) {
            let mut model = Model {
                phase: Phase::Paused,
                active: 0,
                waiting: 0,
                asked: 0,
                answered: 0,
            };
            for step in steps {
                match step {
                    Some(request) => prop_assert!(model.request(request)),
                    None => model.cpu_parked(),
                }
                prop_assert_eq!(model.asked, model.answered + model.waiting);
            }
            while model.phase == Phase::Pausing {
                model.cpu_parked();
            }
            prop_assert_eq!(model.asked, model.answered);
            prop_assert!(!model.request(Request::Stop), "stop always ends");
        }
    }
}
