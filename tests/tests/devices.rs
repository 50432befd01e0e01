#![forbid(unsafe_code)]
//! Disks and entropy: of templates, of their clones on every engine, and on both command lines.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pando_tests::command::{Finished, HANG, create_template, finish, names, pando};
use pando_tests::grove::usual_options;
use pando_vmm::arch::x86_64::boot::BootSource;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::Ending;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, Supervisor};
use pando_vmm::config::{self, file::MachineFile};
use pando_vmm::payload::protocol::{Command, READY_LINE};
use pando_vmm::spec::DeviceSpec;
use pando_vmm::template::Template;
use pando_vmm::template::build::{Ready, TemplateVm};

/// An image with something in it, and holes.
fn image(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    let file = File::create(&path)?;
    file.set_len((1 << 20) + 512)?;
    file.write_all_at(name.as_bytes(), 300_000)?;
    Ok(path)
}

/// A template with a disk that is written, one that is not, and entropy.
fn template(dir: &Path) -> Result<PathBuf> {
    let out = dir.join("t");
    let first = image(dir, "a.img")?;
    let second = image(dir, "b.img")?;
    let first = format!("{},serial=aspen,iops=500,iops-burst=9", first.display());
    let second = format!("{},ro,id=rom", second.display());
    create_template(&out, &["--rng", "--disk", &first, "--disk", &second])?.expect_code(0)?;
    Ok(out)
}

fn verify(template: &Path, more: &[&str]) -> Result<Finished> {
    let mut command = pando(&["template", "verify"])?;
    finish(command.arg(template).args(more))
}

/// Starts clones, has them power off, and fails unless all do.
fn power_off_clones(template: &Path, engine: Engine) -> Result<()> {
    let mut supervisor = Supervisor::new(CloneOptions {
        engine,
        ..usual_options(template.to_owned())?
    })?;
    for _ in 0..3 {
        supervisor.start(&SerialPlan::Supervisor, &Command::PowerOff.encode());
    }
    let deadline = Instant::now() + HANG;
    let mut ended = 0;
    while ended < 3 {
        ensure!(Instant::now() < deadline, "{engine}: {ended} have ended");
        for event in supervisor.wait(Duration::from_millis(50))? {
            ended += usize::from(matches!(event, Event::Ended(_)));
        }
    }
    for clone in supervisor.clones() {
        let ending = &clone.ending;
        ensure!(
            matches!(ending, Some(Ending::PowerOff)),
            "{engine}: {ending:?}"
        );
    }
    Ok(())
}

#[test]
fn what_a_templates_guest_has_taken_out_is_not_in_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "a.img")?;
    let path = path.display();
    let text = format!(
        "kernel = \"embedded\"\n[memory]\nsize = \"64M\"\n\
         [[device]]\nkind = \"virtio-rng\"\nid = \"stays\"\n\
         [[device]]\nkind = \"virtio-blk\"\nid = \"goes\"\nslot = 9\npath = \"{path}\"\n"
    );
    let file = MachineFile::from_toml(&text).map_err(anyhow::Error::msg)?;
    let (spec, boot): (_, BootSource) = config::resolve_file(&file)?;
    let out = dir.path().join("t");
    let mut vm = TemplateVm::boot(&out, &spec, &boot, false)?;
    let ready = Ready::Serial(READY_LINE.trim_end().into());
    vm.wait_ready(&ready, HANG, &mut |_| ())?;
    vm.console.line(HANG)?;
    // The register that takes out, its second byte, the place 9.
    vm.console.send(b"o 619 2\n")?;
    let answer = vm.console.line(HANG)?;
    ensure!(answer.starts_with("ok o"), "{answer}");
    vm.freeze(&mut |_, _| ())?;
    ensure!(!out.join("goes.disk").exists());
    verify(&out, &[])?.expect_code(0)?;
    let devices = Template::open(&out)?;
    let devices = devices.spec().devices().iter().map(DeviceSpec::id);
    ensure!(devices.eq(["stays"]), "it has what was taken out");
    for engine in [Engine::Copy, Engine::Root, Engine::Kernel] {
        power_off_clones(&out, engine)?;
    }
    Ok(())
}

#[test]
fn a_template_keeps_its_disks_and_clones_of_every_engine_have_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = template(dir.path())?;
    for (original, copy) in [("a.img", "disk0.disk"), ("b.img", "rom.disk")] {
        let copy = template.join(copy);
        ensure!(fs::read(dir.path().join(original))? == fs::read(&copy)?);
        ensure!(fs::metadata(&copy)?.permissions().mode() & 0o222 == 0);
        // The template needs the originals no more.
        fs::remove_file(dir.path().join(original))?;
    }
    let opened = Template::open(&template)?;
    let limits = opened.spec().devices().iter().map(DeviceSpec::limits);
    let limits = limits.map(|limits| {
        limits
            .requests
            .map(|rate| (rate.per_second(), rate.burst()))
    });
    ensure!(
        limits.eq([Some((500, 9)), None, None]),
        "the disk has another limit than it was given"
    );
    drop(opened);
    verify(&template, &[])?.expect_code(0)?;
    for engine in [Engine::Copy, Engine::Root, Engine::Kernel] {
        power_off_clones(&template, engine)?;
    }
    verify(&template, &[])?.expect_code(0)?;
    let all = [
        "disk0.disk",
        "manifest.json",
        "pages.idx",
        "ram0.mem",
        "rom.disk",
        "state.bin",
    ];
    let mut found = names(&template)?;
    found.retain(|name| name != "working-set");
    ensure!(found == all, "{found:?}");
    Ok(())
}

#[test]
fn a_disk_that_changed_is_refused_by_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = template(dir.path())?;
    let disk = template.join("disk0.disk");
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o644))?;
    let modified = fs::metadata(&disk)?.modified()?;
    let file = File::options().write(true).open(&disk)?;
    file.write_all_at(b"A", 300_000)?;
    file.set_times(FileTimes::new().set_modified(modified))?;
    // Nobody sees it but who reads it.
    verify(&template, &[])?
        .expect_code(4)?
        .expect_error(&["disk0.disk is damaged", "digest"])?;
    verify(&template, &["--reseal"])?
        .expect_code(4)?
        .expect_error(&["disk0.disk is damaged"])?;
    file.write_all_at(b"a", 300_000)?;
    let clone = || finish(pando(&["clone"])?.arg(&template).args(["--count", "1"]));
    clone()?
        .expect_code(4)?
        .expect_error(&["disk0.disk is not the file that was sealed"])?;
    verify(&template, &["--reseal"])?.expect_code(0)?;
    fs::remove_file(&disk)?;
    clone()?
        .expect_code(4)?
        .expect_error(&["disk0.disk is damaged: it is missing"])?;
    Ok(())
}

#[test]
fn nobody_writes_a_disk_of_a_template_that_is_open() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = template(dir.path())?;
    let disk = path.join("disk0.disk");
    let run = |access: &str| {
        let mut command = pando(&["run", "--kernel", "/nowhere", "--serial", "null", "--disk"])?;
        finish(command.arg(format!("{}{access}", disk.display())))
    };
    let open = Template::open(&path)?;
    run("")?
        .expect_code(1)?
        .expect_error(&["disk0.disk is in use by another machine"])?;
    // Who only reads it is let in, as far as its kernel.
    run(",ro")?.expect_error(&["/nowhere"])?;
    verify(&path, &[])?.expect_code(0)?;
    drop(open);
    Ok(())
}

#[test]
fn disks_that_cannot_be_are_refused_and_nothing_is_left() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let odd = dir.path().join("odd.img");
    fs::write(&odd, [0; 700])?;
    let good = image(dir.path(), "good.img")?;
    let (odd, good) = (odd.display().to_string(), good.display().to_string());
    let folder = dir.path().display().to_string();
    let out = dir.path().join("t");
    for (disks, code, error) in [
        (&[&*odd][..], 1, "odd.img has 700 bytes"),
        (
            &["/nowhere/x.img"],
            1,
            "cannot open the disk image /nowhere/x.img",
        ),
        (&[&folder], 1, "is not a regular file"),
        (
            &[&format!("{good},rw")],
            2,
            "\"rw\" is none of ro, snapshot",
        ),
        (
            &[&format!("{good},id=a"), &format!("{good},id=a")],
            2,
            "device \"a\": the id is given twice",
        ),
        (
            &[&format!("{good},serial=")],
            2,
            "serial \"\" is not 1 to 20",
        ),
    ] {
        let words: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", *disk]).collect();
        create_template(&out, &words)?
            .expect_code(code)?
            .expect_error(&[error])?;
        ensure!(names(dir.path())? == ["good.img", "odd.img"]);
    }
    Ok(())
}

#[test]
fn both_fronts_make_the_same_machine() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "a.img")?.display().to_string();
    let native = [
        "run",
        "--kernel",
        "embedded",
        "--memory",
        "128M",
        "--append",
        "",
        "--serial",
        "null",
        "--disk",
        &format!("{path},id=d,snapshot,serial=s,iops=500,iops-burst=900,bps=10M"),
        "--rng",
        "--vsock",
        "5,uds=/a/v",
        "--print-machine",
    ];
    let qemu = [
        "qemu",
        "-machine",
        "q35",
        "-m",
        "128M",
        "-kernel",
        "embedded",
        "-serial",
        "null",
        "-drive",
        &format!(
            "file={path},if=none,id=x,snapshot=on,throttling.bps-total=10485760,\
             throttling.iops-total=500,iops_max=900"
        ),
        "-device",
        "virtio-blk-pci,id=d,drive=x,serial=s",
        "-device",
        "virtio-rng-pci",
        "-device",
        "vhost-vsock-pci,guest-cid=5,x-uds-path=/a/v",
        "-print-machine",
    ];
    let printed = |words: &[&str]| -> Result<String> {
        let text = finish(&mut pando(words)?)?.expect_code(0)?.stdout;
        let at = text.find("[[device]]").unwrap_or(text.len());
        Ok(text[at..].to_owned())
    };
    let (native, qemu) = (printed(&native)?, printed(&qemu)?);
    ensure!(
        native == qemu && native.contains("snapshot = true") && native.contains("iops_burst = 900"),
        "{native}\n{qemu}"
    );
    Ok(())
}

#[test]
fn clones_without_a_place_for_what_they_write_say_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = template(dir.path())?;
    for engine in ["copy", "root", "kernel"] {
        let mut command = pando(&["clone"])?;
        command.arg(&template).args(["--engine", engine, "--json"]);
        let ended = finish(command.env("TMPDIR", "/nowhere"))?.expect_code(1)?;
        ended.expect_error(&["disk0.disk cannot be kept in /nowhere: set TMPDIR"])?;
    }
    Ok(())
}
