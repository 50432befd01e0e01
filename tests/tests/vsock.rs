#![forbid(unsafe_code)]
//! Where clones are reached: sockets and context IDs of their own, on every engine.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pando_tests::command::{HANG, create_template, finish, names, pando};
use pando_tests::grove::usual_options;
use pando_tests::qemu::QemuVm;
use pando_vmm::clone::Engine;
use pando_vmm::clone::pool::PoolLimits;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use pando_vmm::clone::vsock::VsockPlan;
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
fn clones_of_every_engine_have_sockets_of_their_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let used = dir.path().join("used.sock").display().to_string();
    let template = template(dir.path(), &["--vsock", &format!("5,uds={used}")])?;
    ensure!(!Path::new(&used).exists(), "the template VM has ended");
    let manifest = fs::read_to_string(template.join("manifest.json"))?;
    ensure!(manifest.contains("\"cid\": 5") && !manifest.contains("used.sock"));
    for (engine, shells) in [
        (Engine::Copy, 0),
        (Engine::Kernel, 0),
        (Engine::Root, 0),
        (Engine::Root, 2),
    ] {
        let sockets = tempfile::tempdir_in(dir.path())?;
        let mut supervisor = supervisor(&template, engine, shells)?;
        supervisor.use_vsock(VsockPlan {
            first_cid: Some(100),
            dir: Some(sockets.path().to_owned()),
        });
        if shells > 0 {
            supervisor.warm_up()?;
        }
        start_two(&mut supervisor)?;
        let found = names(sockets.path())?;
        ensure!(
            found == ["clone-0.vsock", "clone-1.vsock"],
            "{engine}: {found:?}"
        );
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
    for (words, error) in [
        (&["--vsock", "2"][..], "the context id 2 is no guest's"),
        (&["--vsock", "x"], "\"x\" is no context id"),
        (&["--vsock", "3,port=4"], "\"port=4\" is none of uds=PATH"),
    ] {
        create_template(&dir.path().join("no"), words)?
            .expect_code(2)?
            .expect_error(&[error])?;
    }
    let taken = dir.path().join("taken");
    fs::write(&taken, "a file")?;
    let words = format!("3,uds={}", taken.display());
    create_template(&dir.path().join("no"), &["--vsock", &words])?
        .expect_code(1)?
        .expect_error(&["vsock0", "exists and is no socket"])?;
    let template = template(dir.path(), &[])?;
    let clone = |words: &[&str]| finish(pando(&["clone"])?.arg(&template).args(words));
    clone(&["--vsock", "d"])?
        .expect_code(2)?
        .expect_error(&["the template has no virtio-vsock"])?;
    clone(&["--vsock-cid", "2"])?.expect_code(2)?;
    Ok(())
}

#[test]
fn a_machine_by_qemus_words_has_its_socket_after_each_reset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let device = "vhost-vsock-pci,guest-cid=3,x-uds-path=v.sock";
    let words = ["-m", "64M", "-kernel", "embedded", "-device", device];
    let words = words.map(str::to_owned);
    let mut vm = QemuVm::start(dir.path(), "a", &words)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    for _ in 0..3 {
        UnixStream::connect(dir.path().join("v.sock"))?;
        vm.qmp.ok("system_reset", &json!({}))?;
        serial.ready()?;
    }
    UnixStream::connect(dir.path().join("v.sock"))?;
    let mut other = pando(&["qemu", "-nodefaults", "-nographic"])?;
    finish(other.current_dir(dir.path()).args(&words))?
        .expect_code(1)?
        .expect_error(&["v.sock is in use"])?;
    vm.quit()?;
    ensure!(!dir.path().join("v.sock").exists());
    Ok(())
}
