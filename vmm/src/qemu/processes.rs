#![forbid(unsafe_code)]
//! Devices in other processes as a command line asks for them: what QEMU says first, and what it leaves to the
//! guest to find out.

use std::fs;

use super::error::OptionError;
use super::line::Wanted;
use super::line::refused::MULTI_PROCESS;
use super::line::vhost_user::Proxy;
use super::link::reason;
use crate::spec::{DeviceKind, MachineParts, fault_of_unshared};

/// Refuses sockets that are not there, and devices of the multi-process kind.
pub(super) fn check(wanted: &Wanted, parts: &MachineParts) -> Result<(), OptionError> {
    for device in &parts.devices {
        let DeviceKind::VhostUser(vhost_user) = &device.kind else {
            continue;
        };
        let socket = &vhost_user.socket;
        // QEMU connects before it looks at anything else.
        if let Err(error) = fs::metadata(socket) {
            return Err(OptionError::new(format!(
                "Failed to connect to '{}': {}",
                socket.display(),
                reason(&error)
            )));
        }
    }
    match wanted.memory.pci.vhost_user.proxies.first() {
        Some(proxy) => Err(refusal(proxy, parts).at(&proxy.typed)),
        None => Ok(()),
    }
}

fn refusal(proxy: &Proxy, parts: &MachineParts) -> OptionError {
    let Some(fd) = &proxy.fd else {
        let id = proxy.id.as_deref().unwrap_or_default();
        return OptionError::new(format!("fd parameter not specified for {id}"));
    };
    let Ok(number) = fd.parse::<u32>() else {
        return OptionError::new(format!("File descriptor named '{fd}' has not been found"));
    };
    let link = fs::read_link(format!("/proc/self/fd/{number}"));
    if !link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:")) {
        return OptionError::new(format!("proxy: fd {number} is not a socket"));
    }
    let unshared = parts.backends.iter().find_map(fault_of_unshared);
    let unshared = unshared.map_or_else(String::new, |fault| {
        format!("it shares all guest memory with another process, and {fault}; besides, ")
    });
    OptionError::new(format!(
        "device 'x-pci-proxy-dev' cannot be had: {unshared}{MULTI_PROCESS}"
    ))
}
