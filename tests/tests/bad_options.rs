#![forbid(unsafe_code)]
//! Options and files that cannot be right: one error that names the value and what to do.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Result;
use pando_tests::command::{Finished, finish, make_template, names, pando};

fn create(dir: &Path, args: &[&str]) -> Result<Finished> {
    finish(
        pando(&["template", "create"])?
            .arg(dir.join("t"))
            .args(args),
    )
}

fn with_kernel(dir: &Path, kernel: &Path, more: &[&str]) -> Result<Finished> {
    let mut args = vec![
        "--kernel",
        kernel.to_str().unwrap_or_default(),
        "--ready",
        "after:0",
    ];
    args.extend(more);
    create(dir, &args)
}

#[test]
fn memory_sizes_that_cannot_be() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (size, text) in [
        ("0M", "0 bytes"),
        ("3M", "at least 4194304"),
        ("67108865B", "multiple of 4096"),
        ("900T", "more than this host's"),
        ("512", "has no unit"),
        ("many", "is no size"),
    ] {
        with_kernel(dir.path(), Path::new("embedded"), &["--memory", size])?
            .expect_code(2)?
            .expect_error(&[text])?;
        finish(&mut pando(&["demo", "--clones", "1", "--memory", size])?)?
            .expect_code(2)?
            .expect_error(&[text])?;
    }
    assert_eq!(names(dir.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn numbers_of_cpus_and_clones_that_cannot_be() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for cpus in ["0", "9"] {
        with_kernel(dir.path(), Path::new("embedded"), &["--cpus", cpus])?
            .expect_code(2)?
            .expect_error(&["1 to 8 vCPUs"])?;
    }
    finish(&mut pando(&["demo", "--clones", "0"])?)?.expect_code(2)?;
    finish(&mut pando(&["clone", "x", "--engine", "magic"])?)?
        .expect_code(2)?
        .expect_error(&["'magic' is no engine"])?;
    Ok(())
}

#[test]
fn a_kernel_that_is_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("not-a-kernel");
    std::fs::write(&file, b"#!/bin/sh\necho I am no kernel\n".repeat(500))?;
    with_kernel(dir.path(), &file, &[])?
        .expect_code(1)?
        .expect_error(&["not-a-kernel"])?;
    with_kernel(dir.path(), &dir.path().join("missing"), &[])?
        .expect_code(1)?
        .expect_error(&["missing", "No such file"])?;
    with_kernel(dir.path(), dir.path(), &[])?.expect_code(1)?;
    let empty = dir.path().join("empty");
    File::create(&empty)?;
    with_kernel(dir.path(), &empty, &[])?
        .expect_code(1)?
        .expect_error(&["empty"])?;
    assert_eq!(names(dir.path())?, ["empty", "not-a-kernel"]);
    Ok(())
}

#[test]
fn an_initrd_that_does_not_fit() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = dir.path().join("initrd");
    File::create(&initrd)?.set_len(200 << 20)?;
    let initrd = initrd.to_str().unwrap_or_default();
    with_kernel(
        dir.path(),
        Path::new("embedded"),
        &["--memory", "64M", "--initrd", initrd],
    )?
    .expect_code(1)?
    .expect_error(&["initrd", "209715200"])?;
    assert_eq!(names(dir.path())?, ["initrd"]);
    Ok(())
}

#[test]
fn an_output_that_exists_is_kept() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("t"))?;
    std::fs::write(dir.path().join("t/mine"), b"keep")?;
    with_kernel(dir.path(), Path::new("embedded"), &[])?
        .expect_code(1)?
        .expect_error(&["exists already"])?;
    assert_eq!(std::fs::read(dir.path().join("t/mine"))?, b"keep");
    finish(
        pando(&["template", "create", "/proc/none/t"])?
            .args(["--kernel", "embedded", "--ready", "after:0"]),
    )?
    .expect_code(1)?
    .expect_error(&["the directory /proc/none does not exist: make it first"])?;
    Ok(())
}

#[test]
fn a_name_without_room_for_the_one_in_the_making() -> Result<()> {
    let dir = tempfile::tempdir()?;
    finish(
        pando(&["template", "create"])?
            .arg(dir.path().join("x".repeat(240)))
            .args(["--kernel", "embedded", "--ready", "after:0"]),
    )?
    .expect_code(1)?
    .expect_error(&["its name has 240 bytes: choose one of at most"])?;
    assert_eq!(names(dir.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn ram_beyond_the_limit_of_file_sizes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pando = pando_tests::rig::built_program("pando")?;
    for reserve in ["", "--no-reserve"] {
        finish(
            std::process::Command::new("sh")
                .args([
                    "-c",
                    &format!(
                        "ulimit -f 1000; exec \"$0\" template create \"$1\" --kernel embedded \
                         --memory 64M --ready after:0 {reserve}"
                    ),
                ])
                .arg(&pando)
                .arg(dir.path().join("t")),
        )?
        .expect_code(1)?
        .expect_error(&["67108864 bytes", "ulimit -f"])?;
    }
    assert_eq!(names(dir.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_pty_is_named_and_a_hangup_ends_the_vm() -> Result<()> {
    let mut running = pando_tests::command::Running::start(&mut pando(&[
        "run", "--kernel", "embedded", "--memory", "64M", "--serial", "pty",
    ])?)?;
    let line = running.wait_stderr("serial console: ")?;
    let path = line.trim_start_matches("serial console: ");
    assert!(
        path.starts_with("/dev/pts/") && Path::new(path).exists(),
        "{line}"
    );
    running.signal(rustix::process::Signal::HUP)?;
    running.finish()?.expect_code(0)?;
    Ok(())
}

#[test]
fn a_guest_that_is_never_ready() -> Result<()> {
    let dir = tempfile::tempdir()?;
    create(
        dir.path(),
        &[
            "--kernel",
            "embedded",
            "--memory",
            "64M",
            "--ready",
            "serial:never",
            "--timeout",
            "0.5",
        ],
    )?
    .expect_code(1)?
    .expect_error(&["did not print 'never' within 0.5 s", "pando guest ready"])?;
    assert_eq!(names(dir.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_socket_path_in_use() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let serial = dir.path().join("serial");
    std::fs::create_dir(&serial)?;
    let _listener = UnixListener::bind(serial.join("clone-1.sock"))?;
    let running = pando_tests::command::Running::start(
        pando(&["clone"])?
            .arg(&template)
            .args(["--count", "3", "--serial"])
            .arg(&serial),
    )?;
    // The other two run all the same.
    pando_tests::command::eventually("two clones listen", || {
        names(&serial).is_ok_and(|names| names.len() == 3) && running.clones().len() == 2
    })?;
    running.signal(rustix::process::Signal::TERM)?;
    running.finish()?.expect_code(1)?.expect_error(&[
        "clone 1:",
        "clone-1.sock",
        "in use",
        "1 of 3 clones failed",
    ])?;
    assert_eq!(
        names(&serial)?,
        ["clone-1.sock"],
        "the other process keeps its socket"
    );
    Ok(())
}

#[test]
fn more_clones_than_open_files() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "ulimit -n 40 && exec \"$@\"", "sh"])
        .arg(pando_tests::rig::built_program("pando")?)
        .arg("clone")
        .arg(&template)
        .args(["--count", "20"]);
    finish(&mut command)?.expect_code(1)?.expect_error(&[
        "20 clones need 5 x 20 + 64 = 164 open files and this process may have 40",
        "ulimit -Hn 164",
    ])?;
    Ok(())
}

#[test]
fn a_metrics_address_in_use() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    finish(&mut pando(&[
        "demo",
        "--clones",
        "1",
        "--metrics",
        &address,
    ])?)?
    .expect_code(1)?
    .expect_error(&["cannot serve metrics on", &address, "in use"])?;
    Ok(())
}

#[test]
fn a_worker_started_by_hand_says_that_it_is_of_no_use() -> Result<()> {
    finish(&mut pando(&["clone-worker"])?)?
        .expect_code(2)?
        .expect_error(&["started by `pando clone`"])?;
    Ok(())
}

/// `pando doctor | true` and the like: whoever goes away early does not make it panic.
#[test]
fn a_reader_that_goes_away() -> Result<()> {
    for args in [
        "doctor",
        "demo --clones 1 --memory 64M",
        "--help",
        "completions bash",
    ] {
        let mut command = std::process::Command::new("sh");
        let pando = pando_tests::rig::built_program("pando")?;
        command.args([
            "-c",
            &format!("\"$0\" {args} | true"),
            pando.to_str().unwrap_or_default(),
        ]);
        finish(&mut command)?.expect_error(&[])?;
    }
    Ok(())
}

#[test]
fn a_full_disk_behind_standard_output() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = make_template(dir.path())?;
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "exec \"$0\" template inspect --json \"$1\" >/dev/full",
    ]);
    command
        .arg(pando_tests::rig::built_program("pando")?)
        .arg(template);
    finish(&mut command)?
        .expect_code(1)?
        .expect_error(&["cannot write the output", "No space"])?;
    Ok(())
}

#[test]
fn a_path_that_is_no_text() -> Result<()> {
    use std::os::unix::ffi::OsStringExt;
    let dir = tempfile::tempdir()?;
    let odd = dir
        .path()
        .join(std::ffi::OsString::from_vec(b"odd \xff".to_vec()));
    std::fs::create_dir(&odd)?;
    let template = make_template(&odd)?;
    finish(pando(&["template", "inspect", "--json"])?.arg(&template))?
        .expect_code(0)?
        .json()?;
    let serial = odd.join("serial");
    let running = pando_tests::command::Running::start(
        pando(&["clone", "--json"])?
            .arg(&template)
            .arg("--serial")
            .arg(&serial),
    )?;
    pando_tests::command::eventually("the clone listens", || {
        std::os::unix::net::UnixStream::connect(serial.join("clone-0.sock")).is_ok()
    })?;
    running.signal(rustix::process::Signal::HUP)?;
    running.finish()?.expect_code(0)?.json()?;
    assert_eq!(names(&serial)?, Vec::<String>::new());
    Ok(())
}
