#![forbid(unsafe_code)]
//! `-smp`: how many vCPUs, and how they are packed.

use crate::qemu::error::{OptionError, expects};
use crate::qemu::words::{Form, Props};

/// What `-smp` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Smp {
    /// How many vCPUs.
    pub cpus: u32,
    /// How many cores a socket has.
    pub cores: u32,
}

/// Reads `-smp`. What is left out is computed as QEMU does it.
pub fn smp(text: &str) -> Result<Smp, OptionError> {
    let mut props = Props::parse(text, Some("cpus"), Form::KeyValue)?;
    let mut count = |name: &str| {
        let shown = format!("smp.{name}");
        match props.integer(name, &shown)? {
            Some(0) => Err(invalid("CPU topology parameters must be greater than zero")),
            // As in C: a negative number is a great one.
            Some(number) => u32::try_from(number & i64::from(u32::MAX))
                .map(Some)
                .map_err(|_| expects(&shown, "integer")),
            None => Ok(None),
        }
    };
    let asked_cpus = count("cpus")?;
    let most = count("maxcpus")?;
    let (sockets, cores, threads) = (count("sockets")?, count("cores")?, count("threads")?);
    let (dies, modules) = (count("dies")?.unwrap_or(1), count("modules")?.unwrap_or(1));
    for name in ["clusters", "books", "drawers"] {
        if count(name)?.is_some_and(|number| number > 1) {
            return Err(OptionError::new(format!(
                "{name} > 1 not supported by this machine's CPU topology"
            )));
        }
    }
    if let Some(name) = props.names().next() {
        return Err(OptionError::new(format!(
            "Parameter 'smp.{name}' is unexpected"
        )));
    }
    let parts = dies.wrapping_mul(modules);
    let share = |whole: u32, of: &[u32]| {
        let all = of.iter().fold(parts, |all, &one| all.wrapping_mul(one));
        whole.checked_div(all).unwrap_or(0)
    };
    let (sockets, cores, threads) = match (most.or(asked_cpus), sockets, cores) {
        (None, ..) => (
            sockets.unwrap_or(1),
            cores.unwrap_or(1),
            threads.unwrap_or(1),
        ),
        (Some(all), sockets, None) => {
            let (sockets, threads) = (sockets.unwrap_or(1), threads.unwrap_or(1));
            (sockets, share(all, &[sockets, threads]), threads)
        }
        (Some(all), None, Some(cores)) => {
            let threads = threads.unwrap_or(1);
            (share(all, &[cores, threads]), cores, threads)
        }
        (Some(all), Some(sockets), Some(cores)) => {
            let threads = threads.unwrap_or_else(|| share(all, &[sockets, cores]));
            (sockets, cores, threads)
        }
    };
    let product = [sockets, cores, threads]
        .iter()
        .fold(parts, |all, &one| all.wrapping_mul(one));
    let most = most.or(asked_cpus).unwrap_or(product);
    let cpus = asked_cpus.unwrap_or(most);
    let hierarchy = format!(
        "sockets ({sockets}) * dies ({dies}) * modules ({modules}) * cores ({cores}) * threads ({threads})"
    );
    if product != most {
        return Err(invalid(&format!(
            "product of the hierarchy must match maxcpus: {hierarchy} != maxcpus ({most})"
        )));
    }
    if most < cpus {
        return Err(invalid(&format!(
            "maxcpus must be equal to or greater than smp: {hierarchy} == maxcpus ({most}) < smp_cpus ({cpus})"
        )));
    }
    for (name, number) in [("threads", threads), ("dies", dies), ("modules", modules)] {
        if number > 1 {
            return Err(OptionError::new(format!(
                "{name}={number} cannot be had: use sockets and cores"
            )));
        }
    }
    if most != cpus {
        return Err(OptionError::new(
            "maxcpus above cpus cannot be had: no vCPU can be added later",
        ));
    }
    Ok(Smp { cpus, cores })
}

/// Refuses more vCPUs than QEMU's machine of this name has.
pub fn check(cpus: u32, machine: &str) -> Result<(), OptionError> {
    let most = match machine {
        "microvm" => 288,
        kind if kind.starts_with("pc-i440fx-") => 255,
        _ => 4096,
    };
    if cpus <= most {
        return Ok(());
    }
    Err(OptionError::new(format!(
        "Invalid SMP CPUs {}. The max CPUs supported by machine '{machine}' is {most}",
        cpus.cast_signed()
    )))
}

fn invalid(why: &str) -> OptionError {
    OptionError::new(format!("Invalid CPU topology: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_are_counted() {
        let cpus = |text| smp(text).map(|smp| (smp.cpus, smp.cores));
        assert_eq!(cpus("2"), Ok((2, 2)));
        assert_eq!(cpus("4,cores=2"), Ok((4, 2)));
        assert_eq!(cpus("2,sockets=2"), Ok((2, 1)));
        assert_eq!(cpus("sockets=2,cores=2"), Ok((4, 2)));
        assert_eq!(
            cpus("cpus=4,sockets=2,cores=2,threads=1,maxcpus=4"),
            Ok((4, 2))
        );
        assert_eq!(cpus("2,dies=1,books=1"), Ok((2, 2)));
        let message = |text| smp(text).unwrap_err().to_string();
        assert_eq!(
            message("3,cores=2"),
            "Invalid CPU topology: product of the hierarchy must match maxcpus: sockets (1) * dies (1) * \
             modules (1) * cores (2) * threads (1) != maxcpus (3)"
        );
        assert!(message("4,maxcpus=2").ends_with("== maxcpus (2) < smp_cpus (4)"));
        assert!(message("0").ends_with("must be greater than zero"));
        assert_eq!(message("x"), "Parameter 'smp.cpus' expects integer");
        assert_eq!(message("2,foo=1"), "Parameter 'smp.foo' is unexpected");
        assert!(message("2,maxcpus=4").contains("cannot be had"));
        assert!(message("2,threads=2").contains("cannot be had"));
        assert!(
            check(smp("-1").unwrap().cpus, "pc-q35-10.0")
                .unwrap_err()
                .to_string()
                .starts_with("Invalid SMP CPUs -1. The max CPUs")
        );
    }
}
