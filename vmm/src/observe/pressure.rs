#![forbid(unsafe_code)]
//! Memory pressure as the kernel sees it (PSI).

use std::fs;

/// Share of the last ten seconds, in percent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// In which some task waited for memory.
    pub some_percent: f64,
    /// In which all tasks did.
    pub full_percent: f64,
}

impl Pressure {
    /// That of the host; `None` where the kernel does not say (no CONFIG_PSI, or psi=0).
    pub fn of_memory() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/pressure/memory").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let average = |kind: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?
                .split_whitespace()
                .find_map(|field| field.strip_prefix("avg10="))?
                .parse::<f64>()
                .ok()
                .filter(|percent| percent.is_finite())
        };
        Some(Self {
            some_percent: average("some")?,
            full_percent: average("full")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_found() {
        let text = "some avg10=1.25 avg60=0.50 avg300=0.10 total=123\n\
                    full avg10=0.75 avg60=0.00 avg300=0.00 total=45\n";
        let pressure = Pressure {
            some_percent: 1.25,
            full_percent: 0.75,
        };
        assert_eq!(Pressure::parse(text), Some(pressure));
        assert_eq!(Pressure::parse("some avg10=1.0\n"), None);
        assert_eq!(Pressure::parse("some avg10=x\nfull avg10=nan\n"), None);
    }
}
