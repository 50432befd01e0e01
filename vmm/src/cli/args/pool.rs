#![forbid(unsafe_code)]
//! The pool of shells, as it is typed.

/// How many shells wait for clones to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmArg {
    /// As many wait before the first clone is asked for.
    pub floor: usize,
    /// More never wait.
    pub ceiling: usize,
}

/// Most shells that may be asked for: each is a process with a VM.
const MAX_WARM: usize = 10_000;

impl std::str::FromStr for WarmArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse()
                .ok()
                .filter(|&number: &usize| number <= MAX_WARM)
                .ok_or_else(|| format!("'{text}' is no number from 0 to {MAX_WARM}, as in 4:32"))
        };
        let (floor, ceiling) = text.split_once(':').unwrap_or((text, text));
        let warm = Self {
            floor: number(floor)?,
            ceiling: number(ceiling)?,
        };
        if warm.ceiling == 0 {
            return Err("a pool with room for nothing: give at least 1, or 0:1".into());
        }
        if warm.floor > warm.ceiling {
            return Err(format!(
                "a floor of {} is above the ceiling of {}",
                warm.floor, warm.ceiling
            ));
        }
        Ok(warm)
    }
}
