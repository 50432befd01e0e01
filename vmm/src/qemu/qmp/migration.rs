#![forbid(unsafe_code)]
//! The commands of migration.

use serde_json::{Value, json};

use super::arguments::{Arg, Arguments, Kind, must};
use super::message::QmpError;
use crate::memory::discard::DiscardSource;
use crate::qemu::migration::address::{self, StateAddress};
use crate::qemu::migration::capability::{Capability, NAMES, refusal};
use crate::qemu::vm::{RunStatus, Vm};

fn address_of(args: &Arguments) -> Result<StateAddress, QmpError> {
    let generic = |error: crate::qemu::error::OptionError| QmpError::generic(error.to_string());
    match (args.maybe_text("uri"), args.any("channels")) {
        (Some(uri), None) => address::parse(uri).map_err(generic),
        (None, Some(_)) => match args.list("channels") {
            [channel] => address::channel(channel).map_err(generic),
            _ => Err(QmpError::generic(
                "Channel list must have exactly one entry, main",
            )),
        },
        (Some(_), Some(_)) => Err(QmpError::generic(
            "'uri' and 'channels' arguments are mutually exclusive; exactly one of the two should be present in \
             'migrate' qmp command ",
        )),
        (None, None) => Err(QmpError::generic(
            "need either 'uri' or 'channels' argument",
        )),
    }
}

/// `migrate`
pub fn migrate(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    if args.switch("resume") == Some(true) {
        return Err(QmpError::generic(
            "resume is for postcopy, which Pando does not have: a save that failed is begun again",
        ));
    }
    if let Some(why) = vm.status().save_refusal() {
        return Err(QmpError::generic(why));
    }
    vm.migrate(&address_of(args)?)?;
    Ok(json!({}))
}

/// `migrate-incoming`
pub fn incoming(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let address = address_of(args)?;
    vm.migrate_incoming(&address, args.switch("exit-on-error").unwrap_or(true))?;
    Ok(json!({}))
}

/// `migrate_cancel`
pub fn cancel(vm: &mut Vm, _: &Arguments) -> Result<Value, QmpError> {
    vm.cancel_migration();
    Ok(json!({}))
}

/// `migrate-set-capabilities`
pub fn set_capabilities(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    const ELEMENT: &[Arg] = &[must("capability", Kind::Str), must("state", Kind::Bool)];
    if vm.status() == RunStatus::FinishMigrate {
        return Err(QmpError::generic("There's a migration process in progress"));
    }
    let mut wanted: Vec<(Capability, bool)> = Vec::new();
    for (at, element) in args.list("capabilities").iter().enumerate() {
        let Value::Object(members) = element else {
            return Err(QmpError::generic(format!(
                "Invalid parameter type for 'capabilities[{at}]', expected: object"
            )));
        };
        let element = Arguments::check(members.clone(), ELEMENT, false)
            .map_err(|error| inside(error, &format!("capabilities[{at}]")))?;
        let name = element.text("capability");
        let on = element.switch("state") == Some(true);
        match NAMES.iter().find(|(known, _)| *known == name) {
            None => {
                return Err(QmpError::generic(format!(
                    "Parameter 'capability' does not accept value '{name}'"
                )));
            }
            Some((_, Some(capability))) => wanted.push((*capability, on)),
            // Off is what it is.
            Some((_, None)) if !on => (),
            Some((_, None)) => {
                let mut why = refusal(name);
                if name == "postcopy-ram" && vm.has_files_to_load() {
                    why = format!(
                        "Postcopy is not supported: Host backend files need to be TMPFS or HUGETLBFS only. {why}"
                    );
                }
                if name == "postcopy-ram" && vm.capabilities().ignore_shared {
                    why = format!("Postcopy is not compatible with ignore-shared. {why}");
                }
                let source = match name {
                    "release-ram" => Some(DiscardSource::ReleaseRam),
                    "postcopy-ram" => Some(DiscardSource::Postcopy),
                    _ => None,
                };
                if let Some(refusal) = source.and_then(|source| vm.ask_to_discard(source)) {
                    why = format!("{why}. {refusal}");
                }
                return Err(QmpError::generic(why));
            }
        }
    }
    // All or none.
    for (capability, on) in wanted {
        vm.set_capability(capability, on);
    }
    Ok(json!({}))
}

/// What is wrong with a member, of the element that has it.
fn inside(mut error: QmpError, element: &str) -> QmpError {
    error.desc = error.desc.replacen('\'', &format!("'{element}."), 1);
    error
}

/// `query-migrate-capabilities`
pub fn capabilities(vm: &mut Vm, _: &Arguments) -> Result<Value, QmpError> {
    let capabilities = vm.capabilities();
    Ok(NAMES
        .iter()
        .map(|(name, capability)| {
            let on = capability.is_some_and(|capability| capabilities.get(capability));
            json!({"capability": name, "state": on})
        })
        .collect())
}
