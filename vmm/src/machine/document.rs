#![forbid(unsafe_code)]
//! What a document says: a tar archive of small files, which any guest can unpack and a shell can read.

use std::io;

use crate::device::virtio::block::document::MAX_DOCUMENT_BYTES;
use crate::spec::Uuid;

/// Most bytes of a file's name: what the oldest form of archive has room for.
const MAX_NAME_BYTES: usize = 99;
/// A file's head, and what its content is rounded up to.
const BLOCK_BYTES: usize = 512;
/// What ends an archive.
const END_BYTES: usize = 2 * BLOCK_BYTES;

/// The last file.
const END: &str = "end";

/// What a machine is to its template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is becoming one.
    Template,
    /// It is made of one.
    Clone,
    /// Neither.
    Machine,
}

impl Role {
    /// The role as a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Clone => "clone",
            Self::Machine => "machine",
        }
    }
}

/// Files by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document(Vec<(String, Vec<u8>)>);

impl Document {
    /// What every machine is told: `role`, and `uuid` where it has one.
    pub fn of(role: Role, uuid: Option<Uuid>) -> Self {
        let mut document = Self(Vec::new());
        document.say("role", role.word());
        if let Some(uuid) = uuid {
            document.say("uuid", &uuid.to_string());
        }
        document
    }

    /// Adds a line of text, or replaces what was there.
    pub fn say(&mut self, name: &str, line: &str) {
        self.put(name, format!("{line}\n").into_bytes());
    }

    /// Adds a file, or replaces what was there.
    pub fn put(&mut self, name: &str, content: Vec<u8>) {
        self.0.retain(|(other, _)| other != name);
        self.0.push((name.to_owned(), content));
    }

    /// Whether there is a file of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(other, _)| other == name)
    }

    /// How long the archive is.
    pub fn bytes(&self) -> usize {
        let file = |content: &[u8]| BLOCK_BYTES + content.len().next_multiple_of(BLOCK_BYTES);
        let files: usize = self.0.iter().map(|(_, content)| file(content)).sum();
        files + file(&[]) + END_BYTES
    }

    /// The archive (POSIX.1-1988 `ustar`), in the order in which files were added, and an empty file [`END`]
    /// behind all: who sees less than the whole disk sees that. What has no good name is left out: whoever
    /// adds proves that before.
    pub fn archive(&self) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::with_capacity(self.bytes()));
        let end = (END.to_owned(), Vec::new());
        for (name, content) in self.0.iter().chain([&end]) {
            if let Err(error) = append(&mut archive, name, content) {
                tracing::error!(name, "it is not in the document: {error}");
            }
        }
        // Into memory: there is no way to fail.
        archive.into_inner().unwrap_or_default()
    }
}

fn append(archive: &mut tar::Builder<Vec<u8>>, name: &str, content: &[u8]) -> io::Result<()> {
    let mut head = tar::Header::new_ustar();
    head.set_path(name)?;
    head.set_size(content.len() as u64);
    // Secrets may be among them.
    head.set_mode(0o600);
    head.set_cksum();
    archive.append(&head, content)
}

/// Proves that a file of a document can be called so: a path below where it is unpacked, of names that need
/// no care in a shell.
pub fn check_name(name: &str) -> Result<(), String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+@".contains(&byte);
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_plain);
    if name.len() > MAX_NAME_BYTES || !name.split('/').all(is_part) {
        return Err(format!(
            "{name:?} is no name of a file in a document: at most {MAX_NAME_BYTES} letters, digits and \
             any of -_.+@, in parts between single slashes that do not begin with '.'"
        ));
    }
    Ok(())
}

/// Proves that a document can be given to a guest.
pub fn check_size(document: &Document) -> Result<(), String> {
    match document.bytes() {
        bytes if bytes > MAX_DOCUMENT_BYTES => Err(format!(
            "the document has {bytes} bytes, at most {MAX_DOCUMENT_BYTES} can be given to a guest: leave files out"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn unpacked(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut archive = tar::Archive::new(bytes);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            assert_eq!(entry.header().mode().unwrap(), 0o600, "{name}");
            (name, content)
        });
        entries.collect()
    }

    #[test]
    fn what_was_said_is_unpacked() {
        let mut document = Document::of(Role::Clone, Some(Uuid([0x11; 16])));
        document.say("hostname", "a");
        document.put("opt/com.example/key", vec![7; 1000]);
        document.say("hostname", "b");
        let archive = document.archive();
        assert_eq!(archive.len(), document.bytes());
        let uuid = b"11111111-1111-1111-1111-111111111111\n".to_vec();
        let expected = [
            ("role", b"clone\n".to_vec()),
            ("uuid", uuid),
            ("opt/com.example/key", vec![7; 1000]),
            ("hostname", b"b\n".to_vec()),
            (END, Vec::new()),
        ];
        let found = unpacked(&archive);
        let found: Vec<_> = found
            .iter()
            .map(|(name, content)| (name.as_str(), content.clone()))
            .collect();
        assert_eq!(found, expected);
        assert!(document.has("role") && !document.has("opt"));
    }

    #[test]
    fn names_stay_below_where_they_are_unpacked() {
        for good in ["a", "opt/com.example/key_1", "x+y@z"] {
            check_name(good).unwrap();
        }
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for bad in [
            "",
            "/etc/passwd",
            "a/../b",
            ".ssh/x",
            "a//b",
            "a/",
            "a b",
            "ä",
            "a\n",
            &long,
        ] {
            let error = check_name(bad).unwrap_err();
            assert!(error.contains("no name of a file"), "{error}");
        }
    }

    #[test]
    fn a_document_is_no_disk() {
        let mut document = Document::of(Role::Machine, None);
        check_size(&document).unwrap();
        document.put("big", vec![0; MAX_DOCUMENT_BYTES]);
        assert!(
            check_size(&document)
                .unwrap_err()
                .contains("leave files out")
        );
    }
}
