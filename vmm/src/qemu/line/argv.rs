#![forbid(unsafe_code)]
//! From the argument vector to options: which there are and what follows them.

use super::{options, refused};
use crate::qemu::error::OptionError;
use crate::qemu::words::{config_file, short_forms};

/// One option as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the table.
    pub name: &'static str,
    /// What follows it; empty for a switch.
    pub value: String,
    /// How messages quote it.
    pub typed: String,
}

impl Argument {
    /// QEMU's warnings of the way in which it is typed.
    pub fn warnings(&self) -> Vec<String> {
        let (text, implied) = match (self.name, self.value.split_once(':')) {
            ("object" | "device" | "numa" | "chardev" | "mon" | "m" | "name" | "accel", _) => {
                (self.value.as_str(), true)
            }
            ("smbios" | "msg", _) => (self.value.as_str(), false),
            ("serial" | "monitor" | "qmp" | "qmp-pretty", Some(("unix" | "tcp", rest))) => {
                (rest, true)
            }
            _ => return Vec::new(),
        };
        if text.starts_with('{') {
            return Vec::new();
        }
        let warnings = short_forms(text, implied).into_iter();
        warnings
            .map(|warning| format!("{}: {warning}", self.typed))
            .collect()
    }
}

/// Most options that are read.
pub const MAX_ARGUMENTS: usize = 4096;

/// Reads an argument vector without the program's name. `read_file` brings the content of a file
/// that `-readconfig` names.
pub fn arguments(
    words: &[String],
    read_file: &mut dyn FnMut(&str) -> Result<String, String>,
) -> Result<Vec<Argument>, OptionError> {
    let mut found = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if found.len() >= MAX_ARGUMENTS {
            return Err(OptionError::new(format!(
                "there are more than {MAX_ARGUMENTS} options"
            )));
        }
        let argument = argument(word, &mut words)?;
        if argument.name == "readconfig" {
            let content = read_file(&argument.value)
                .map_err(|why| OptionError::new(why).at(&argument.typed))?;
            for group in config_file::parse(&argument.value, &content)? {
                found.push(from_group(&argument, &group)?);
            }
        } else {
            found.push(argument);
        }
    }
    Ok(found)
}

fn argument<'a>(
    word: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Argument, OptionError> {
    let Some(name) = word.strip_prefix('-') else {
        let text = format!(
            "{word}: an image needs its option: say -drive file={word},if=virtio,format=raw"
        );
        return Err(OptionError::new(text));
    };
    // QEMU takes two dashes like one.
    let name = name.strip_prefix('-').unwrap_or(name);
    let (info, takes_argument) = match options::find(name) {
        Some(info) => (info, info.takes_argument()),
        None => return Err(unknown(word, name)),
    };
    if !takes_argument {
        return Ok(Argument {
            name: info.name,
            value: String::new(),
            typed: word.to_owned(),
        });
    }
    let value = rest
        .next()
        .ok_or_else(|| OptionError::new("requires an argument").at(word))?;
    Ok(Argument {
        name: info.name,
        value: value.clone(),
        typed: format!("{word} {value}"),
    })
}

fn unknown(word: &str, name: &str) -> OptionError {
    match refused::option(name) {
        Some(refused) => {
            OptionError::new(format!("Pando does not have it: {}", refused.instead)).at(word)
        }
        None => OptionError::new("invalid option").at(word),
    }
}

fn from_group(argument: &Argument, group: &config_file::Group) -> Result<Argument, OptionError> {
    // QEMU calls these groups by other names than their options.
    let name = match group.option.as_str() {
        "memory" => "m",
        "smp-opts" => "smp",
        other => other,
    };
    let typed = format!("{} [{}]", argument.typed, group.option);
    match options::find(name) {
        Some(info) if info.takes_argument() && info.name != "readconfig" => Ok(Argument {
            name: info.name,
            value: group.text.clone(),
            typed,
        }),
        _ => Err(match refused::option(name) {
            Some(refused) => {
                OptionError::new(format!("Pando does not have it: {}", refused.instead)).at(&typed)
            }
            None => OptionError::new(format!("There is no option group '{}'", group.option))
                .at(&argument.typed),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Vec<Argument>, OptionError> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        arguments(&words, &mut |path| match path {
            "ok" => Ok("[machine]\ntype = \"q35\"\n".to_owned()),
            _ => Err("No such file or directory".to_owned()),
        })
    }

    fn message(words: &[&str]) -> String {
        read(words).unwrap_err().to_string()
    }

    #[test]
    fn options_have_one_or_two_dashes() {
        let found = read(&["-m", "64M", "--nographic", "-readconfig", "ok"]).unwrap();
        let names: Vec<_> = found.iter().map(|argument| argument.name).collect();
        assert_eq!(names, ["m", "nographic", "machine"]);
        assert_eq!(found[0].value, "64M");
        assert_eq!(found[2].value, "type=q35");
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        assert_eq!(message(&["-frob"]), "-frob: invalid option");
        assert_eq!(message(&["-m"]), "-m: requires an argument");
        assert!(message(&["disk.img"]).contains("-drive file=disk.img,if=virtio"));
        assert!(message(&["-mem-path", "/t"]).contains("cannot be used for VM templating"));
        assert!(message(&["-hda", "x"]).starts_with("-hda: Pando does not have it"));
        assert_eq!(
            message(&["-readconfig", "none"]),
            "-readconfig none: No such file or directory"
        );
    }
}
