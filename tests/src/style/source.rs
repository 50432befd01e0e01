#![forbid(unsafe_code)]
//! Source files as text, with comments, strings and test modules told apart.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Folders and files at the top of the project that its authors write.
const TOP: [&str; 13] = [
    ".ci",
    ".config",
    "bench",
    "docs",
    "pager",
    "tests",
    "vmm",
    "Cargo.toml",
    "CHANGELOG.md",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "rustfmt.toml",
];

/// All files of the project.
#[derive(Debug)]
pub struct Project {
    /// Rust files.
    pub sources: Vec<SourceFile>,
    /// Every text file, Rust or not: path from the root, and content.
    pub texts: Vec<(String, String)>,
}

impl Project {
    /// Reads the project that this crate is part of.
    ///
    /// # Errors
    /// When a folder or file cannot be read.
    pub fn read() -> Result<Self> {
        let root = root()?;
        let mut paths = Vec::new();
        for name in TOP {
            collect(&root.join(name), &mut paths)?;
        }
        paths.sort();
        let mut project = Self {
            sources: Vec::new(),
            texts: Vec::new(),
        };
        for path in paths {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let Ok(text) = String::from_utf8(bytes) else {
                continue;
            };
            let name = path.strip_prefix(&root)?.to_string_lossy().into_owned();
            if path.extension().is_some_and(|extension| extension == "rs") {
                project.sources.push(SourceFile::new(&name, &text));
            }
            project.texts.push((name, text));
        }
        Ok(project)
    }
}

/// The folder of the workspace.
///
/// # Errors
/// Never, while this crate is in a workspace.
pub fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .map(Path::to_path_buf)
        .context("this crate is in no workspace")
}

fn collect(path: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        into.push(path.to_path_buf());
    } else if path.is_dir() {
        let entries =
            fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        for entry in entries {
            collect(&entry?.path(), into)?;
        }
    }
    Ok(())
}

/// One Rust file.
#[derive(Debug)]
pub struct SourceFile {
    /// Path from the root, with `/`.
    pub path: String,
    /// As it is on disk.
    pub text: String,
    /// The same lines with comments and the content of strings blanked.
    pub code: String,
    /// The same lines with comments blanked, and strings kept.
    pub strings: String,
    /// The number of the line at which `#[cfg(test)] mod` starts; past the end when there is none.
    pub tests_from: usize,
}

impl SourceFile {
    /// Takes a file's text apart.
    pub fn new(path: &str, text: &str) -> Self {
        let (code, strings) = blank(text);
        let lines: Vec<&str> = code.lines().collect();
        let tests_from = (0..lines.len())
            .find(|&at| {
                lines[at].trim() == "#[cfg(test)]"
                    && lines[at + 1..]
                        .iter()
                        .map(|line| line.trim())
                        .find(|line| !line.starts_with("#[") && !line.is_empty())
                        .is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
            })
            .map_or(lines.len() + 1, |at| at + 1);
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            code,
            strings,
            tests_from,
        }
    }

    /// Whether all of the file is test code.
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || self.path.ends_with("/tests.rs")
    }

    /// Lines of code that are not tests, with their numbers from 1.
    pub fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.code).take_while(|(number, _)| *number < self.tests_from)
    }

    /// The same with the content of strings.
    pub fn string_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.strings).take_while(|(number, _)| *number < self.tests_from)
    }

    /// The module that the file is, from its crate's root: `machine::build`; empty for the root.
    pub fn module(&self) -> String {
        let inner = self.path.split_once("/src/").map_or("", |(_, inner)| inner);
        let inner = inner.trim_end_matches(".rs").trim_end_matches("/mod");
        match inner {
            "lib" | "main" | "mod" => String::new(),
            other => other.replace('/', "::"),
        }
    }

    /// Every path with `::` that the file names outside its tests, absolute from the crate
    /// (`crate::a::b`) or from another crate (`std::fs`), with its line.
    pub fn paths(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        let end: usize = self
            .code
            .split_inclusive('\n')
            .take(self.tests_from - 1)
            .map(str::len)
            .sum();
        let code = &self.code[..end];
        let mut at = 0;
        while let Some(start) = next_word(code, at) {
            let word_end = word_end(code, start);
            let line = code[..start].matches('\n').count() + 1;
            at = word_end;
            if &code[start..word_end] == "use" {
                let stop = code[word_end..]
                    .find(';')
                    .map_or(code.len(), |stop| word_end + stop);
                expand("", &code[word_end..stop], &mut |path| {
                    found.push((line, path))
                });
                at = stop;
            } else if code[word_end..].starts_with("::") {
                while code[at..].starts_with("::")
                    && code[at + 2..].starts_with(|c: char| c.is_alphabetic() || c == '_')
                {
                    at = self::word_end(code, at + 2);
                }
                found.push((line, code[start..at].to_owned()));
                at = at.max(word_end);
            }
        }
        let module = self.module();
        found
            .into_iter()
            .map(|(line, path)| (line, absolute(&module, &path)))
            .collect()
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line))
}

fn next_word(code: &str, from: usize) -> Option<usize> {
    code[from..]
        .find(|c: char| c.is_alphabetic() || c == '_')
        .map(|at| from + at)
}

fn word_end(code: &str, start: usize) -> usize {
    code[start..]
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .map_or(code.len(), |length| start + length)
}

/// A `use` tree to the paths in it.
fn expand(prefix: &str, tree: &str, each: &mut impl FnMut(String)) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let name = tree.split(" as ").next().unwrap_or(tree).trim();
        if !name.is_empty() {
            each(format!("{prefix}{name}"));
        }
        return;
    };
    let inner = tree[open + 1..].trim_end().trim_end_matches('}');
    // Only the outermost brace of this tree was opened here: give back what belongs to inner ones.
    let closed = tree[open + 1..].matches('}').count() - inner.matches('}').count();
    let inner = format!("{inner}{}", "}".repeat(closed.saturating_sub(1)));
    let prefix = format!("{prefix}{}", &tree[..open].trim());
    let (mut depth, mut start) = (0, 0);
    for (at, character) in inner.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &inner[start..at], each);
                start = at + 1;
            }
            _ => {}
        }
    }
    expand(&prefix, &inner[start..], each);
}

/// `self::` and `super::` resolved against the module that names them.
fn absolute(module: &str, path: &str) -> String {
    let mut parts: Vec<&str> = module.split("::").filter(|part| !part.is_empty()).collect();
    let mut rest = path;
    let mut relative = false;
    loop {
        if let Some(inner) = rest.strip_prefix("self::") {
            rest = inner;
        } else if let Some(outer) = rest.strip_prefix("super::") {
            parts.pop();
            rest = outer;
        } else {
            break;
        }
        relative = true;
    }
    if !relative {
        return path.to_owned();
    }
    parts.insert(0, "crate");
    parts.push(rest);
    parts.join("::")
}

/// What the reader of a file is in the middle of.
#[derive(Clone, Copy, PartialEq)]
enum Within {
    Code,
    Line,
    Block(u32),
    Text,
    Raw(usize),
}

/// The text with comments and string contents blanked, and with comments alone blanked.
fn blank(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let (mut code, mut strings) = (bytes.to_vec(), bytes.to_vec());
    let mut within = Within::Code;
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let (next, length) = step(within, rest, at > 0 && is_word(bytes[at - 1]));
        let comment = |state| matches!(state, Within::Line | Within::Block(_));
        for place in at..(at + length).min(bytes.len()) {
            if bytes[place] == b'\n' {
                continue;
            }
            if comment(within) || comment(next) {
                strings[place] = b' ';
            }
            if within != Within::Code || next != Within::Code || length > 1 {
                code[place] = b' ';
            }
        }
        within = next;
        at += length;
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (text(code), text(strings))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The next state, and how many bytes belong to the step.
fn step(within: Within, rest: &[u8], after_word: bool) -> (Within, usize) {
    match within {
        Within::Code if rest.starts_with(b"//") => (Within::Line, 2),
        Within::Code if rest.starts_with(b"/*") => (Within::Block(1), 2),
        Within::Code if rest[0] == b'"' => (Within::Text, 1),
        Within::Code if rest[0] == b'r' && !after_word => raw(rest),
        Within::Code if rest[0] == b'\'' => (Within::Code, character(rest)),
        Within::Line if rest[0] == b'\n' => (Within::Code, 1),
        Within::Block(depth) if rest.starts_with(b"/*") => (Within::Block(depth + 1), 2),
        Within::Block(1) if rest.starts_with(b"*/") => (Within::Code, 2),
        Within::Block(depth) if rest.starts_with(b"*/") => (Within::Block(depth - 1), 2),
        Within::Text if rest[0] == b'\\' => (Within::Text, 2),
        Within::Text if rest[0] == b'"' => (Within::Code, 1),
        Within::Raw(hashes) if rest[0] == b'"' && rest[1..].starts_with(&vec![b'#'; hashes]) => {
            (Within::Code, 1 + hashes)
        }
        other => (other, 1),
    }
}

/// `r"`, `r#"`: the start of a raw string, or only the letter.
fn raw(rest: &[u8]) -> (Within, usize) {
    let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
    match rest.get(1 + hashes) {
        Some(b'"') => (Within::Raw(hashes), 2 + hashes),
        _ => (Within::Code, 1),
    }
}

/// The length of a character literal; 1 when the quote starts a lifetime.
fn character(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        return rest
            .iter()
            .skip(3)
            .position(|byte| *byte == b'\'')
            .map_or(1, |at| at + 4);
    }
    // One character of up to four bytes, then the closing quote.
    (2..=5)
        .find(|&at| rest.get(at) == Some(&b'\'') && single(&rest[1..at]))
        .map_or(1, |at| at + 1)
}

fn single(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.chars().count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_not_code() {
        let file = SourceFile::new(
            "a/src/b.rs",
            "let a = \"unsafe // no\"; // unsafe\nlet b = r#\"un\"safe\"#; /* unsafe /* x */ */ let c = '\"';\nlet d: &'a str;\n",
        );
        assert!(!file.code.contains("unsafe"), "{}", file.code);
        assert!(file.code.contains("let c ="), "{}", file.code);
        assert!(file.code.contains("let d: &'a str;"), "{}", file.code);
        assert!(file.strings.contains("unsafe // no"));
        assert_eq!(file.text.len(), file.code.len());
    }

    #[test]
    fn use_trees_and_relative_paths_are_resolved() {
        let file = SourceFile::new(
            "vmm/src/machine/build.rs",
            "use std::{fs, io::{self, Read}};\nuse super::state::A;\nfn f() { crate::kvm::vm::new(); self::x::y() }\n#[cfg(test)]\nmod tests {\n    use std::net;\n}\n",
        );
        let paths: Vec<String> = file.paths().into_iter().map(|(_, path)| path).collect();
        assert_eq!(
            paths,
            [
                "std::fs",
                "std::io::self",
                "std::io::Read",
                "crate::machine::state::A",
                "crate::kvm::vm::new",
                "crate::machine::build::x::y",
            ]
        );
    }

    #[test]
    fn a_module_is_named_after_its_file() {
        let module = |path| SourceFile::new(path, "").module();
        assert_eq!(module("vmm/src/lib.rs"), "");
        assert_eq!(module("vmm/src/kvm/mod.rs"), "kvm");
        assert_eq!(module("vmm/src/arch/x86_64/boot.rs"), "arch::x86_64::boot");
    }
}
