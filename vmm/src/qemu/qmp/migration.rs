#![forbid(unsafe_code)]
//! The commands of migration.

use serde_json::{Value, json};

use super::arguments::{Arg, Arguments, Kind, must};
use super::message::QmpError;
use crate::qemu::migration::address::{self, StateAddress};
use crate::qemu::migration::capability::{Capability, NAMES, refusal};
use crate::qemu::vm::{RunStatus, Vm};

/// Parameters of QEMU with their values there. What can be set is kept and changes nothing: a state
/// is written to its file at once, at full speed.
const PARAMETERS: &[(&str, u64)] = &[
    ("announce-initial", 50),
    ("announce-max", 550),
    ("announce-rounds", 5),
    ("announce-step", 100),
    ("downtime-limit", 300),
    ("max-bandwidth", 134_217_728),
    ("avail-switchover-bandwidth", 0),
];

/// Parameters that would change something, with the value that says what is so.
const FIXED: &[(&str, &str)] = &[
    ("mode", "\"normal\""),
    ("direct-io", "false"),
    ("multifd-compression", "\"none\""),
    ("tls-creds", "\"\""),
    ("tls-hostname", "\"\""),
    ("tls-authz", "\"\""),
];

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
    for element in args.list("capabilities") {
        let Value::Object(members) = element else {
            return Err(QmpError::generic(
                "Invalid parameter type for 'capabilities[0]', expected: object",
            ));
        };
        let element = Arguments::check(members.clone(), ELEMENT, false)?;
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

/// `migrate-set-parameters`
pub fn set_parameters(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let mut changed = Vec::new();
    for (name, value) in args.to_map() {
        if PARAMETERS.iter().any(|(known, _)| *known == name) {
            if value.as_u64().is_none() {
                return Err(QmpError::generic(format!(
                    "Invalid parameter type for '{name}', expected: integer"
                )));
            }
            changed.push((name, value));
            continue;
        }
        match FIXED.iter().find(|(known, _)| *known == name) {
            Some((_, fixed)) if is_text_of(&value, fixed) => (),
            Some((_, fixed)) => {
                return Err(QmpError::generic(format!(
                    "Parameter '{name}' cannot be {value}: Pando saves to files, where it is {fixed}"
                )));
            }
            None => {
                return Err(QmpError::generic(format!(
                    "Parameter '{name}' is unexpected"
                )));
            }
        }
    }
    for (name, value) in changed {
        vm.set_parameter(name, value);
    }
    Ok(json!({}))
}

fn is_text_of(value: &Value, text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|fixed| fixed == *value)
}

/// `query-migrate-parameters`
pub fn parameters(vm: &mut Vm, _: &Arguments) -> Result<Value, QmpError> {
    let mut all = serde_json::Map::new();
    for (name, value) in PARAMETERS {
        all.insert((*name).to_owned(), json!(value));
    }
    for (name, text) in FIXED {
        let value = serde_json::from_str(text).unwrap_or_default();
        all.insert((*name).to_owned(), value);
    }
    for (name, value) in vm.parameters() {
        all.insert(name.clone(), value.clone());
    }
    Ok(Value::Object(all))
}
