#![forbid(unsafe_code)]
//! A page that one of several clones cannot have: that clone ends, the others do not notice.

use std::fs::{self, File, FileTimes};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pando_tests::command::{HANG, Running, eventually, finish, pando};
use pando_tests::metrics::{address, scrape, sum};
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Reply, Visit};
use rustix::process::Signal;

/// Families that count what went wrong, once each.
const TROUBLES: [&str; 3] = [
    "pando_pager_poisoned_pages_total",
    "pando_template_verify_failures_total",
    "pando_clone_failures_total",
];

/// Flips a bit and gives the file its old modification time back: the seal stays intact.
fn flip_unseen(path: &Path, offset: u64) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    let file = File::options().read(true).write(true).open(path)?;
    let modified = file.metadata()?.modified()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 4], offset)?;
    file.set_times(FileTimes::new().set_modified(modified))?;
    Ok(())
}

/// Has a clone read the first word of some pages.
fn touch(clone: &mut BufReader<UnixStream>, visit: Visit) -> Result<Reply> {
    clone.get_mut().write_all(&Command::Touch(visit).encode())?;
    let mut line = String::new();
    clone.read_line(&mut line)?;
    ensure!(!line.is_empty(), "the clone has hung up");
    Ok(Reply::parse(line.trim_end())?)
}

#[test]
fn a_page_that_one_clone_cannot_have_ends_that_clone_alone() -> Result<()> {
    ends_alone("own")
}

#[test]
fn a_page_that_the_pager_process_cannot_have_ends_one_clone_alone() -> Result<()> {
    ends_alone("shared")
}

fn ends_alone(pager: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    // The demonstration's template has data pages that no clone reads without being asked to.
    let template = dir.path().join("t");
    let template_text = template.to_str().context("a plain path")?;
    let demo = [
        "demo",
        "--json",
        "--clones",
        "1",
        "--memory",
        "64M",
        "--template",
        template_text,
    ];
    finish(&mut pando(&demo)?)?.expect_code(0)?;
    let bad_page = LAYOUT.first_data_page + 1000;
    flip_unseen(&template.join("ram0.mem"), bad_page * 4096 + 8)?;

    let serial = dir.path().join("serial");
    let mut running = Running::start(
        pando(&["clone", "--count", "3", "--metrics", "127.0.0.1:0"])?
            .args(["--pager", pager, "--serial"])
            .arg(&serial)
            .arg(&template),
    )?;
    let address = address(&mut running)?;
    let mut clones = Vec::new();
    for k in 0..3 {
        let mut stream = None;
        eventually("the clone listens", || {
            stream = UnixStream::connect(serial.join(format!("clone-{k}.sock"))).ok();
            stream.is_some()
        })?;
        let stream = stream.context("no stream")?;
        stream.set_read_timeout(Some(HANG))?;
        clones.push(BufReader::new(stream));
    }
    let good = Visit::all(LAYOUT.first_data_page, 100);
    for clone in &mut clones {
        touch(clone, good)?;
    }
    let before = scrape(&address)?;
    for family in TROUBLES {
        assert_eq!(sum(&before, family), Some(0.0), "{family} in:\n{before}");
    }

    let told = touch(&mut clones[1], Visit::all(bad_page, 1));
    ensure!(told.is_err(), "the clone answered {told:?}");
    eventually("the clone is gone", || running.clones().len() == 2)?;
    let mut exposition = String::new();
    eventually("the metrics tell of it", || {
        exposition = scrape(&address).unwrap_or_default();
        TROUBLES
            .iter()
            .all(|family| sum(&exposition, family) == Some(1.0))
    })
    .with_context(|| exposition.clone())?;
    for k in [0, 2] {
        touch(&mut clones[k], good)?;
        touch(&mut clones[k], Visit::all(bad_page + 500, 300))?;
    }
    assert_eq!(running.clones().len(), 2);

    running.signal(Signal::TERM)?;
    running.finish()?.expect_code(5)?.expect_error(&[
        &format!("clone 1: guest memory could not be read: page {bad_page} of ram0"),
        "checksum",
        "1 of 3 clones failed",
    ])?;
    Ok(())
}
