#![forbid(unsafe_code)]
//! The recorded cases of QEMU 10.0.2, each as far as memory backends go: accepted or refused, the
//! message, and what becomes of the file.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use pando_pager::PagerOptions;
use pando_vmm::memory::provide::{MachineMemory, provide};
use serde_json::Value;

use crate::words::machine;

const CASES: &str = include_str!("qemu-cases.json");

/// Where a refusal takes the place of what QEMU does: a crash, a hang, or a machine that cannot work.
const IMPROVED: [(&str, &str); 5] = [
    ("tpl-empty-ro", "is empty: a clone begins as the file"),
    ("tpl-symlink-dangling", "link to a file that does not exist"),
    ("tpl-prealloc-rom", "prealloc=on writes to every page"),
    (
        "tpl-prealloc-rom-shared",
        "prealloc=on writes to every page",
    ),
    ("clone-norom", "add rom=off for a clone of its file"),
];
fn text_of(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn args(case: &Value) -> Vec<String> {
    let args = case["args"].as_array().unwrap();
    args.iter()
        .map(|arg| arg.as_str().unwrap().to_owned())
        .collect()
}

fn shell(script: &str, dir: &Path) -> String {
    let output = Command::new("sh")
        .args(["-c", script])
        .env("D", dir)
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The message without the program's name and without the option that it is about.
fn core(stderr: &str, dir: &Path) -> String {
    let line = stderr.lines().next().unwrap_or_default();
    let line = line.strip_prefix("qemu-system-x86_64: ").unwrap_or(line);
    let about = ["-object ", "-device ", "-numa "];
    let line = match line.split_once(": ") {
        Some((option, rest)) if about.iter().any(|about| option.starts_with(about)) => rest,
        _ => line,
    };
    line.replace("$D", dir.to_str().unwrap())
}

/// Makes the machine's memory; the whole message where that is refused.
fn attempt(case: &Value, dir: &Path) -> Result<MachineMemory, String> {
    let spec = machine(&args(case), dir).map_err(|error| error.to_string())?;
    provide(&spec, PagerOptions::default()).map_err(|error| error.to_string())
}

fn entries(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// What the case looks at afterwards, without what differs between file systems.
fn comparable(text: &str) -> String {
    let keep = |word: &&str| !word.starts_with("blocks=");
    let lines = text.trim().lines();
    lines
        .map(|line| line.split(' ').filter(keep).collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n")
}

fn check(case: &Value) {
    let id = text_of(case, "id");
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    shell(&text_of(case, "setup"), dir);
    let before = entries(dir);
    let result = attempt(case, dir);
    let improved = IMPROVED.iter().find(|(name, _)| *name == id);
    if let Some((_, text)) = improved {
        let error = result.map(|_| ()).unwrap_err();
        assert!(error.contains(text), "{id}: {error}");
        assert_eq!(entries(dir), before, "{id}");
        return;
    }
    if case["expect_exit"] == 1 {
        let error = result.map(|_| ()).unwrap_err();
        let expected = core(&text_of(case, "stderr"), dir);
        assert!(
            error.contains(&expected),
            "{id}: {expected:?} is not in {error:?}"
        );
        assert_eq!(
            entries(dir),
            before,
            "{id}: a refusal leaves nothing behind"
        );
        return;
    }
    assert_eq!(case["expect_exit"], 0, "{id}");
    let memory = result.unwrap_or_else(|error| panic!("{id}: {error}"));
    drop(memory);
    let script = text_of(case, "check");
    // A listing with dates is for people.
    if !script.is_empty() && script != "ls -l $D" {
        let found = comparable(&shell(&script, dir)).replace(dir.to_str().unwrap(), "$D");
        assert_eq!(found, comparable(&text_of(case, "expect_check")), "{id}");
    }
}

#[test]
fn every_case_has_qemus_outcome_or_is_listed_as_better() {
    // As it was when the cases were recorded; no test of this program makes files of another mode.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let document: Value = serde_json::from_str(CASES).unwrap();
    let cases = document["cases"].as_array().unwrap();
    assert!(cases.len() > 70);
    cases.iter().for_each(check);
}

/// Whether this process has `path` open for writing: `None` where it has not at all.
fn open_for_writing(path: &Path) -> Option<bool> {
    let mut found = None;
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let number = entry.file_name().into_string().unwrap();
        if fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
            found = Some(found.unwrap_or(false) | writes);
        }
    }
    found
}

#[test]
fn every_combination_of_share_readonly_and_rom() {
    let document: Value = serde_json::from_str(CASES).unwrap();
    let combos = document["combos"].as_array().unwrap();
    assert_eq!(combos.len(), 27);
    for case in combos {
        let id = text_of(case, "id");
        let dir = tempfile::tempdir().unwrap();
        shell(&text_of(case, "setup"), dir.path());
        let path = dir.path().join("tpl");
        let result = attempt(case, dir.path());
        let file = |at: &str| {
            let bytes = fs::read(&path).unwrap();
            bytes[1 << 20..][..8] == *at.as_bytes()
        };
        if case["expect_exit"] == 1 {
            let error = result.map(|_| ()).unwrap_err();
            assert!(error.contains(&text_of(case, "stderr")), "{id}: {error}");
            continue;
        }
        if case["expect_region"] == "rom" {
            let error = result.map(|_| ()).unwrap_err();
            assert!(error.contains("add rom=off for a clone"), "{id}: {error}");
            assert!(file("TEMPLATE"));
            continue;
        }
        let memory = result.unwrap_or_else(|error| panic!("{id}: {error}"));
        let mut back = [0; 8];
        memory.ram.read(1 << 20, &mut back).unwrap();
        assert_eq!(&back, b"TEMPLATE", "{id}");
        memory.ram.write(1 << 20, b"CLONEDDD").unwrap();
        memory.ram.read(1 << 20, &mut back).unwrap();
        assert_eq!(&back, b"CLONEDDD", "{id}");
        let is_template = case["expect_write"] == "lands in file";
        assert!(
            file(if is_template { "CLONEDDD" } else { "TEMPLATE" }),
            "{id}"
        );
        let path = path.canonicalize().unwrap();
        assert_eq!(open_for_writing(&path), Some(is_template), "{id}");
        assert_eq!(memory.pager.is_some(), !is_template, "{id}");
    }
}

#[test]
fn discarded_data_is_gone_and_only_that_of_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tpl");
    for (options, is_gone) in [
        ("share=on", true),
        ("share=off,readonly=on,rom=off", false),
        ("share=off", false),
    ] {
        let mut file = fs::OpenOptions::new();
        let file = file.write(true).create(true).truncate(true).mode(0o600);
        file.open(&path).unwrap();
        fs::write(&path, vec![7; 64 << 20]).unwrap();
        let object =
            format!("memory-backend-file,id=m,mem-path=$D/tpl,size=64M,discard-data=on,{options}");
        let args = ["-object", &object, "-machine", "q35,memory-backend=m"].map(str::to_owned);
        let spec = machine(&args, dir.path()).unwrap();
        drop(provide(&spec, PagerOptions::default()).unwrap());
        let bytes = fs::read(&path).unwrap();
        let expected = if is_gone { 0 } else { 7 };
        assert!(bytes.iter().all(|&byte| byte == expected), "{options}");
    }
}

#[test]
fn two_backends_never_write_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    shell("truncate -s 128M $D/m", dir.path());
    let attempt = |first: &str, second: &str| {
        let object = |id: &str, more: &str| {
            format!("memory-backend-file,id={id},mem-path=$D/m,size=64M,{more}")
        };
        let args = [
            "-object",
            &object("a", first),
            "-object",
            &object("b", second),
            "-numa",
            "node,memdev=a",
            "-numa",
            "node,memdev=b",
        ]
        .map(str::to_owned);
        let spec = machine(&args, dir.path()).unwrap();
        let made = provide(&spec, PagerOptions::default());
        made.map(|_| ()).map_err(|error| error.to_string())
    };
    let clone = "share=off,readonly=on,rom=off";
    assert_eq!(attempt(clone, clone), Ok(()));
    assert_eq!(attempt("share=on", "share=on,offset=64M"), Ok(()));
    let text = attempt("share=on", clone).unwrap_err();
    assert!(
        text.contains("memory backend b: ") && text.contains("in use"),
        "{text}"
    );
    attempt("share=on", "share=on,offset=32M").unwrap_err();
}
