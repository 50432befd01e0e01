#![forbid(unsafe_code)]
//! Migration parameters: QEMU's names, values and limits. What can be set is kept and changes nothing: a
//! state is written to its file at once, at full speed.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::message::QmpError;
use crate::qemu::vm::Vm;

/// A number that can be set.
struct Number {
    name: &'static str,
    default: u64,
    /// The greatest of its kind, and what QEMU calls the kind.
    kind: (u64, &'static str),
    least: u64,
    most: u64,
    /// What QEMU says of others.
    why: &'static str,
}

const U8: (u64, &str) = (255, "uint8_t");
const U32: (u64, &str) = (u32::MAX as u64, "uint32_t");
const U64: (u64, &str) = (u64::MAX, "uint64");

const fn free(name: &'static str, default: u64, kind: (u64, &'static str)) -> Number {
    within(name, default, kind, 0, u64::MAX, "")
}

const fn within(
    name: &'static str,
    default: u64,
    kind: (u64, &'static str),
    least: u64,
    most: u64,
    why: &'static str,
) -> Number {
    Number {
        name,
        default,
        kind,
        least,
        most,
        why,
    }
}

const NUMBERS: &[Number] = &[
    within(
        "announce-initial",
        50,
        U64,
        0,
        100_000,
        "expects a value between 0 and 100000",
    ),
    within(
        "announce-max",
        550,
        U64,
        0,
        100_000,
        "expects a value between 0 and 100000",
    ),
    within(
        "announce-rounds",
        5,
        U64,
        0,
        1000,
        "expects a value between 0 and 1000",
    ),
    within(
        "announce-step",
        100,
        U64,
        1,
        10_000,
        "expects a value between 0 and 10000",
    ),
    within(
        "throttle-trigger-threshold",
        50,
        U8,
        1,
        100,
        "expects an integer in the range of 1 to 100",
    ),
    within(
        "cpu-throttle-initial",
        20,
        U8,
        1,
        99,
        "expects an integer in the range of 1 to 99",
    ),
    within(
        "cpu-throttle-increment",
        10,
        U8,
        1,
        99,
        "expects an integer in the range of 1 to 99",
    ),
    within(
        "max-cpu-throttle",
        99,
        U8,
        20,
        99,
        "expects an integer in the range of cpu_throttle_initial to 99",
    ),
    free("max-bandwidth", 134_217_728, U64),
    free("avail-switchover-bandwidth", 0, U64),
    within(
        "downtime-limit",
        300,
        U64,
        0,
        2_000_000,
        "expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    free("x-checkpoint-delay", 20_000, U32),
    within(
        "multifd-channels",
        2,
        U8,
        1,
        255,
        "expects a value between 1 and 255",
    ),
    within(
        "xbzrle-cache-size",
        67_108_864,
        U64,
        4096,
        u64::MAX,
        "expects a power of two no less than the target page size",
    ),
    free("max-postcopy-bandwidth", 0, U64),
    within(
        "multifd-zlib-level",
        1,
        U8,
        0,
        9,
        "expects a value between 0 and 9",
    ),
    within(
        "multifd-zstd-level",
        1,
        U8,
        0,
        20,
        "expects a value between 0 and 20",
    ),
    within(
        "multifd-qatzip-level",
        1,
        U8,
        1,
        9,
        "expects a value between 1 and 9",
    ),
    within(
        "x-vcpu-dirty-limit-period",
        1000,
        U64,
        1,
        1000,
        "expects a value between 1 and 1000",
    ),
    within(
        "vcpu-dirty-limit",
        1,
        U64,
        1,
        u64::MAX,
        "must be greater than 1 MB/s",
    ),
];

/// What is no number: the values that QEMU has, of which the first is what is so here.
const WORDS: &[(&str, &[&str])] = &[
    ("mode", &["normal", "cpr-reboot", "cpr-transfer"]),
    ("multifd-compression", &["none", "zlib", "zstd", "qatzip"]),
    ("zero-page-detection", &["multifd", "legacy", "none"]),
];

/// Switches that are off.
const SWITCHES: &[&str] = &["direct-io", "cpu-throttle-tailslow"];
/// Texts that are empty.
const TEXTS: &[&str] = &["tls-creds", "tls-hostname", "tls-authz"];
/// Words and switches that may be any: they speak of saves over a network.
const ANY: &[&str] = &["zero-page-detection", "cpu-throttle-tailslow"];

/// `migrate-set-parameters`: all or none.
pub fn set(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let mut changed = Vec::new();
    for (name, value) in args.to_map() {
        changed.push((name.clone(), checked(&name, value)?));
    }
    for (name, value) in changed {
        vm.set_parameter(name, value);
    }
    Ok(json!({}))
}

fn checked(name: &str, value: Value) -> Result<Value, QmpError> {
    let wrong = |why: String| Err(QmpError::generic(why));
    let expected = |what: &str| format!("Invalid parameter type for '{name}', expected: {what}");
    if let Some(parameter) = NUMBERS.iter().find(|number| number.name == name) {
        return parameter.checked(&value).map(Value::from);
    }
    if let Some((_, words)) = WORDS.iter().find(|(known, _)| *known == name) {
        let Some(word) = value.as_str() else {
            return wrong(expected("string"));
        };
        if !words.contains(&word) {
            return wrong(format!("Parameter '{name}' does not accept value '{word}'"));
        }
        return so(name, value.clone(), word == words[0], words[0]);
    }
    if SWITCHES.contains(&name) {
        return match value.as_bool() {
            Some(on) => so(name, value, !on, "off"),
            None => wrong(expected("boolean")),
        };
    }
    if TEXTS.contains(&name) {
        return match &value {
            Value::String(text) => so(name, value.clone(), text.is_empty(), "empty"),
            Value::Null => Ok(json!("")),
            _ => wrong(expected("StrOrNull")),
        };
    }
    wrong(format!("Parameter '{name}' is unexpected"))
}

/// A value that QEMU takes, unless it would change how a state is written.
fn so(name: &str, value: Value, is_so: bool, here: &str) -> Result<Value, QmpError> {
    if is_so || ANY.contains(&name) {
        return Ok(value);
    }
    Err(QmpError::generic(format!(
        "Parameter '{name}' cannot be {value}: Pando saves to files, where it is {here}"
    )))
}

impl Number {
    fn checked(&self, value: &Value) -> Result<u64, QmpError> {
        let Self { name, kind, .. } = self;
        let refused = |why: String| QmpError::generic(format!("Parameter '{why}"));
        // As in C, a negative number is a great one.
        let number = value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .ok_or_else(|| refused(format!("{name}' expects uint64")))?;
        if number > kind.0 {
            return Err(refused(format!("{name}' expects {}", kind.1)));
        }
        let is_power = *name != "xbzrle-cache-size" || number.is_power_of_two();
        if number < self.least || number > self.most || !is_power {
            let shown = match *name {
                "x-vcpu-dirty-limit-period" => (*name).to_owned(),
                _ => name.replace('-', "_"),
            };
            return Err(refused(format!("{shown}' {}", self.why)));
        }
        Ok(number)
    }
}

/// `query-migrate-parameters`
pub fn query(vm: &mut Vm, _: &Arguments) -> Result<Value, QmpError> {
    let mut all = Map::new();
    for number in NUMBERS {
        all.insert(number.name.to_owned(), json!(number.default));
    }
    for (name, words) in WORDS {
        all.insert((*name).to_owned(), json!(words[0]));
    }
    for name in SWITCHES {
        all.insert((*name).to_owned(), json!(false));
    }
    for name in TEXTS {
        all.insert((*name).to_owned(), json!(""));
    }
    for (name, value) in vm.parameters() {
        all.insert(name.clone(), value.clone());
    }
    Ok(Value::Object(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked_in_qemus_words() {
        let message = |name, value| checked(name, value).unwrap_err().desc;
        assert_eq!(checked("downtime-limit", json!(500)).unwrap(), json!(500));
        assert_eq!(checked("tls-creds", Value::Null).unwrap(), json!(""));
        assert_eq!(
            message("downtime-limit", json!(2_000_001)),
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"
        );
        assert_eq!(
            message("multifd-channels", json!(256)),
            "Parameter 'multifd-channels' expects uint8_t"
        );
        assert_eq!(
            message("max-bandwidth", json!("x")),
            "Parameter 'max-bandwidth' expects uint64"
        );
        assert!(message("xbzrle-cache-size", json!(5000)).contains("power of two"));
        assert_eq!(
            message("mode", json!("x")),
            "Parameter 'mode' does not accept value 'x'"
        );
        assert!(message("mode", json!("cpr-reboot")).contains("it is normal"));
        assert!(message("direct-io", json!(5)).ends_with("expected: boolean"));
        assert!(message("tls-authz", json!(5)).ends_with("expected: StrOrNull"));
        assert_eq!(
            message("bogus", json!(1)),
            "Parameter 'bogus' is unexpected"
        );
    }
}
