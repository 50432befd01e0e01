#![forbid(unsafe_code)]
//! Templates of several memory backends: two nodes and a module, frozen, cloned by every engine, and
//! never written by anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Finished, HANG, finish, pando};
use pando_tests::rig::built_program;
use pando_vmm::arch::x86_64::boot::BootSource;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::PagerConfig;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use pando_vmm::config::{self, file::MachineFile};
use pando_vmm::machine::HostCheck;
use pando_vmm::payload::protocol::{Command, Outcome, READY_LINE, Reply, Visit};
use pando_vmm::template::Template;
use pando_vmm::template::build::{Ready, TemplateVm};
use serde_json::Value;

const MACHINE: &str = r#"
kernel = "embedded"
cpus = 2

[memory]
size = "96M"
slots = 2
max = "1G"

[[backend]]
id = "m0"
size = "64M"

[[backend]]
id = "m1"
size = "32M"

[[backend]]
id = "d0"
size = "32M"

[[node]]
cpus = [0]
backend = "m0"

[[node]]
cpus = [1]
backend = "m1"

[[dimm]]
id = "dimm0"
backend = "d0"
node = 1
"#;

const SALT: u64 = 4711;
/// What the template VM writes: pages of both nodes, of the place where they meet, and of the module.
const WRITTEN: [(u64, u64); 3] = [(5000, 700), (16_200, 400), ((4 << 30) / 4096 + 100, 600)];
/// Pages of each of these that a clone overwrites.
const OWN: u64 = 200;

fn visits(pages: Option<u64>) -> impl Iterator<Item = Visit> {
    WRITTEN
        .into_iter()
        .map(move |(first, count)| Visit::all(first, pages.unwrap_or(count)))
}

fn make(dir: &Path) -> Result<PathBuf> {
    let file = MachineFile::from_toml(MACHINE).map_err(anyhow::Error::msg)?;
    let (spec, boot): (_, BootSource) = config::resolve_file(&file)?;
    let path = dir.join("template");
    let mut vm = TemplateVm::boot(&path, &spec, &boot, true)?;
    let ready = Ready::Serial(READY_LINE.trim_end().into());
    vm.wait_ready(&ready, HANG, &mut |_| ())?;
    vm.console.line(HANG)?;
    for visit in visits(None) {
        let salt = SALT;
        vm.console.send(&Command::Write { visit, salt }.encode())?;
        let outcome = Reply::parse(&vm.console.line(HANG)?)?.outcome;
        ensure!(matches!(outcome, Outcome::Written { .. }), "{outcome:?}");
    }
    vm.freeze(&mut |_, _| ())?;
    Ok(path)
}

/// What a clone is asked, and how many pages each answer must find wrong; `None` for a write.
fn questions() -> Vec<(Command, Option<u64>)> {
    let verify = |visit, salt| Command::Verify { visit, salt };
    let mut all = Vec::new();
    for visit in visits(None) {
        all.push((verify(visit, SALT), Some(0)));
    }
    for visit in visits(Some(OWN)) {
        all.push((Command::Write { visit, salt: 1 }, None));
        all.push((verify(visit, 1), Some(0)));
    }
    for visit in visits(None) {
        all.push((verify(visit, SALT), Some(OWN)));
    }
    all
}

fn supervisor(template: &Path, engine: Engine, working_set: bool) -> Result<Supervisor> {
    Ok(Supervisor::new(CloneOptions {
        program: built_program("pando")?,
        template: template.to_owned(),
        name: "backends".into(),
        engine,
        pager: PagerConfig {
            working_set,
            ..PagerConfig::default()
        },
        verbosity: 0,
        overcommit: true,
        measure_memory: false,
        host_check: HostCheck::Due,
        root: RootOptions::default(),
    })?)
}

/// Starts clones, asks each everything, and returns when all have answered.
fn ask_all(supervisor: &mut Supervisor, clones: usize) -> Result<()> {
    let questions = questions();
    let lines: Vec<u8> = questions.iter().flat_map(|(q, _)| q.encode()).collect();
    for _ in 0..clones {
        supervisor.start(&SerialPlan::Supervisor, &lines);
    }
    let mut answered = vec![0; clones];
    let deadline = Instant::now() + HANG;
    while answered.iter().any(|&count| count < questions.len()) {
        ensure!(Instant::now() < deadline, "answers: {answered:?}");
        for event in supervisor.wait(Duration::from_millis(20))? {
            let number = match event {
                Event::Output(number) => number,
                Event::Ended(number) => {
                    anyhow::bail!("clone {number}: {:?}", supervisor.clones()[number].ending)
                }
                _ => continue,
            };
            let clone = supervisor.clone_mut(number).context("no clone")?;
            let console = clone.console.as_mut().context("no console")?;
            console.poll()?;
            while let Some(line) = console.take_line() {
                let (question, wrong) = &questions[answered[number]];
                let outcome = Reply::parse(&line)?.outcome;
                let found = match outcome {
                    Outcome::Verified { mismatches, .. } => Some(mismatches),
                    _ => None,
                };
                ensure!(found == *wrong, "clone {number}: {question:?}: {outcome:?}");
                answered[number] += 1;
            }
        }
    }
    Ok(())
}

/// The files below `dir` that a process has open, and whether for writing.
fn open_files(pid: u32, dir: &Path) -> Result<Vec<(String, bool)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let Ok(name) = target.strip_prefix(dir) else {
            continue;
        };
        let number = entry.file_name().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.context("no flags")?.trim(), 8)?;
        found.push((name.display().to_string(), flags & 3 != 0));
    }
    Ok(found)
}

/// Parts of `dir` that a process has mapped so that it could write the file.
fn shared_mappings(pid: u32, dir: &Path) -> Result<Vec<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let dir = dir.to_str().context("path")?;
    let is_shared = |line: &&str| line.contains(dir) && line.contains("s ");
    Ok(maps.lines().filter(is_shared).map(str::to_owned).collect())
}

#[test]
fn every_engine_clones_two_nodes_and_a_module_and_none_writes_a_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = make(dir.path())?.canonicalize()?;
    let digests = Template::open(&path)?.ram_digests()?;
    ensure!(digests.len() == 3, "{digests:?}");
    for engine in [Engine::Copy, Engine::Root, Engine::Kernel] {
        let mut supervisor = supervisor(&path, engine, false)?;
        ask_all(&mut supervisor, 4).with_context(|| format!("engine {engine}"))?;
        for clone in supervisor.clones() {
            for (name, writes) in open_files(clone.pid, &path)? {
                ensure!(!writes, "engine {engine}: {name} is open for writing");
            }
            let shared = shared_mappings(clone.pid, &path)?;
            ensure!(shared.is_empty(), "engine {engine}: {shared:?}");
        }
        supervisor.stop_all(STOP_GRACE)?;
        let template = Template::open(&path)?;
        ensure!(template.ram_digests()? == digests, "engine {engine}");
    }
    Template::open(&path)?.verify(&mut |_, _| ())?;
    Ok(())
}

fn create(dir: &Path, machine: &str, more: &[&str]) -> Result<Finished> {
    let file = dir.join("machine.toml");
    fs::write(&file, machine)?;
    finish(
        pando(&["template", "create"])?
            .arg(dir.join("t"))
            .arg("--machine")
            .arg(file)
            .args(["--ready", "serial:pando guest ready"])
            .args(more),
    )
}

#[test]
fn the_commands_know_every_backend_of_a_template() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let made = create(dir.path(), MACHINE, &["--json"])?
        .expect_code(0)?
        .json()?;
    let facts = |value: &Value| {
        let backends = value["backends"].as_array().cloned().unwrap_or_default();
        let fact = |b: &Value| {
            (
                b["id"].to_string(),
                b["bytes"].as_u64(),
                b["guest_address"].as_u64(),
            )
        };
        backends.iter().map(fact).collect::<Vec<_>>()
    };
    let expected = [
        ("m0", 64 << 20, 0),
        ("m1", 32 << 20, 64 << 20),
        ("d0", 32 << 20, 4_u64 << 30),
    ]
    .map(|(id, bytes, address)| (format!("{id:?}"), Some(bytes), Some(address)));
    assert_eq!(facts(&made), expected);
    let template = dir.path().join("t");
    finish(pando(&["template", "verify"])?.arg(&template))?.expect_code(0)?;

    // Pages of all three are recorded, and come ahead of the next clone's first instruction.
    let input = r"w 1400 32 32 0 0 9\nw 4010 16 16 0 0 9\nw 100010 16 16 0 0 9";
    let warm = pando(&["template", "warm", "--runs", "2", "--idle", "0.2", "--json"])?
        .arg(&template)
        .args(["--input", input])
        .output()?;
    ensure!(warm.status.success(), "{warm:?}");
    let shown = finish(pando(&["template", "inspect", "--json"])?.arg(&template))?;
    let shown = shown.expect_code(0)?.json()?;
    assert_eq!(facts(&shown), expected);
    let touched = shown["working_set"]["touched"].as_array().cloned();
    let touched = touched.unwrap_or_default();
    for backend in 0..3 {
        let found = touched.iter().any(|run| run["backend"] == backend);
        assert!(found, "backend {backend} in {shown:#}");
    }
    for engine in [Engine::Copy, Engine::Root] {
        let mut supervisor = supervisor(&template, engine, true)?;
        supervisor.start(&SerialPlan::Supervisor, &Command::Identity.encode());
        let deadline = Instant::now() + HANG;
        while !supervisor
            .wait(Duration::from_millis(20))?
            .iter()
            .any(|event| matches!(event, Event::Output(_)))
        {
            ensure!(Instant::now() < deadline, "engine {engine}: no answer");
        }
        supervisor.stop_all(STOP_GRACE)?;
    }
    Ok(())
}

#[test]
fn machines_that_cannot_be_a_template_are_refused_by_id() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let with_file = MACHINE.replace(
        "id = \"m1\"\n",
        "id = \"m1\"\nkind = \"file\"\npath = \"x\"\nshare = true\n",
    );
    create(dir.path(), &with_file, &[])?
        .expect_code(1)?
        .expect_error(&["\"m1\" has a file of its own"])?;
    create(dir.path(), MACHINE, &["--memory", "128M"])?
        .expect_code(2)?
        .expect_error(&[
            "total memory for NUMA nodes (0x6000000) should equal RAM size (0x8000000)",
        ])?;
    create(dir.path(), "serial = 'null'\nkernel = 'embedded'", &[])?
        .expect_code(2)?
        .expect_error(&["has no serial"])?;
    create(dir.path(), "moon = 1", &[])?
        .expect_code(2)?
        .expect_error(&["machine.toml is not right", "moon", "line 1"])?;
    create(dir.path(), "cpus = 1", &[])?
        .expect_code(2)?
        .expect_error(&["no kernel"])?;
    ensure!(!dir.path().join("t").exists());
    Ok(())
}

#[test]
fn a_machine_is_printed_as_the_file_that_makes_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("machine.toml");
    fs::write(&file, MACHINE)?;
    let print = |file: &Path| {
        let mut command = pando(&["run", "--print-machine", "--machine"])?;
        finish(command.arg(file).args(["--serial", "null"]))?.expect_code(0)
    };
    let first = print(&file)?.stdout;
    assert!(first.contains("address = 4294967296") && first.contains("serial = \"null\""));
    let again = dir.path().join("again.toml");
    fs::write(&again, &first)?;
    assert_eq!(print(&again)?.stdout, first);
    Ok(())
}
