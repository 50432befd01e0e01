#![forbid(unsafe_code)]
//! The properties behind an option, and the questions that are put to them.
//!
//! Each is asked for once, by its kind; what nobody asked for is refused by [`Props::finish`]. So no
//! property is ever ignored.

use serde_json::Value;

use super::size;
use crate::qemu::error::{OptionError, expects, invalid_parameter, missing, not_accepted};
use crate::qemu::qmp::json;

/// How an option's properties are written, of QEMU's two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Every property has its `=` (`-machine`, `-smp`).
    KeyValue,
    /// A word alone switches a property on, with `no` in front off (`-chardev`, `-mon`, ...).
    Switches,
    /// The same, and JSON is understood (`-object`, `-device`, `-numa`).
    SwitchesOrJson,
}

/// Most bytes of one option: more than any has, little enough to be read in no time.
pub const MAX_OPTION_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq)]
enum Typed {
    Text(String),
    Json(Value),
}

/// Properties in the order in which they were typed; of one that was typed twice the last counts.
#[derive(Debug, Clone, Default)]
pub struct Props {
    pairs: Vec<(String, Typed)>,
}

impl Props {
    /// Takes an option's text apart. `implied` is the key of a first value without one.
    pub fn parse(text: &str, implied: Option<&str>, form: Form) -> Result<Self, OptionError> {
        if text.len() > MAX_OPTION_BYTES {
            return Err(OptionError::new(format!(
                "an option of {} bytes is longer than {MAX_OPTION_BYTES}",
                text.len()
            )));
        }
        if form == Form::SwitchesOrJson && text.starts_with('{') {
            // As QEMU reads it: with either kind of quotes, and each key once.
            let value = json::parse(text.as_bytes()).map_err(OptionError::new)?;
            return Self::from_json(value);
        }
        let mut props = Self::default();
        for (position, part) in split(text).into_iter().enumerate() {
            let implied = implied.filter(|_| position == 0);
            match (part.key, implied) {
                (Some(key), _) => {
                    check_key(&key)?;
                    // Of ids the first counts.
                    if key != "id" || form == Form::KeyValue || !props.has("id") {
                        props.set(key, Typed::Text(part.value));
                    }
                }
                (None, Some(key)) => props.set(key.to_owned(), Typed::Text(part.value)),
                (None, None) if form == Form::KeyValue => {
                    check_key(&part.value)?;
                    return Err(OptionError::new(format!(
                        "Expected '=' after parameter '{}'",
                        part.value
                    )));
                }
                (None, None) => {
                    let (key, value) = short_form(&part.value);
                    props.set(key.to_owned(), Typed::Text(value.to_owned()));
                }
            }
        }
        Ok(props)
    }

    /// Properties from a JSON object.
    pub fn from_json(value: Value) -> Result<Self, OptionError> {
        let Value::Object(members) = value else {
            return Err(OptionError::new("JSON parse error, expecting an object"));
        };
        Ok(Self {
            pairs: members
                .into_iter()
                .map(|(key, value)| (key, Typed::Json(value)))
                .collect(),
        })
    }

    /// Sets a property that was not typed.
    pub fn add(&mut self, key: &str, value: &str) {
        self.set(key.to_owned(), Typed::Text(value.to_owned()));
    }

    fn set(&mut self, key: String, value: Typed) {
        // A list has all that are typed.
        if !matches!(key.as_str(), "cpus" | "host-nodes") {
            self.pairs.retain(|(name, _)| *name != key);
        }
        self.pairs.push((key, value));
    }

    /// Whether a property is there and was not asked for.
    pub fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(name, _)| name == key)
    }

    /// Names of what nobody has asked for yet.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().map(|(name, _)| name.as_str())
    }

    fn take(&mut self, key: &str) -> Option<Typed> {
        let at = self.pairs.iter().position(|(name, _)| name == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// A text.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, OptionError> {
        match self.take(key) {
            None => Ok(None),
            Some(Typed::Text(text) | Typed::Json(Value::String(text))) => Ok(Some(text)),
            Some(Typed::Json(_)) => Err(wrong_type(key, "string")),
        }
    }

    /// A text that must be there.
    pub fn required(&mut self, key: &str) -> Result<String, OptionError> {
        self.text(key)?.ok_or_else(|| missing(key))
    }

    /// The id of a memory backend, which may be typed as the path of the object.
    pub fn backend(&mut self, key: &str) -> Result<Option<String>, OptionError> {
        let id = self.text(key)?;
        Ok(id.map(|id| id.strip_prefix("/objects/").unwrap_or(&id).to_owned()))
    }

    /// A switch.
    pub fn switch(&mut self, key: &str) -> Result<Option<bool>, OptionError> {
        match self.take(key) {
            None => Ok(None),
            Some(Typed::Json(Value::Bool(value))) => Ok(Some(value)),
            Some(Typed::Json(_)) => Err(wrong_type(key, "boolean")),
            Some(Typed::Text(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(expects(key, "'on' or 'off'")),
            },
        }
    }

    /// A size in bytes. A number without suffix counts units of `unit` bytes.
    pub fn size_in(&mut self, key: &str, unit: u64) -> Result<Option<u64>, OptionError> {
        match self.take(key) {
            None => Ok(None),
            Some(Typed::Json(value)) => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| expects(key, "uint64")),
            Some(Typed::Text(text)) => size::parse(&text, unit)
                .map(Some)
                .ok_or_else(|| expects(key, "a size value")),
        }
    }

    /// A size in bytes.
    pub fn size(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        self.size_in(key, 1)
    }

    /// A whole number that is not negative.
    pub fn number(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        match self.take(key) {
            None => Ok(None),
            Some(Typed::Json(value)) => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| wrong_type(key, "integer")),
            Some(Typed::Text(text)) => number(&text)
                .map(Some)
                .ok_or_else(|| expects(key, "a uint64 value")),
        }
    }

    /// A whole number that is not above `most`; `kind` is what QEMU calls such numbers.
    pub fn number_to(
        &mut self,
        key: &str,
        most: u32,
        kind: &str,
    ) -> Result<Option<u32>, OptionError> {
        match self.number(key)?.map(u32::try_from) {
            None => Ok(None),
            Some(Ok(value)) if value <= most => Ok(Some(value)),
            Some(_) => Err(expects(key, kind)),
        }
    }

    /// A whole number, as a device or the machine reads it; `shown` is how messages call it.
    pub fn integer(&mut self, key: &str, shown: &str) -> Result<Option<i64>, OptionError> {
        match self.take(key) {
            None => Ok(None),
            Some(Typed::Json(value)) => value
                .as_i64()
                .map(Some)
                .ok_or_else(|| wrong_type(shown, "integer")),
            Some(Typed::Text(text)) => integer(&text)
                .map(Some)
                .ok_or_else(|| expects(shown, "integer")),
        }
    }

    /// Numbers: one, a range `0-3`, or a list of such in JSON.
    pub fn numbers(&mut self, key: &str) -> Result<Vec<u64>, OptionError> {
        let wrong = || expects(key, "a uint64 value or range");
        let mut all = Vec::new();
        while let Some(one) = self.take(key) {
            all.extend(Self::list(one, wrong)?);
        }
        Ok(all)
    }

    fn list(typed: Typed, wrong: impl Fn() -> OptionError) -> Result<Vec<u64>, OptionError> {
        match typed {
            Typed::Json(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_u64().ok_or_else(&wrong))
                .collect(),
            Typed::Json(Value::Number(number)) => Ok(vec![number.as_u64().ok_or_else(&wrong)?]),
            Typed::Json(_) => Err(wrong()),
            Typed::Text(text) => {
                let (first, last) = text.split_once('-').unwrap_or((&text, &text));
                let (first, last) = (number(first), number(last));
                match first.zip(last) {
                    // QEMU's message names no parameter here.
                    Some((first, last)) if first <= last && last >= 1 << 16 => {
                        Err(expects("null", "uint16_t"))
                    }
                    Some((first, last)) if first <= last => Ok((first..=last).collect()),
                    _ => Err(wrong()),
                }
            }
        }
    }

    /// One of a few words.
    pub fn word(&mut self, key: &str, words: &[&str]) -> Result<Option<String>, OptionError> {
        match self.text(key)? {
            Some(word) if !words.contains(&word.as_str()) => Err(not_accepted(key, &word)),
            word => Ok(word),
        }
    }

    /// Refuses what nobody asked for.
    pub fn finish(&self) -> Result<(), OptionError> {
        match self.pairs.first() {
            Some((name, Typed::Text(_))) => Err(invalid_parameter(name)),
            Some((name, Typed::Json(_))) => Err(OptionError::new(format!(
                "Parameter '{name}' is unexpected"
            ))),
            None => Ok(()),
        }
    }
}

/// A whole number with a sign or not, which wraps as C's do: `addr=-1` is the last address.
fn integer(text: &str) -> Option<i64> {
    match text.strip_prefix('-') {
        Some(digits) => number(digits).and_then(|value| 0_i64.checked_sub_unsigned(value)),
        None => number(text.strip_prefix('+').unwrap_or(text)).map(u64::cast_signed),
    }
}

/// What a word without `=` means: on, or behind `no` off.
fn short_form(word: &str) -> (&str, &'static str) {
    match word.strip_prefix("no") {
        Some(key) => (key, "off"),
        None => (word, "on"),
    }
}

/// QEMU's warnings of words without `=`. `implied` is whether the first may stand alone.
pub fn short_forms(text: &str, implied: bool) -> Vec<String> {
    let parts = split(text).into_iter().skip(usize::from(implied));
    parts
        .filter(|part| part.key.is_none() && !matches!(part.value.as_str(), "help" | "?"))
        .map(|part| {
            let (key, value) = short_form(&part.value);
            let (named, value) = match (key, value) {
                ("delay", "off") => ("nodelay", "on"),
                ("delay", _) => ("nodelay", "off"),
                other => other,
            };
            let typed = &part.value;
            format!("warning: short-form boolean option '{typed}' deprecated\nPlease use {named}={value} instead")
        })
        .collect()
}

/// A decimal or, behind `0x`, hexadecimal number.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.bytes().all(|c| c.is_ascii_digit()) => text.parse().ok(),
        None => None,
    }
}

fn wrong_type(key: &str, expected: &str) -> OptionError {
    OptionError::new(format!(
        "Invalid parameter type for '{key}', expected: {expected}"
    ))
}

fn check_key(key: &str) -> Result<(), OptionError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !key.is_empty() && key.chars().all(allowed) {
        Ok(())
    } else {
        Err(invalid_parameter(key))
    }
}

/// An option that was typed again: what it says is added to what was said `before`. `implied` is the key
/// of a first value without one.
pub fn again(before: &str, text: &str, implied: &str) -> String {
    let named = text
        .split(',')
        .next()
        .is_some_and(|first| first.contains('='));
    match (before, named) {
        ("", _) => text.to_owned(),
        (_, true) => format!("{before},{text}"),
        (_, false) => format!("{before},{implied}={text}"),
    }
}

struct Part {
    key: Option<String>,
    value: String,
}

/// Cuts at single commas; a double one is part of a value, and the end of a key or of a word that
/// is none of the first.
fn split(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        let key = behind.strip_prefix('=').map(|_| word.to_owned());
        let (value, behind) = match behind.strip_prefix('=') {
            Some(value) => cut(value),
            None if parts.is_empty() => cut(rest),
            None => (word.to_owned(), behind.strip_prefix(',').unwrap_or(behind)),
        };
        parts.push(Part { key, value });
        rest = behind;
    }
    parts
}

/// A value, and what follows its comma.
fn cut(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if character == ',' && characters.next_if(|(_, next)| *next == ',').is_none() {
            return (value, text.get(at + 1..).unwrap_or_default());
        }
        value.push(character);
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn props(text: &str) -> Props {
        Props::parse(text, Some("qom-type"), Form::SwitchesOrJson).unwrap()
    }

    fn message<T: std::fmt::Debug>(result: Result<T, OptionError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn pairs_commas_and_the_implied_key() {
        let mut p = props("memory-backend-file,id=ram,mem-path=/a,,b=c,size=64M,share=on");
        assert_eq!(p.required("qom-type").unwrap(), "memory-backend-file");
        assert_eq!(p.required("mem-path").unwrap(), "/a,b=c");
        assert_eq!(p.size("size").unwrap(), Some(64 << 20));
        assert_eq!(p.switch("share").unwrap(), Some(true));
        assert_eq!(message(p.finish()), "Invalid parameter 'id'");
        assert_eq!(p.required("id").unwrap(), "ram");
        p.finish().unwrap();
        assert_eq!(message(p.required("id")), "Parameter 'id' is missing");
        assert_eq!(props("x,mem-path=").required("mem-path").unwrap(), "");
        assert_eq!(props("x,a=1,a=2").number("a").unwrap(), Some(2));
    }

    #[test]
    fn json_is_the_same() {
        let mut p = props(r#"{"qom-type": "m", "id": "ram", "size": 4096, "share": true}"#);
        assert_eq!(p.required("id").unwrap(), "ram");
        assert_eq!(p.size("size").unwrap(), Some(4096));
        assert_eq!(p.switch("share").unwrap(), Some(true));
        assert_eq!(props("{'id': 'a'}").required("id").unwrap(), "a");
        let twice = Props::parse(r#"{"a": 1, "a": 2}"#, None, Form::SwitchesOrJson);
        assert_eq!(message(twice), "JSON parse error, duplicate key");
        let mut p = props(r#"{"id": 5, "share": "on", "cpus": [0, 2]}"#);
        assert_eq!(
            message(p.required("id")),
            "Invalid parameter type for 'id', expected: string"
        );
        p.switch("share").unwrap_err();
        assert_eq!(p.numbers("cpus").unwrap(), [0, 2]);
    }

    #[test]
    fn what_is_wrong_is_said_as_qemu_says_it() {
        let parse = |text| Props::parse(text, None, Form::KeyValue);
        assert_eq!(message(parse("on")), "Expected '=' after parameter 'on'");
        assert_eq!(message(parse("a b=1")), "Invalid parameter 'a b'");
        let mut p = props("x,share=maybe,size=64X,rom=maybe");
        assert_eq!(
            message(p.switch("share")),
            "Parameter 'share' expects 'on' or 'off'"
        );
        assert_eq!(
            message(p.size("size")),
            "Parameter 'size' expects a size value"
        );
        assert_eq!(
            message(p.word("rom", &["on", "off", "auto"])),
            "Parameter 'rom' does not accept value 'maybe'"
        );
    }

    #[test]
    fn switches_may_stand_alone() {
        let mut p =
            Props::parse("socket,id=q,server,nowait", Some("backend"), Form::Switches).unwrap();
        assert_eq!(p.switch("server").unwrap(), Some(true));
        assert_eq!(p.switch("wait").unwrap(), Some(false));
        let warned = short_forms("socket,id=q,server,nowait", true);
        assert!(warned[0].contains("'server' deprecated\nPlease use server=on instead"));
        assert!(warned[1].contains("'nowait' deprecated\nPlease use wait=off instead"));
        assert_eq!(short_forms("socket", true).len(), 0);
    }

    #[test]
    fn an_option_that_is_typed_again_adds_to_the_first() {
        assert_eq!(again("", "64M", "size"), "64M");
        assert_eq!(
            again("64M", "slots=2,maxmem=1G", "size"),
            "64M,slots=2,maxmem=1G"
        );
        assert_eq!(again("slots=2", "64M", "size"), "slots=2,size=64M");
    }

    #[test]
    fn ranges_are_numbers() {
        assert_eq!(props("x,cpus=0-2").numbers("cpus").unwrap(), [0, 1, 2]);
        for wrong in ["2-0", "a", "", "0-99999999", "1-", "-1"] {
            let mut p = props(&format!("x,cpus={wrong}"));
            p.numbers("cpus").unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = short_forms(&text, true);
            for form in [Form::KeyValue, Form::Switches, Form::SwitchesOrJson] {
                if let Ok(mut props) = Props::parse(&text, Some("k"), form) {
                    let _ = (props.size("k"), props.finish());
                }
            }
        }

        #[test]
        fn any_value_survives_when_its_commas_are_doubled(value: String) {
            let text = format!("t,path={},x=1", value.replace(',', ",,"));
            prop_assert_eq!(props(&text).required("path").unwrap(), value);
        }
    }
}
