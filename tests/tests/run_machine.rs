#![forbid(unsafe_code)]
//! `pando run --machine`: VMs whose memory begins as a file, and the files of their templates.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{finish, pando};
use pando_vmm::payload::protocol::{Command, Outcome, READY_LINE, Reply, Visit};

/// How memory is a clone's, and how it is a template's.
const CLONE: &str = "readonly = true\nrom = 'off'";
const TEMPLATE: &str = "share = true";

/// A VM on `file`, whose COM1 is its standard input and output; the file of its machine too.
fn run_on(file: &Path, how: &str, dir: &Path) -> Result<Child> {
    let machine = dir.join("run.toml");
    let text = format!(
        "kernel = 'embedded'\n[memory]\nbackend = 'm0'\n[[backend]]\nid = 'm0'\nkind = 'file'\n\
         path = '{}'\nsize = '64M'\n{how}\n",
        file.display()
    );
    fs::write(&machine, text)?;
    let mut command = pando(&["run", "--machine"])?;
    let command = command.arg(machine).stdin(Stdio::piped());
    Ok(command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

/// Waits for the guest's ready mark, and returns what it says from then on, line by line.
fn ready(child: &mut Child) -> Result<BufReader<ChildStdout>> {
    let mut lines = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    while line.trim_end() != READY_LINE.trim_end() {
        line.clear();
        ensure!(lines.read_line(&mut line)? > 0, "the guest said nothing");
    }
    Ok(lines)
}

#[test]
fn a_vm_runs_on_a_file_that_it_only_reads() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("m0");
    let content = vec![0xa5; 64 << 20];
    fs::write(&file, &content)?;
    let mut child = run_on(&file, CLONE, dir.path())?;
    let mut lines = ready(&mut child)?;
    let mut input = child.stdin.take().context("no input")?;
    // Every page has something, and is written over.
    let visit = Visit::all(512, 8000);
    let scan = Command::Scan {
        first_page: 512,
        pages: 8000,
    };
    let write = Command::Write { visit, salt: 3 };
    for command in [&scan, &write, &Command::PowerOff] {
        input.write_all(&command.encode())?;
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let outcome = Reply::parse(line.trim_end())?.outcome;
        if let Outcome::Scanned { nonzero, .. } = outcome {
            ensure!(nonzero == 8000, "{outcome:?}");
        }
    }
    drop(input);
    let ended = child.wait_with_output()?;
    ensure!(ended.status.code() == Some(0), "{ended:?}");
    ensure!(fs::read(&file)? == content, "the file was written");
    Ok(())
}

/// Has a VM on a file that is cut look at what is no more there; what it says at its end.
fn cut_under_a_vm(how: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("m0");
    fs::write(&file, vec![0xa5; 64 << 20])?;
    let mut child = run_on(&file, how, dir.path())?;
    let lines = ready(&mut child)?;
    fs::OpenOptions::new()
        .write(true)
        .open(&file)?
        .set_len(32 << 20)?;
    let mut input = child.stdin.take().context("no input")?;
    let scan = Command::Scan {
        first_page: 10_000,
        pages: 100,
    };
    input.write_all(&scan.encode())?;
    let ended = child.wait_with_output()?;
    drop((input, lines));
    ensure!(ended.status.code() == Some(5), "{ended:?}");
    Ok(String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[test]
fn a_file_that_is_cut_ends_its_vm_and_never_reads_as_zero() -> Result<()> {
    let text = cut_under_a_vm(CLONE)?;
    ensure!(text.contains("guest memory could not be read"), "{text}");
    Ok(())
}

#[test]
fn a_templates_file_that_is_cut_ends_its_vm_with_the_same_code() -> Result<()> {
    let text = cut_under_a_vm(TEMPLATE)?;
    ensure!(text.contains("cannot be read (vcpu 0"), "{text}");
    Ok(())
}

#[test]
fn a_template_in_use_is_not_cloned() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("m0");
    let machine = dir.path().join("template.toml");
    let text = format!(
        "kernel = 'embedded'\n[memory]\nbackend = 'm0'\n[[backend]]\nid = 'm0'\nkind = 'file'\n\
         path = '{}'\nsize = '64M'\nshare = true\n",
        file.display()
    );
    fs::write(&machine, text)?;
    let mut command = pando(&["run", "--machine"])?;
    let command = command.arg(&machine).stdin(Stdio::piped());
    let mut template = command.stdout(Stdio::piped()).spawn()?;
    let mut lines = ready(&mut template)?;
    let clone = run_on(&file, CLONE, dir.path())?.wait_with_output()?;
    let text = String::from_utf8_lossy(&clone.stderr);
    ensure!(clone.status.code() == Some(1), "{clone:?}");
    ensure!(
        text.contains("memory backend m0: ") && text.contains("in use by the machine"),
        "{text}"
    );
    let mut input = template.stdin.take().context("no input")?;
    input.write_all(&Command::PowerOff.encode())?;
    lines.read_line(&mut String::new())?;
    ensure!(template.wait()?.code() == Some(0), "the template VM");
    // The file has the guest itself, and a clone of it boots anew.
    let mut clone = run_on(&file, CLONE, dir.path())?;
    let lines = ready(&mut clone)?;
    let mut input = clone.stdin.take().context("no input")?;
    input.write_all(&Command::PowerOff.encode())?;
    ensure!(clone.wait()?.code() == Some(0), "the clone");
    drop(lines);
    Ok(())
}

#[test]
fn a_template_says_who_its_machine_is() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (machine, out) = (dir.path().join("m.json"), dir.path().join("t"));
    let uuid = "8a1b7f0e-32a5-4f4b-9c7e-0123456789ab";
    let text = format!(
        "{{\"kernel\": \"embedded\", \"name\": \"web\", \"uuid\": \"{uuid}\", \"memory\": {{\"size\": \"64M\"}}}}"
    );
    fs::write(&machine, text)?;
    let mut create = pando(&["template", "create", "--ready", "serial:pando guest ready"])?;
    finish(create.arg("--machine").arg(&machine).arg(&out))?.expect_code(0)?;
    let shown = finish(pando(&["template", "inspect", "--json"])?.arg(&out))?;
    let facts = shown.expect_code(0)?.json()?;
    assert_eq!(facts["format"], 3);
    assert_eq!(facts["identity"]["name"], "web");
    assert_eq!(facts["identity"]["uuid"], uuid);
    // The guest of each clone finds it in its memory, where SMBIOS is looked for.
    let ram = fs::read(out.join("ram0.mem"))?;
    assert_eq!(&ram[0xf_0000..0xf_0005], b"_SM3_");
    finish(pando(&["template", "verify"])?.arg(&out))?.expect_code(0)?;
    Ok(())
}
