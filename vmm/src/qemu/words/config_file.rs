#![forbid(unsafe_code)]
//! The file of `-readconfig`: groups of properties, each an option.
//!
//! ```text
//! [object "ram"]
//!   qom-type = "memory-backend-file"
//!   size = "64M"
//! ```

use crate::qemu::error::OptionError;

/// Most bytes of a file that are read.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// One group: an option and its text in the form of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The option's name, without `-`.
    pub option: String,
    /// What would be typed behind it.
    pub text: String,
}

/// Takes a file apart. `path` is for messages, which count lines.
pub fn parse(path: &str, content: &str) -> Result<Vec<Group>, OptionError> {
    let mut groups: Vec<Group> = Vec::new();
    for (number, line) in (1..).zip(content.lines()) {
        let line = line.trim();
        let wrong = |message: &str| OptionError::new(message).at(&format!("{path}:{number}"));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let header = header
                .strip_suffix(']')
                .ok_or_else(|| wrong("parse error"))?;
            groups.push(group(header).ok_or_else(|| wrong("parse error"))?);
            continue;
        }
        let (key, value) = line
            .split_once('=')
            .and_then(|(key, value)| Some((key.trim(), unquote(value.trim())?)))
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| wrong("parse error"))?;
        let group = groups.last_mut().ok_or_else(|| wrong("no group defined"))?;
        if !group.text.is_empty() {
            group.text.push(',');
        }
        group.text.push_str(key);
        group.text.push('=');
        group.text.push_str(&value.replace(',', ",,"));
    }
    Ok(groups)
}

/// `object "ram"`, or `machine`.
fn group(header: &str) -> Option<Group> {
    let mut words = header.splitn(2, ' ');
    let option = words.next().filter(|word| !word.is_empty())?.to_owned();
    let text = match words.next() {
        Some(id) => format!("id={}", unquote(id.trim())?.replace(',', ",,")),
        None => String::new(),
    };
    Some(Group { option, text })
}

fn unquote(text: &str) -> Option<&str> {
    text.strip_prefix('"')?.strip_suffix('"')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_become_options() {
        let file = "# a template\n[object \"ram\"]\n  qom-type = \"memory-backend-file\"\n  \
                    mem-path = \"/a,b\"\n\n[machine]\n  type = \"q35\"\n";
        let groups = parse("f", file).unwrap();
        assert_eq!(groups[0].option, "object");
        assert_eq!(
            groups[0].text,
            "id=ram,qom-type=memory-backend-file,mem-path=/a,,b"
        );
        assert_eq!(groups[1].text, "type=q35");
    }

    #[test]
    fn what_is_wrong_is_named_by_its_line() {
        let message = |text| parse("f", text).unwrap_err().to_string();
        assert_eq!(message("a = \"b\""), "f:1: no group defined");
        assert_eq!(message("[m]\nx = y"), "f:2: parse error");
        assert_eq!(message("\n[m"), "f:2: parse error");
        assert_eq!(message("[]"), "f:1: parse error");
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = parse("f", &text);
        }
    }
}
