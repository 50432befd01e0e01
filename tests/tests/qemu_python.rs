#![forbid(unsafe_code)]
//! The Python package `qemu.qmp` from PyPI drives Pando unchanged.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use pando_tests::command::finish;
use pando_tests::rig::built_program;
use pando_tests::style::source::root;

/// The version that the script was written for.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// A Python with the package: made once in the build's folder.
fn python() -> Result<PathBuf> {
    let program = built_program("pando")?;
    let target = program
        .parent()
        .and_then(Path::parent)
        .context("no build folder")?;
    let home = target.join("qemu-qmp-0.0.6");
    let python = home.join("bin/python");
    let has_package = |python: &Path| {
        let import = Command::new(python)
            .args(["-c", "import qemu.qmp"])
            .output();
        import.is_ok_and(|output| output.status.success())
    };
    if !has_package(&python) {
        let venv = finish(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
        if venv.code != Some(0) {
            bail!("python3 has no venv: run tests/setup\n{}", venv.stderr);
        }
        let mut pip = Command::new(&python);
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            PACKAGE,
        ]);
        let pip = finish(&mut pip)?;
        if pip.code != Some(0) {
            bail!(
                "{PACKAGE} cannot be had from PyPI; this test needs it once, and the network for that:\n{}",
                pip.stderr
            );
        }
    }
    Ok(python)
}

#[test]
fn the_package_qemu_qmp_makes_a_template_and_runs_two_clones() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let script = root()?.join("tests/qmp/recipe.py");
    let mut command = Command::new(python()?);
    command
        .arg(script)
        .arg(built_program("pando")?)
        .arg(dir.path());
    let finished = finish(&mut command)?.expect_code(0)?;
    assert_eq!(finished.stdout, "done\n");
    Ok(())
}
