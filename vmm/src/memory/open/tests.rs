#![forbid(unsafe_code)]
use std::os::unix::fs::symlink;

use rustix::fs::fcntl_getfl;

use super::*;
use crate::spec::{BackendKind, BackendOptions, OnOffAuto};

const MIB: u64 = 1 << 20;

/// A backend of 1 MiB on `path`.
fn backend(path: &Path, share: bool, readonly: bool, rom: OnOffAuto) -> BackendSpec {
    BackendSpec::from_options(BackendOptions {
        kind: BackendKind::File,
        id: "m0".into(),
        path: Some(path.to_owned()),
        bytes: MIB,
        share: Some(share),
        readonly,
        rom,
        ..BackendOptions::default()
    })
    .unwrap()
}

fn template(path: &Path) -> BackendSpec {
    backend(path, true, false, OnOffAuto::Auto)
}

fn private(path: &Path) -> BackendSpec {
    backend(path, false, false, OnOffAuto::Auto)
}

fn clone(path: &Path) -> BackendSpec {
    backend(path, false, true, OnOffAuto::Off)
}

fn opened(backend: &BackendSpec) -> Result<OpenedFile, OpenError> {
    open(backend, backend.file().unwrap())
}

fn refused(backend: &BackendSpec) -> String {
    opened(backend).unwrap_err().to_string()
}

fn writes(file: &File) -> bool {
    fcntl_getfl(file).unwrap().intersects(OFlags::RDWR)
}

#[test]
fn only_a_template_is_open_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m0");
    let file = opened(&template(&path)).unwrap();
    assert!(writes(&file.file));
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
    drop(file);
    for other in [
        private(&path),
        clone(&path),
        backend(&path, false, true, OnOffAuto::On),
        backend(&path, true, true, OnOffAuto::Auto),
    ] {
        assert!(!writes(&opened(&other).unwrap().file), "{other:?}");
    }
    let made = dir.path().join("made");
    assert!(!writes(&opened(&private(&made)).unwrap().file));
    assert_eq!(fs::metadata(&made).unwrap().len(), MIB);
}

#[test]
fn a_template_in_use_is_nobody_elses_and_clones_share() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m0");
    let running = opened(&template(&path)).unwrap();
    assert!(refused(&clone(&path)).contains("in use by the machine that is its template"));
    assert!(refused(&template(&path)).contains("in use by another machine"));
    drop(running);
    let first = opened(&clone(&path)).unwrap();
    let second = opened(&private(&path)).unwrap();
    assert!(refused(&template(&path)).contains("in use by another machine"));
    drop((first, second));
    opened(&template(&path)).unwrap();
}

#[test]
fn what_a_failed_call_made_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m0");
    let far = BackendSpec::from_options(BackendOptions {
        kind: BackendKind::File,
        id: "m0".into(),
        path: Some(path.clone()),
        bytes: 1 << 62,
        share: Some(true),
        ..BackendOptions::default()
    });
    let text = refused(&far.unwrap());
    assert!(text.starts_with("cannot make long enough"), "{text}");
    assert!(!path.exists());
}

#[test]
fn links_devices_and_directories() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    symlink("nothing", &link).unwrap();
    for dangling in [template(&link), private(&link)] {
        let text = refused(&dangling);
        assert!(
            text.contains("link to a file that does not exist"),
            "{text}"
        );
    }
    assert!(refused(&clone(&link)).ends_with("for guest RAM: No such file or directory"));
    assert!(!dir.path().join("nothing").exists());
    let text = refused(&clone(Path::new("/dev/zero")));
    assert!(text.contains("/dev/zero is a device"), "{text}");
    assert!(refused(&clone(dir.path())).ends_with("for guest RAM: Is a directory"));
    assert!(opened(&template(dir.path())).unwrap().is_nameless);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "only the link"
    );
}

#[test]
fn a_clone_on_nothing_is_refused_and_an_empty_template_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m0");
    fs::write(&path, b"").unwrap();
    let text = refused(&clone(&path));
    assert!(text.contains("is empty: a clone begins as"), "{text}");
    drop(opened(&template(&path)).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
    fs::write(&path, b"x").unwrap();
    for short in [template(&path), private(&path), clone(&path)] {
        let text = refused(&short);
        assert!(
            text.contains(
                "m0 backing store size 0x1 is too small for 'size' option 0x100000 plus 'offset' option 0x0"
            ),
            "{text}"
        );
    }
    assert_eq!(fs::read(&path).unwrap(), b"x");
}
