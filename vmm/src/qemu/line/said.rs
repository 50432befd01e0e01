#![forbid(unsafe_code)]
//! Options that many command lines have and that can only say what is so: `-boot`, `-rtc`, `-overcommit`,
//! `-sandbox`. What they would change is refused.

use crate::qemu::error::OptionError;
use crate::qemu::words::{Form, Props};

/// Reads a property that has one value here.
fn only(props: &mut Props, name: &str, so: &str, instead: &str) -> Result<(), OptionError> {
    match props.text(name)? {
        Some(value) if value != so => Err(OptionError::new(format!(
            "{name}={value} cannot be had: {instead}; {name}={so} is what there is"
        ))),
        _ => Ok(()),
    }
}

/// Reads `-boot`: the kernel is what boots.
pub fn boot(text: &str) -> Result<(), OptionError> {
    let mut props = Props::parse(text, Some("order"), Form::Switches)?;
    for name in ["order", "once"] {
        if let Some(value) = props.text(name)? {
            return Err(OptionError::new(format!(
                "{name}={value} cannot be had: there is no firmware that would look for a device to boot from; \
                 give the kernel with -kernel"
            )));
        }
    }
    let no_menu = "there is no firmware that would show it";
    only(&mut props, "menu", "off", no_menu)?;
    // Nothing but the kernel is tried either way.
    props.switch("strict")?;
    props.finish()
}

/// Reads `-rtc`: the guest's clock is KVM's.
pub fn rtc(text: &str) -> Result<(), OptionError> {
    let mut props = Props::parse(text, None, Form::Switches)?;
    let clock = "the guest's clock is KVM's, which follows the host's and knows no time zone";
    only(&mut props, "base", "utc", clock)?;
    only(&mut props, "clock", "host", clock)?;
    only(&mut props, "driftfix", "none", "no ticks are lost")?;
    props.finish()
}

/// Reads `-overcommit`.
pub fn overcommit(text: &str) -> Result<(), OptionError> {
    let mut props = Props::parse(text, None, Form::Switches)?;
    let locked = "guest memory is not locked; give its backends prealloc=on, and the host no swap";
    only(&mut props, "mem-lock", "off", locked)?;
    only(
        &mut props,
        "cpu-pm",
        "off",
        "idle vCPUs give the host's CPUs back",
    )?;
    props.finish()
}

/// Reads `-sandbox`: there is no filter of system calls.
pub fn sandbox(text: &str) -> Result<(), OptionError> {
    let mut props = Props::parse(text, Some("enable"), Form::Switches)?;
    let on = "Pando has no filter of system calls yet: start it as a user that may do little, or under one \
              (SystemCallFilter= of systemd)";
    only(&mut props, "enable", "off", on)?;
    for name in ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"] {
        // Of a sandbox that is off.
        props.text(name)?;
    }
    props.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_so_can_be_said_and_nothing_else() {
        for (read, good, bad) in [
            (
                boot as fn(&str) -> Result<(), OptionError>,
                ["strict=on", "menu=off,strict=off"],
                ["c", "once=d", "menu=on", "splash=x"],
            ),
            (
                rtc,
                ["base=utc", "base=utc,clock=host,driftfix=none"],
                ["base=localtime", "clock=vm", "driftfix=slew", "x=1"],
            ),
            (
                overcommit,
                ["mem-lock=off", "mem-lock=off,cpu-pm=off"],
                ["mem-lock=on", "cpu-pm=on", "mem-lock=on-fault", "x"],
            ),
            (
                sandbox,
                ["off", "enable=off"],
                ["on", "on,spawn=deny", "enable=on", "x=1"],
            ),
        ] {
            for text in good {
                assert_eq!(read(text), Ok(()), "{text}");
            }
            for text in bad {
                assert!(read(text).is_err(), "{text}");
            }
        }
        let error = sandbox("on,obsolete=deny").unwrap_err().to_string();
        assert!(
            error.starts_with("enable=on cannot be had: Pando has no filter of system calls"),
            "{error}"
        );
    }
}
