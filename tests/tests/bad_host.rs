#![forbid(unsafe_code)]
//! Hosts that lack something: each lack is taken away for real, in a namespace or by seccomp.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use pando_tests::command::{Finished, finish, make_template, names, pando};
use pando_tests::rig::built_program;

/// Runs `pando` behind a shell command in a mount namespace of its own.
fn in_namespace(before: &str, args: &[&str]) -> Result<Finished> {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(format!("{before} && exec \"$@\""))
        .arg("sh");
    command.arg(built_program("pando")?).args(args);
    finish(&mut command)
}

/// Runs `pando` where system calls are refused.
fn without(calls: &str, args: &[&str]) -> Result<Finished> {
    let mut command = Command::new(built_program("deny")?);
    command
        .args([calls, "--"])
        .arg(built_program("pando")?)
        .args(args);
    finish(&mut command)
}

const DEMO: [&str; 6] = ["demo", "--json", "--clones", "1", "--memory", "64M"];

#[test]
fn without_kvm() -> Result<()> {
    let hide = "mount -t tmpfs none /dev && mknod /dev/null c 1 3";
    in_namespace(hide, &DEMO)?
        .expect_code(3)?
        .expect_error(&["/dev/kvm", "kvm_intel or kvm_amd"])?;
    let doctor = in_namespace(hide, &["doctor"])?.expect_code(3)?;
    assert!(doctor.stdout.contains("FAIL  kvm"), "{}", doctor.stdout);
    assert!(doctor.stdout.contains("fix: "), "{}", doctor.stdout);
    Ok(())
}

#[test]
fn without_userfaultfd() -> Result<()> {
    let without = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]);
        command
            .arg("mount --bind /dev/null /dev/userfaultfd && exec \"$@\"")
            .arg("sh");
        command
            .arg(built_program("deny")?)
            .args(["userfaultfd", "--"]);
        command.arg(built_program("pando")?).args(args);
        finish(&mut command)
    };
    let refused = without(&DEMO)?
        .expect_code(3)?
        .expect_error(&["vm.unprivileged_userfaultfd"])?;
    assert_eq!(refused.stderr.matches("pando: ").count(), 1, "said once");
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let template = template.to_str().context("a plain path")?;
    without(&["clone", template, "--count", "3"])?
        .expect_code(3)?
        .expect_error(&["vm.unprivileged_userfaultfd"])?;
    let doctor = without(&["doctor"])?.expect_code(3)?;
    assert!(
        doctor.stdout.contains("FAIL  userfaultfd"),
        "{}",
        doctor.stdout
    );
    // The baseline has no pager and needs none.
    without(&[&DEMO[..], &["--engine", "kernel"]].concat())?.expect_code(0)?;
    Ok(())
}

#[test]
fn without_io_uring_pages_are_read_by_pread() -> Result<()> {
    let result = without("io_uring_setup", &DEMO)?.expect_code(0)?.json()?;
    assert_eq!(
        (result["io"].as_str(), result["verified"].as_u64()),
        (Some("pread"), Some(1))
    );
    let forced = [&DEMO[..], &["--io", "uring"]].concat();
    without("io_uring_setup", &forced)?
        .expect_code(3)?
        .expect_error(&["io_uring_disabled"])?;
    let doctor = without("io_uring_setup", &["doctor"])?.expect_code(0)?;
    assert!(
        doctor.stdout.contains("warn  io_uring"),
        "{}",
        doctor.stdout
    );
    Ok(())
}

fn on_small_disk(bytes: &str, dir: &Path, args: &[&str]) -> Result<Finished> {
    let mount = format!("mount -t tmpfs -o size={bytes} none '{}'", dir.display());
    let out = dir.join("t");
    let mut all = vec!["template", "create", out.to_str().unwrap_or_default()];
    all.extend([
        "--kernel",
        "embedded",
        "--memory",
        "64M",
        "--ready",
        "serial:pando guest ready",
    ]);
    all.extend(args);
    in_namespace(&mount, &all)
}

#[test]
fn without_room_on_the_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    on_small_disk("32m", dir.path(), &[])?
        .expect_code(1)?
        .expect_error(&[
            "no room for the template",
            "its RAM needs 67108864 bytes",
            "--no-reserve",
        ])?;
    // Enough for what this guest touches, though not for all its RAM.
    on_small_disk("32m", dir.path(), &["--no-reserve"])?.expect_code(0)?;
    // A disk that fills while the guest runs ends the create, and nothing else.
    on_small_disk("64k", dir.path(), &["--no-reserve"])?
        .expect_code(1)?
        .expect_error(&["the disk of", "/t is full", "--no-reserve"])?;
    assert_eq!(names(dir.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn the_doctor_finds_nothing_that_keeps_the_demo_from_running_here() -> Result<()> {
    let result = finish(&mut pando(&["doctor", "--json"])?)?
        .expect_code(0)?
        .json()?;
    assert_eq!(result["demo_can_run"], true);
    let whats: Vec<_> = result["findings"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|f| f["what"].as_str())
        .collect();
    for what in [
        "kvm",
        "kvm speed",
        "userfaultfd",
        "io_uring",
        "locked memory",
        "open files",
        "huge pages",
        "cgroup",
    ] {
        assert!(whats.contains(&what), "{what} in {whats:?}");
    }
    Ok(())
}
