#![forbid(unsafe_code)]
//! The timer (8254) of a VM, which the kernel makes when the guest first asks for it.
//!
//! A timer in the kernel is a thread of the kernel for each VM, and three grace periods at each
//! start, while guests of today count time by other means: most clones never touch it. So a timer
//! of which nobody would notice that it does not tick is kept as its registers ([`registers`]),
//! its ports belonging to nobody in the kernel; the first access to them is done on those
//! registers, makes the timer with what comes of that, and is the last one that leaves the kernel.

mod registers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_pit_state2};

use self::registers::Registers;
use super::vm::OpenVm;
use super::{KvmError, abi, ioctl};

/// A port of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerPort {
    /// Counter 0 to 2, or the control word, by the lowest two bits.
    Register(u8),
    /// The gate and output of counter 2, and the speaker.
    Speaker,
}

/// The timer of a VM.
#[derive(Debug)]
pub struct Timer {
    vm: Arc<OpenVm>,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
enum Kept {
    /// Here.
    Here(Registers),
    /// In the kernel, which answers its ports.
    InKernel,
}

impl Timer {
    /// The timer of `vm` as after power-on, not yet in the kernel.
    pub(super) fn new(vm: Arc<OpenVm>) -> Self {
        Self {
            vm,
            kept: Mutex::new(Kept::Here(Registers::power_on())),
        }
    }

    /// Sets the state, the kernel's bytes. `is_masked` says that its interrupt reaches nobody.
    pub fn restore(&self, bytes: &[u8], is_masked: bool) -> Result<(), KvmError> {
        let state: kvm_pit_state2 = abi::from_bytes("timer", bytes)?;
        let registers = Registers::new(state);
        let mut kept = self.lock();
        if matches!(*kept, Kept::Here(_)) {
            if registers.can_wait(is_masked) {
                *kept = Kept::Here(registers);
                return Ok(());
            }
            self.make(&mut kept)?;
        }
        self.set(&state)
    }

    /// The state, as the kernel's bytes.
    pub fn save(&self) -> Result<Vec<u8>, KvmError> {
        let state = match &*self.lock() {
            Kept::Here(registers) => registers.state(),
            Kept::InKernel => self.get()?,
        };
        Ok(abi::to_bytes(&state))
    }

    /// A guest reads a port. From then on the kernel answers.
    pub fn read(&self, port: TimerPort) -> Result<u8, KvmError> {
        self.access(|registers| registers.read(port))
    }

    /// A guest writes a port. From then on the kernel answers.
    pub fn write(&self, port: TimerPort, value: u8) -> Result<(), KvmError> {
        self.access(|registers| registers.write(port, value))
    }

    /// One access. Another vCPU may have been here first while this one was on its way out of the
    /// kernel: then it is done on what the kernel has by now.
    fn access<T>(&self, act: impl FnOnce(&mut Registers) -> T) -> Result<T, KvmError> {
        let mut kept = self.lock();
        let mut registers = match &*kept {
            Kept::Here(registers) => registers.clone(),
            Kept::InKernel => Registers::new(self.get()?),
        };
        let answer = act(&mut registers);
        if matches!(*kept, Kept::Here(_)) {
            self.make(&mut kept)?;
        }
        self.set(&registers.state())?;
        Ok(answer)
    }

    fn make(&self, kept: &mut Kept) -> Result<(), KvmError> {
        let config = kvm_pit_config {
            // The speaker port answers in the kernel too: Linux calibrates its clock through it.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.vm
            .create_pit2(config)
            .map_err(ioctl("KVM_CREATE_PIT2"))?;
        *kept = Kept::InKernel;
        Ok(())
    }

    fn get(&self) -> Result<kvm_pit_state2, KvmError> {
        self.vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))
    }

    fn set(&self, state: &kvm_pit_state2) -> Result<(), KvmError> {
        self.vm.set_pit2(state).map_err(ioctl("KVM_SET_PIT2"))
    }

    /// What a thread that panicked left here is whole: it is replaced in one go.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
