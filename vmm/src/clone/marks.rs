#![forbid(unsafe_code)]
//! By what a clone is told apart from others of its template: its UUID, and the document that says it all.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::control::WorkerConfig;
use super::instantiate::CloneError;
use super::nets;
use crate::device::virtio::block::document::MAX_DOCUMENT_BYTES;
use crate::machine::{Document, Marks, Role, check_document_name, check_document_size};
use crate::spec::{DeviceSpec, MachineSpec, Uuid};
use crate::template::Template;

/// What stands for a clone's number in a path.
const NUMBER: &str = "%d";
/// Names of files that are not the caller's to choose.
const OWN: [&str; 7] = ["role", "clone", "template", "uuid", "cid", "entropy", "end"];
/// How many random bytes a clone is given to stir into what its guest draws from.
const ENTROPY_BYTES: usize = 64;

/// A file of all clones' documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentPattern {
    /// What it is called in the document.
    pub name: String,
    /// Where its content is; `%d` is a clone's number.
    pub path: PathBuf,
}

/// A file of one clone's document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentPlan {
    /// What it is called.
    pub name: String,
    /// Where its content is.
    #[serde(with = "super::control::path_bytes")]
    pub path: PathBuf,
}

impl DocumentPattern {
    fn plan(&self, clone: u64) -> DocumentPlan {
        let path = match self.path.to_str() {
            Some(text) => text.replace(NUMBER, &clone.to_string()).into(),
            // No text: no place for a number.
            None => self.path.clone(),
        };
        DocumentPlan {
            name: self.name.clone(),
            path,
        }
    }
}

/// The files of a clone's document.
pub fn plans(patterns: &[DocumentPattern], clone: u64) -> Vec<DocumentPlan> {
    patterns.iter().map(|pattern| pattern.plan(clone)).collect()
}

/// Refuses files that no clone of the machine can be given.
pub fn check(patterns: &[DocumentPattern], spec: &MachineSpec) -> Result<(), String> {
    if !patterns.is_empty() && !has_document(spec) {
        return Err("the template has no document: create it with --document".to_owned());
    }
    for (at, pattern) in patterns.iter().enumerate() {
        let name = pattern.name.as_str();
        check_document_name(name)?;
        if OWN.contains(&name) || name.starts_with("mac-") {
            return Err(format!(
                "{name:?} is a file that every document has: choose another name"
            ));
        }
        let before = || patterns.iter().take(at).map(|other| other.name.as_str());
        if before().any(|other| other == name) {
            return Err(format!("{name:?} is given twice"));
        }
        let is_below = |one: &str, other: &str| {
            one.strip_prefix(other)
                .is_some_and(|rest| rest.starts_with('/'))
        };
        let own = OWN.into_iter().chain(["hostname"]);
        let mut others = own.chain(before());
        if let Some(other) = others.find(|other| is_below(name, other) || is_below(other, name)) {
            return Err(format!(
                "{name:?} and {other:?} cannot both be there: one is a folder of the other"
            ));
        }
    }
    Ok(())
}

fn has_document(spec: &MachineSpec) -> bool {
    spec.devices().iter().any(DeviceSpec::is_document)
}

/// The UUID of a clone: the same for the same clone of the same template, and another one for any other
/// (RFC 9562, version 8).
pub fn derived_uuid(template: &Template, clone: u64) -> Uuid {
    let mut hash = Sha256::new();
    hash.update(b"pando uuid\0");
    hash.update(&template.manifest().file().state.digest);
    hash.update(clone.to_le_bytes());
    let digest = hash.finalize();
    let mut bytes = [0; 16];
    for (place, byte) in bytes.iter_mut().zip(digest) {
        *place = byte;
    }
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Uuid(bytes)
}

/// What a clone is given.
pub(super) fn of(template: &Template, config: &WorkerConfig) -> Result<Marks, CloneError> {
    let spec = template.spec();
    let uuid = derived_uuid(template, config.clone);
    let document = has_document(spec).then(|| document(template, config, uuid));
    Ok(Marks {
        uuid: spec.identity().tells_guest().then_some(uuid),
        document: document.transpose()?,
    })
}

fn document(template: &Template, config: &WorkerConfig, uuid: Uuid) -> Result<Vec<u8>, CloneError> {
    let failed = |why: String| CloneError::Document(why);
    let mut document = Document::of(Role::Clone, Some(uuid));
    document.say("clone", &config.clone.to_string());
    document.say("template", &template.name());
    document.say("hostname", &format!("clone-{}", config.clone));
    let cid = config.vsock.cid(config.clone, template.spec())?;
    if let Some(cid) = cid {
        document.say("cid", &cid.to_string());
    }
    for (id, mac) in nets::addresses(template, config) {
        document.say(&format!("mac-{id}"), &mac.to_string());
    }
    let mut entropy = vec![0; ENTROPY_BYTES];
    // So few bytes always come at once.
    getrandom(&mut entropy, GetRandomFlags::empty())
        .map_err(|errno| failed(format!("there is no entropy for it: {errno}")))?;
    document.put("entropy", entropy);
    for plan in &config.documents {
        let content = content(&plan.path).map_err(|error| {
            failed(format!(
                "{}: cannot read {}: {error}",
                plan.name,
                plan.path.display()
            ))
        })?;
        document.put(&plan.name, content);
    }
    check_document_size(&document).map_err(failed)?;
    Ok(document.archive())
}

/// The content of a file of a document. Nothing is waited for, and no more is read than a document can have.
fn content(path: &Path) -> io::Result<Vec<u8>> {
    // A FIFO would wait for its other end.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut content = Vec::new();
    let most = MAX_DOCUMENT_BYTES as u64;
    if file.take(most + 1).read_to_end(&mut content)? as u64 > most {
        return Err(io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, CpuCount, DeviceKind, DeviceParts};

    fn spec(has_document: bool) -> MachineSpec {
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let part = DeviceParts {
            id: None,
            slot: None,
            kind: DeviceKind::Document,
        };
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        let parts = has_document.then_some(part).into_iter().collect();
        spec.with_devices(parts).unwrap()
    }

    fn pattern(name: &str, path: &str) -> DocumentPattern {
        DocumentPattern {
            name: name.to_owned(),
            path: path.into(),
        }
    }

    #[test]
    fn each_clone_has_its_file() {
        let patterns = [pattern("opt/key", "/keys/%d.key"), pattern("hostname", "h")];
        check(&patterns, &spec(true)).unwrap();
        let plans = plans(&patterns, 12);
        assert_eq!(plans[0].path, PathBuf::from("/keys/12.key"));
        assert_eq!(
            (plans[1].name.as_str(), plans[1].path.to_str()),
            ("hostname", Some("h"))
        );
    }

    #[test]
    fn a_file_that_is_none_or_has_no_end_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).unwrap();
        for path in [fifo.as_path(), folder.path(), Path::new("/dev/zero")] {
            let error = content(path).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
        let big = folder.path().join("big");
        let file = File::create(&big).unwrap();
        file.set_len(MAX_DOCUMENT_BYTES as u64).unwrap();
        assert_eq!(content(&big).unwrap().len(), MAX_DOCUMENT_BYTES);
        file.set_len(1 << 40).unwrap();
        let error = content(&big).unwrap_err().to_string();
        assert!(error.contains("more than 4194304 bytes"), "{error}");
    }

    #[test]
    fn files_that_no_clone_can_be_given_are_refused() {
        let fault = |patterns: &[DocumentPattern]| check(patterns, &spec(true)).unwrap_err();
        assert!(fault(&[pattern("../x", "f")]).contains("no name of a file"));
        assert!(fault(&[pattern("uuid", "f")]).contains("every document has"));
        assert!(fault(&[pattern("mac-net0", "f")]).contains("every document has"));
        assert!(fault(&[pattern("a", "f"), pattern("a", "g")]).contains("twice"));
        for two in [["a", "a/b"], ["a/b/c", "a/b"], ["hostname/x", "y"]] {
            let both = fault(&two.map(|name| pattern(name, "f")));
            assert!(both.contains("cannot both be there"), "{both}");
        }
        check(
            &["a", "a-b", "ab/c"].map(|name| pattern(name, "f")),
            &spec(true),
        )
        .unwrap();
        let none = check(&[pattern("a", "f")], &spec(false)).unwrap_err();
        assert!(none.contains("create it with --document"), "{none}");
        check(&[], &spec(false)).unwrap();
    }
}
