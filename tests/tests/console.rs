#![forbid(unsafe_code)]
//! Ports of templates and of their clones, on every engine; one machine by three ways of asking for it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pando_tests::command::{HANG, create_template, finish, names, pando};
use pando_tests::grove::usual_options;
use pando_tests::qemu::QemuVm;
use pando_vmm::clone::Engine;
use pando_vmm::clone::consoles::ConsolePlan;
use pando_vmm::clone::pool::PoolLimits;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use serde_json::json;

fn template(dir: &Path, more: &[&str]) -> Result<PathBuf> {
    let out = dir.join("t");
    create_template(&out, more)?.expect_code(0)?;
    Ok(out)
}

fn supervisor(template: &Path, engine: Engine, shells: usize) -> Result<Supervisor> {
    Ok(Supervisor::new(CloneOptions {
        engine,
        root: RootOptions {
            shells: PoolLimits {
                floor: shells,
                ceiling: shells,
            },
            ..RootOptions::default()
        },
        ..usual_options(template.to_owned())?
    })?)
}

/// Starts two clones and waits until they run.
fn start_two(supervisor: &mut Supervisor) -> Result<()> {
    for _ in 0..2 {
        supervisor.start(&SerialPlan::Supervisor, &[]);
    }
    let deadline = Instant::now() + HANG;
    let mut started = 0;
    while started < 2 {
        ensure!(Instant::now() < deadline, "{started} have started");
        for event in supervisor.wait(Duration::from_millis(50))? {
            started += usize::from(matches!(event, Event::Started(_)));
            if let Event::Ended(number) = event {
                let ending = &supervisor.clones()[number].ending;
                anyhow::bail!("clone {number}: {ending:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn clones_of_every_engine_have_ports_of_their_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let used = dir.path().join("used.sock").display().to_string();
    let agent = format!("unix:{used},name=agent");
    let log = format!("file:{},console", dir.path().join("log").display());
    let template = template(dir.path(), &["--console", &agent, "--console", &log])?;
    ensure!(!Path::new(&used).exists(), "the template VM has ended");
    let manifest = fs::read_to_string(template.join("manifest.json"))?;
    ensure!(
        manifest.contains("\"name\": \"agent\"") && !manifest.contains("used.sock"),
        "{manifest}"
    );
    for (engine, shells) in [
        (Engine::Copy, 0),
        (Engine::Kernel, 0),
        (Engine::Root, 0),
        (Engine::Root, 2),
    ] {
        let sockets = tempfile::tempdir_in(dir.path())?;
        let mut supervisor = supervisor(&template, engine, shells)?;
        supervisor.use_consoles(ConsolePlan {
            dir: Some(sockets.path().to_owned()),
        });
        if shells > 0 {
            supervisor.warm_up()?;
        }
        start_two(&mut supervisor)?;
        let found = names(sockets.path())?;
        let expected = [
            "clone-0.agent.sock",
            "clone-0.console0-0.sock",
            "clone-1.agent.sock",
            "clone-1.console0-0.sock",
        ];
        ensure!(found == expected, "{engine}: {found:?}");
        for name in found {
            UnixStream::connect(sockets.path().join(name))?;
        }
        supervisor.stop_all(STOP_GRACE)?;
        let left = names(sockets.path())?;
        ensure!(left.is_empty(), "{engine}: {left:?}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_anything_starts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let no = dir.path().join("no");
    for (ports, error) in [
        (
            &["tcp:1"][..],
            "\"tcp:1\" is none of unix:PATH, file:PATH, null",
        ),
        (&["null,name=a/b"], "the port name \"a/b\" is not"),
        (&["null,number=0"], "port number 0 is for a console"),
        (
            &["null,name=a", "null,name=a,id=other"],
            "the port name \"a\" is given twice",
        ),
        (&["unix:"], "the path of the socket of port 1 is 0 bytes"),
    ] {
        let words: Vec<&str> = ports.iter().flat_map(|port| ["--console", *port]).collect();
        create_template(&no, &words)?
            .expect_code(2)?
            .expect_error(&[error])?;
    }
    let taken = dir.path().join("taken");
    fs::write(&taken, "a file")?;
    let words = format!("unix:{}", taken.display());
    create_template(&no, &["--console", &words])?
        .expect_code(1)?
        .expect_error(&["port 1 of the console device \"console0\"", "is no socket"])?;
    create_template(&no, &["--console", "file:/nowhere/log"])?
        .expect_code(1)?
        .expect_error(&["cannot append to /nowhere/log"])?;
    let template = template(dir.path(), &[])?;
    finish(pando(&["clone"])?.arg(&template).args(["--console", "d"]))?
        .expect_code(2)?
        .expect_error(&["the template has no virtio-console"])?;
    Ok(())
}

/// The devices of a machine that is printed.
fn printed(words: &[&str]) -> Result<String> {
    let text = finish(&mut pando(words)?)?.expect_code(0)?.stdout;
    let at = text.find("[[device]]").unwrap_or(text.len());
    Ok(text[at..].to_owned())
}

#[test]
fn a_machine_file_and_both_command_lines_say_the_same() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("m.toml");
    let text = "kernel = \"embedded\"\n[memory]\nsize = \"128M\"\n\
        [[device]]\nkind = \"virtio-console\"\nid = \"vs\"\n\
        [[device.ports]]\nconsole = true\nfile = \"/a/log\"\n\
        [[device.ports]]\nname = \"agent\"\nuds_path = \"/a/s\"\n\
        [[device.ports]]\nname = \"far\"\nnumber = 5\n";
    fs::write(&path, text)?;
    let file = path.display().to_string();
    let of_file = printed(&["run", "--machine", &file, "--print-machine"])?;
    let native = printed(&[
        "run",
        "--kernel",
        "embedded",
        "--console",
        "file:/a/log,console,id=vs",
        "--console",
        "unix:/a/s,name=agent,id=vs",
        "--console",
        "null,name=far,number=5,id=vs",
        "--print-machine",
    ])?;
    let qemu = printed(&[
        "qemu",
        "-m",
        "128M",
        "-kernel",
        "embedded",
        "-chardev",
        "socket,id=s,path=/a/s,server=on,wait=off",
        "-chardev",
        "file,id=f,path=/a/log",
        "-chardev",
        "null,id=n",
        "-device",
        "virtio-serial-pci,id=vs,max_ports=8",
        "-device",
        "virtconsole,chardev=f",
        "-device",
        "virtserialport,bus=vs.0,chardev=s,name=agent",
        "-device",
        "virtserialport,chardev=n,name=far,nr=5",
        "-print-machine",
    ])?;
    ensure!(of_file.contains("number = 5"), "{of_file}");
    ensure!(
        of_file == native && native == qemu,
        "{of_file}\n{native}\n{qemu}"
    );
    Ok(())
}

#[test]
fn a_machine_by_qemus_words_has_its_ports_after_each_reset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let words = [
        "-m",
        "64M",
        "-kernel",
        "embedded",
        "-chardev",
        "socket,id=c,path=p.sock,server=on,wait=off",
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtserialport,chardev=c,name=agent",
    ];
    let words = words.map(str::to_owned);
    let mut vm = QemuVm::start(dir.path(), "a", &words)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    for _ in 0..2 {
        UnixStream::connect(dir.path().join("p.sock"))?;
        vm.qmp.ok("system_reset", &json!({}))?;
        serial.ready()?;
    }
    UnixStream::connect(dir.path().join("p.sock"))?;
    for driver in ["virtserialport", "virtio-serial-pci"] {
        let error = vm.qmp.refused("device_add", &json!({"driver": driver}))?;
        ensure!(error.contains("does not support hotplugging"), "{error}");
    }
    vm.quit()?;
    ensure!(!dir.path().join("p.sock").exists());
    Ok(())
}

#[test]
fn a_ports_file_is_neither_memory_nor_a_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("d.img");
    fs::write(&disk, [0; 512])?;
    let disk = disk.display();
    let drive = format!("file={disk},if=virtio,format=raw");
    let chardev = format!("file,id=f,path={disk}");
    let words = [
        "qemu",
        "-nodefaults",
        "-drive",
        &drive,
        "-chardev",
        &chardev,
    ];
    let port = [
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtconsole,chardev=f",
    ];
    finish(pando(&words)?.args(port))?
        .expect_code(1)?
        .expect_error(&["d.img is memory or a disk of the machine"])?;
    Ok(())
}
