#![forbid(unsafe_code)]
//! `-drive throttling.*`, and the older names of the same.

use super::pci::only;
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{Limits, MAX_RATE, Rate};

/// What is limited: QEMU's word for it, and what it counts.
const KINDS: [(&str, &str); 2] = [("bps", "bytes"), ("iops", "requests")];
/// Directions that QEMU can limit apart, each with its end in the older names.
const DIRECTIONS: [(&str, &str); 2] = [("read", "rd"), ("write", "wr")];

/// Takes what a drive's options say of its limits. QEMU's bucket holds what may go in one second at the higher
/// rate (`-max`), or a tenth of a second's without one: that is the burst.
pub(super) fn limits(props: &mut Props) -> Result<Limits, OptionError> {
    let mut rates = [None, None];
    for (rate, (kind, what)) in rates.iter_mut().zip(KINDS) {
        for (direction, old) in DIRECTIONS {
            for (new, old) in [
                (format!("{kind}-{direction}"), format!("{kind}_{old}")),
                (
                    format!("{kind}-{direction}-max"),
                    format!("{kind}_{old}_max"),
                ),
            ] {
                refuse(props, &new, &old, kind)?;
            }
            only(
                props,
                &format!("throttling.{kind}-{direction}-max-length"),
                &["1"],
            )?;
        }
        let total = take(props, &format!("{kind}-total"), kind)?;
        let max = take(props, &format!("{kind}-total-max"), &format!("{kind}_max"))?;
        only(
            props,
            &format!("throttling.{kind}-total-max-length"),
            &["1"],
        )?;
        if max.is_some() && total.is_none() {
            return Err(OptionError::new(
                "bps_max/iops_max require corresponding bps/iops values".to_owned(),
            ));
        }
        if max < total && max.is_some() {
            return Err(OptionError::new(
                "bps_max/iops_max cannot be lower than bps/iops".to_owned(),
            ));
        }
        let made = Rate::new(total, max, what);
        *rate = made.map_err(|fault| OptionError::new(fault.to_string()))?;
    }
    if take(props, "iops-size", "iops_size")?.is_some() {
        return Err(OptionError::new(
            "throttling.iops-size cannot be had: a request is one, whatever its size".to_owned(),
        ));
    }
    for key in ["throttling.group", "group"] {
        if let Some(group) = props.text(key)? {
            return Err(OptionError::new(format!(
                "{key}={group} cannot be had: each disk has its own limits"
            )));
        }
    }
    let [bytes, requests] = rates;
    Ok(Limits { bytes, requests })
}

/// A number by one of its names; 0 is none.
fn take(props: &mut Props, new: &str, old: &str) -> Result<Option<u64>, OptionError> {
    let new = format!("throttling.{new}");
    let value = props.number(&new)?;
    let value = match props.number(old)? {
        Some(_) if value.is_some() => {
            return Err(OptionError::new(format!(
                "'{new}' and its alias '{old}' can't be used at the same time"
            )));
        }
        other => value.or(other),
    };
    if value.is_some_and(|value| value > MAX_RATE) {
        return Err(OptionError::new(format!(
            "bps/iops/max values must be within [0, {MAX_RATE}]"
        )));
    }
    Ok(value.filter(|&value| value != 0))
}

/// Refuses a limit of one direction.
fn refuse(props: &mut Props, new: &str, old: &str, kind: &str) -> Result<(), OptionError> {
    match take(props, new, old)? {
        None => Ok(()),
        Some(value) => Err(OptionError::new(format!(
            "throttling.{new}={value} cannot be had: a limit is of reads and writes together, so say \
             throttling.{kind}-total"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::words::Form;

    fn read(options: &str) -> Result<Limits, OptionError> {
        let mut props = Props::parse(options, None, Form::Switches)?;
        let limits = limits(&mut props)?;
        props.finish()?;
        Ok(limits)
    }

    #[test]
    fn both_names_say_the_same() {
        let rates = |options: &str| {
            let limits = read(options).unwrap();
            [limits.bytes, limits.requests]
                .map(|rate| rate.map(|rate| (rate.per_second(), rate.burst())))
        };
        assert_eq!(
            rates("throttling.bps-read=0,iops_wr=0,iops=0"),
            [None, None]
        );
        let both = [Some((1000, 5000)), Some((50, 5))];
        let new = "throttling.bps-total=1000,throttling.bps-total-max=5000,throttling.iops-total=50,\
                   throttling.bps-total-max-length=1";
        assert_eq!(rates(new), both);
        assert_eq!(rates("bps=1000,bps_max=5000,iops=50"), both);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (options, text) in [
            (
                "throttling.bps-read=5",
                "throttling.bps-read=5 cannot be had: a limit is of reads and writes together, so say \
                 throttling.bps-total",
            ),
            ("iops_wr=5", "throttling.iops-write=5 cannot be had"),
            ("bps_rd_max=5", "throttling.bps-read-max=5 cannot be had"),
            (
                "bps=5,throttling.bps-total=5",
                "'throttling.bps-total' and its alias 'bps' can't be used at the same time",
            ),
            ("throttling.bps-total=10M", "'throttling.bps-total' expects"),
            (
                "bps=1000000000000001",
                "must be within [0, 1000000000000000]",
            ),
            ("bps_max=5", "require corresponding"),
            ("iops=5,iops_max=4", "cannot be lower than"),
            (
                "iops=5,iops_max=9,throttling.iops-total-max-length=2",
                "max-length=2 cannot be had",
            ),
            ("iops=5,iops_size=4096", "iops-size cannot be had"),
            ("throttling.group=g", "throttling.group=g cannot be had"),
            ("throttling.x=1", "throttling.x"),
        ] {
            let error = read(options).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
