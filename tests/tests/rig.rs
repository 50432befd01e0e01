#![forbid(unsafe_code)]
//! Linux guests: Debian's kernels as host and as guest, in the nested rig.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use pando_tests::rig::packages::system_program;
use pando_tests::rig::{L1, Series, built_program};

const SCENARIO: &str = include_str!("../rig/linux-clones.sh");
const NODES: &str = include_str!("../rig/linux-nodes.sh");
const QEMU: &str = include_str!("../rig/linux-qemu.sh");
const IDENTITY: &str = include_str!("../rig/linux-identity.sh");
const DEVICES: &str = include_str!("../rig/linux-devices.sh");
const HOTPLUG: &str = include_str!("../rig/linux-hotplug.sh");
const MEMORY: &str = include_str!("../rig/linux-memory.sh");
const FARM: &str = include_str!("../rig/linux-farm.sh");
const VHOST: &str = include_str!("../rig/linux-vhost.sh");
const BALLOON: &str = include_str!("../rig/linux-balloon.sh");
const NET: &str = include_str!("../rig/linux-net.sh");
/// The guest above the gap has 5 GiB, of which it touches little.
const MEMORY_MIB: u32 = 7168;
/// A template, its root and ten clones of 192 MiB, of which they share most.
const FARM_MEMORY_MIB: u32 = 5120;
const LIMIT: Duration = Duration::from_secs(900);

fn linux(series: Series) -> Result<()> {
    let report = L1::new(&format!("linux-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .memory_mib(MEMORY_MIB)
        .limit(LIMIT)
        .run(SCENARIO)?;
    report.record(series.name())?;
    ensure!(report.passed(), "Linux {series}:\n{report}");
    Ok(())
}

#[test]
fn linux_6_1_is_frozen_and_cloned() -> Result<()> {
    linux(Series::Linux6_1)
}

#[test]
fn linux_6_12_is_frozen_and_cloned() -> Result<()> {
    linux(Series::Linux6_12)
}

#[test]
fn linux_6_1_sees_nodes_and_modules() -> Result<()> {
    let report = L1::new("linux-nodes", Series::Linux6_1)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(NODES)?;
    report.record("nodes")?;
    ensure!(report.passed(), "Linux 6.1 with nodes:\n{report}");
    Ok(())
}

#[test]
fn linux_6_1_is_templated_by_qemus_command_lines() -> Result<()> {
    let report = L1::new("linux-qemu", Series::Linux6_1)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(QEMU)?;
    report.record("qemu")?;
    ensure!(
        report.passed(),
        "Linux 6.1 by QEMU's command lines:\n{report}"
    );
    Ok(())
}

#[test]
fn linux_6_12_gives_memory_away_where_it_may() -> Result<()> {
    let report = L1::new("linux-balloon", Series::Linux6_12)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(BALLOON)?;
    report.record("balloon")?;
    ensure!(report.passed(), "Linux 6.12 with a balloon:\n{report}");
    Ok(())
}

#[test]
fn linux_6_12_goes_on_in_ten_clones() -> Result<()> {
    let mut l1 = L1::new("linux-farm", Series::Linux6_12)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .program(&built_program("vsock")?, "/bin/vsock")
        .memory_mib(FARM_MEMORY_MIB)
        .limit(LIMIT);
    for tool in ["mke2fs", "e2fsck"] {
        l1 = l1.program(&system_program(tool)?, &format!("/rig/{tool}"));
    }
    let report = l1.run(FARM)?;
    report.record("farm")?;
    ensure!(report.passed(), "ten clones of Linux 6.12:\n{report}");
    Ok(())
}

fn devices(series: Series) -> Result<()> {
    let mut l1 = L1::new(&format!("linux-devices-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .program(&built_program("vsock")?, "/bin/vsock")
        .limit(LIMIT);
    for tool in ["mke2fs", "e2fsck"] {
        // Not in /bin: busybox has one of the name that knows less.
        l1 = l1.program(&system_program(tool)?, &format!("/rig/{tool}"));
    }
    let report = l1.run(DEVICES)?;
    report.record(&format!("devices-{series}"))?;
    ensure!(
        report.passed(),
        "Linux {series} with devices on a PCI bus:\n{report}"
    );
    Ok(())
}

#[test]
fn linux_6_1_goes_on_with_its_disks_and_entropy() -> Result<()> {
    devices(Series::Linux6_1)
}

#[test]
fn linux_6_12_goes_on_with_its_disks_and_entropy() -> Result<()> {
    devices(Series::Linux6_12)
}

fn hotplug(series: Series) -> Result<()> {
    let report = L1::new(&format!("linux-hotplug-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(HOTPLUG)?;
    report.record(&format!("hotplug-{series}"))?;
    ensure!(
        report.passed(),
        "Linux {series} with devices that come and go:\n{report}"
    );
    Ok(())
}

#[test]
fn linux_6_1_plugs_and_unplugs_its_devices() -> Result<()> {
    hotplug(Series::Linux6_1)
}

#[test]
fn linux_6_12_plugs_and_unplugs_its_devices() -> Result<()> {
    hotplug(Series::Linux6_12)
}

fn memory(series: Series) -> Result<()> {
    let report = L1::new(&format!("linux-memory-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(MEMORY)?;
    report.record(&format!("memory-{series}"))?;
    ensure!(
        report.passed(),
        "Linux {series} with memory that comes and goes:\n{report}"
    );
    Ok(())
}

#[test]
fn linux_6_1_plugs_and_unplugs_its_memory() -> Result<()> {
    memory(Series::Linux6_1)
}

#[test]
fn linux_6_12_plugs_and_unplugs_its_memory() -> Result<()> {
    memory(Series::Linux6_12)
}

fn net(series: Series) -> Result<()> {
    let report = L1::new(&format!("linux-net-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT)
        .run(NET)?;
    report.record(&format!("net-{series}"))?;
    ensure!(
        report.passed(),
        "Linux {series} with its network:\n{report}"
    );
    Ok(())
}

#[test]
fn linux_6_1_goes_on_with_its_network() -> Result<()> {
    net(Series::Linux6_1)
}

#[test]
fn linux_6_12_goes_on_with_its_network() -> Result<()> {
    net(Series::Linux6_12)
}

fn identity(series: Series) -> Result<()> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest/vm-fork");
    let report = L1::new(&format!("linux-identity-{series}"), series)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .program(&system_program("perl")?, "/usr/bin/perl")
        .file(Path::new(unit), "/rig/vm-fork")
        .limit(LIMIT)
        .run(IDENTITY)?;
    report.record(&format!("identity-{series}"))?;
    ensure!(report.passed(), "Linux {series}, told apart:\n{report}");
    Ok(())
}

#[test]
fn linux_6_1_clones_are_told_apart() -> Result<()> {
    identity(Series::Linux6_1)
}

#[test]
fn linux_6_12_clones_are_told_apart() -> Result<()> {
    identity(Series::Linux6_12)
}

#[test]
fn linux_6_12_uses_a_disk_of_another_process() -> Result<()> {
    let mut l1 = L1::new("linux-vhost", Series::Linux6_12)
        .program(&built_program("pando")?, "/bin/pando")
        .program(&built_program("say")?, "/bin/say")
        .limit(LIMIT);
    for tool in ["qemu-storage-daemon", "mke2fs", "e2fsck"] {
        l1 = l1.program(&system_program(tool)?, &format!("/rig/{tool}"));
    }
    let report = l1.run(VHOST)?;
    report.record("vhost")?;
    ensure!(report.passed(), "Linux 6.12 with vhost-user:\n{report}");
    Ok(())
}
