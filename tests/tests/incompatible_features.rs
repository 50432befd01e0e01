#![forbid(unsafe_code)]
//! What the templating page calls incompatible features, each as QEMU has it and as Pando does. What can be seen
//! without a guest is run here; for the rest the tests that see it are named, and are there. The page
//! `docs/incompatible-features.md` is written by
//! `PANDO_WRITE_DOCS=1 cargo nextest run -p pando-tests --test incompatible_features`.

use std::fmt::Write;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, memory, words};
use pando_tests::style::source::root;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

/// A feature on memory of a kind.
struct Row {
    /// The paragraph of the templating page.
    paragraph: &'static str,
    /// What is tried.
    feature: &'static str,
    /// What QEMU 10.0.2 does.
    qemu: &'static str,
    /// What Pando does, beside what it says.
    pando: &'static str,
    how: How,
}

/// How it is seen.
enum How {
    /// Machines with these options do not start and say all these texts, of which the first is shown.
    Refused(&'static [&'static str], &'static [&'static str]),
    /// A clone starts, and the last of these commands of a monitor is refused with these texts: the first of
    /// them in a clone in which Linux runs as well.
    Command(fn() -> Vec<(&'static str, Value)>, &'static [&'static str]),
    /// Tests see it, with a guest or a process of another kind: a file below `tests` or `vmm`, and a name.
    Seen(&'static [(&'static str, &'static str)]),
}

const BALLOON_RIG: (&str, &str) = (
    "tests/tests/rig.rs",
    "linux_6_12_gives_memory_away_where_it_may",
);
const VHOST_RIG: (&str, &str) = (
    "tests/tests/rig.rs",
    "linux_6_12_uses_a_disk_of_another_process",
);
const MEMORY_RIG: (&str, &str) = (
    "tests/tests/rig.rs",
    "linux_6_12_plugs_and_unplugs_its_memory",
);

/// What that test runs.
const MEMORY_SCRIPT: &str = "tests/rig/linux-memory.sh";

const VHOST: &str = "vhost-user and multi-process QEMU";
const BALLOON: &str = "virtio-balloon";
const MEM: &str = "virtio-mem";
const MIGRATION: &str = "VM migration";

const DISCARD: &str =
    "ram_block_discard_range: Discarding RAM with readonly files is not supported";

fn capability(name: &'static str) -> Vec<(&'static str, Value)> {
    let list = json!({"capabilities": [{"capability": name, "state": true}]});
    vec![("migrate-set-capabilities", list)]
}

/// In the order of the page.
fn rows() -> Vec<Row> {
    let all = [
        in_other_processes(),
        in_other_qemus(),
        inflating(),
        reporting(),
        growing(),
        migrating(),
    ];
    all.into_iter().flatten().collect()
}

fn in_other_processes() -> Vec<Row> {
    vec![
        Row {
            paragraph: VHOST,
            feature: "`vhost-user-blk-pci` in a clone",
            qemu: "starts, silently; the guest's requests are never answered",
            pando: "refused at the start",
            how: How::Refused(
                &[
                    "-chardev",
                    "socket,id=vu,path=socket",
                    "-device",
                    "vhost-user-blk-pci,chardev=vu",
                ],
                &[
                    "vhost-user-blk shares all guest memory with another process",
                    "memory backend \"pc.ram\"",
                    "share=on",
                ],
            ),
        },
        Row {
            paragraph: VHOST,
            feature: "`-netdev vhost-user` in a clone",
            qemu: "the same",
            pando: "refused at the start",
            how: How::Refused(
                &[
                    "-chardev",
                    "socket,id=vu,path=socket",
                    "-netdev",
                    "vhost-user,id=n0,chardev=vu",
                    "-device",
                    "virtio-net-pci,netdev=n0",
                ],
                &[
                    "vhost-user-net shares all guest memory with another process",
                    "memory backend \"pc.ram\"",
                ],
            ),
        },
        Row {
            paragraph: VHOST,
            feature: "vhost-user on a template that is being made, or other shared memory",
            qemu: "works",
            pando: "works; a clone of that template is refused, unless the device was taken out before",
            how: How::Seen(&[
                VHOST_RIG,
                (
                    "tests/tests/vhost_user.rs",
                    "a_disk_of_another_process_is_there_goes_and_comes",
                ),
            ]),
        },
    ]
}

fn in_other_qemus() -> Vec<Row> {
    vec![
        Row {
            paragraph: VHOST,
            feature: "`x-pci-proxy-dev` in a clone",
            qemu: "the other process ends: \"unable to map backing store for guest RAM: Permission denied\"; the parent \
                   says \"Connection reset by peer\" for ever (under TCG it crashes)",
            pando: "refused at the start",
            how: How::Refused(
                &["-device", "x-pci-proxy-dev,id=lsi0,fd=SOCKET"],
                &[
                    "device 'x-pci-proxy-dev' cannot be had",
                    "memory backend \"pc.ram\"",
                ],
            ),
        },
        Row {
            paragraph: VHOST,
            feature: "the same, plugged into a clone",
            qemu: "the same",
            pando: "`device_add` is refused",
            how: How::Command(
                || {
                    let device = json!({"driver": "x-pci-proxy-dev", "id": "p0", "fd": "3"});
                    vec![("device_add", device)]
                },
                &["device 'x-pci-proxy-dev' cannot be had"],
            ),
        },
        Row {
            paragraph: VHOST,
            feature: "`-object x-remote-object`",
            qemu: "the process on the other side",
            pando: "refused by name",
            how: How::Refused(
                &["-object", "x-remote-object,id=robj1,devid=lsi0,fd=3"],
                &["object 'x-remote-object' cannot be had"],
            ),
        },
        Row {
            paragraph: VHOST,
            feature: "`-machine x-remote`",
            qemu: "the same",
            pando: "refused by name",
            how: How::Refused(
                &["-machine", "x-remote"],
                &["machine type 'x-remote' cannot be had"],
            ),
        },
    ]
}

fn inflating() -> Vec<Row> {
    vec![
        Row {
            paragraph: BALLOON,
            feature: "statistics of a clone's memory",
            qemu: "work",
            pando: "work",
            how: How::Seen(&[
                BALLOON_RIG,
                (
                    "vmm/src/device/virtio/tests/balloon.rs",
                    "statistics_are_asked_for_as_often_as_it_is_wanted",
                ),
            ]),
        },
        Row {
            paragraph: BALLOON,
            feature: "inflating a clone's balloon",
            qemu: "one line for each page of 4 KiB: \"ram_block_discard_range: Discarding RAM with readonly files is not \
                   supported\"; nothing is freed, and memory that the guest clears first is even taken",
            pando: "the same text at most once a second, each page counted \
                    (`pando_discard_refused_total{source=\"balloon\"}`); nothing is freed, and the guest is unharmed",
            how: How::Seen(&[
                BALLOON_RIG,
                (
                    "vmm/src/device/virtio/tests/balloon.rs",
                    "a_templates_pages_stay_and_each_attempt_counts",
                ),
                (
                    "vmm/tests/machine/discards.rs",
                    "a_clones_guest_reads_what_it_had_where_a_discard_was_refused",
                ),
            ]),
        },
        Row {
            paragraph: BALLOON,
            feature: "inflating with `share=off` alone",
            qemu: "warns once and punches holes into the template: other clones read zeros",
            pando: "refused like any other clone's: the file is open for reading only",
            how: How::Seen(&[(
                "vmm/src/memory/discard/tests.rs",
                "memory_of_a_template_is_as_it_was",
            )]),
        },
    ]
}

fn reporting() -> Vec<Row> {
    vec![
        Row {
            paragraph: BALLOON,
            feature: "free page reporting in a clone",
            qemu: "one line for each block",
            pando: "the same text at most once a second, each block counted \
                    (`pando_discard_refused_total{source=\"free-page-reporting\"}`)",
            how: How::Seen(&[BALLOON_RIG]),
        },
        Row {
            paragraph: BALLOON,
            feature: "inflating and reporting in a clone with `discard=zero`",
            qemu: "has no such option",
            pando: "memory goes back to the host, reads as zero and never again as the template's, under faults of others \
                    and whatever becomes of the pager",
            how: How::Seen(&[
                BALLOON_RIG,
                (
                    "pager/tests/discards.rs",
                    "a_page_is_never_the_templates_again_under_faults_of_others",
                ),
                (
                    "pager/tests/discards.rs",
                    "what_was_discarded_stays_so_when_another_pager_takes_over",
                ),
                (
                    "vmm/tests/machine/discards.rs",
                    "a_clones_guest_reads_zero_and_never_the_template_where_that_was_asked_for",
                ),
            ]),
        },
        Row {
            paragraph: BALLOON,
            feature: "free page hinting (`free-page-hint=on`)",
            qemu: "needs an iothread; used by a migration that copies memory while the guest runs",
            pando: "refused by name",
            how: How::Refused(
                &["-device", "virtio-balloon-pci,free-page-hint=on"],
                &["free-page-hint=on cannot be had"],
            ),
        },
    ]
}

fn growing() -> Vec<Row> {
    vec![
        Row {
            paragraph: MEM,
            feature: "a virtio-mem device on a template's file",
            qemu: "fails when it is realized",
            pando: "refused at the start, with QEMU's words",
            how: How::Refused(
                &[
                    "-object",
                    "memory-backend-file,id=vm0,mem-path=tpl,size=64M,share=off,readonly=on,rom=off",
                    "-device",
                    "virtio-mem-pci,id=v0,memdev=vm0",
                ],
                &[
                    DISCARD,
                    "Unexpected error discarding RAM: Operation not permitted",
                ],
            ),
        },
        Row {
            paragraph: MEM,
            feature: "the same, plugged into a clone",
            qemu: "`device_add` fails",
            pando: "`device_add` is refused",
            how: How::Command(
                || {
                    let memory = json!({
                        "qom-type": "memory-backend-file", "id": "vm0", "mem-path": "tpl", "size": 64 << 20,
                        "share": false, "readonly": true, "rom": "off",
                    });
                    let device = json!({"driver": "virtio-mem-pci", "id": "v0", "memdev": "vm0"});
                    vec![("object-add", memory), ("device_add", device)]
                },
                &["Unexpected error discarding RAM: Operation not permitted"],
            ),
        },
        Row {
            paragraph: MEM,
            feature: "a device with memory of its own, plugged into a clone, or frozen with `requested-size=0`",
            qemu: "works",
            pando: "works: grown, used, shrunk, and what was given back is the host's again",
            how: How::Seen(&[MEMORY_RIG]),
        },
    ]
}

fn migrating() -> Vec<Row> {
    vec![
        Row {
            paragraph: MIGRATION,
            feature: "`release-ram`",
            qemu: "accepted; while it sends, one line for each page",
            pando: "refused when it is set",
            how: How::Command(
                || capability("release-ram"),
                &["release-ram is not supported", DISCARD],
            ),
        },
        Row {
            paragraph: MIGRATION,
            feature: "postcopy",
            qemu: "on the destination: \"Postcopy is not supported: Host backend files need to be TMPFS or HUGETLBFS only\", or \
                   an error when it discards RAM first",
            pando: "refused when it is set",
            how: How::Command(
                || capability("postcopy-ram"),
                &["Postcopy is not supported", DISCARD],
            ),
        },
    ]
}

/// Options of a clone of `tpl`.
fn clone_of(more: &[&str]) -> Vec<String> {
    let mut all = memory("tpl", CLONE);
    // Room for memory that comes later.
    if let Some(size) = all.iter_mut().find(|word| *word == "64M") {
        *size = "64M,slots=1,maxmem=1G".to_owned();
    }
    all.extend(words(more));
    all
}

fn refused(dir: &Path, options: &[&str], texts: &[&str]) -> Result<String> {
    // What leads to another process is there, so that nothing else is in the way.
    let (near, _far) = UnixStream::pair()?;
    let near = OwnedFd::from(near);
    fcntl_setfd(&near, FdFlags::empty())?;
    let options: Vec<String> = clone_of(options)
        .iter()
        .map(|word| word.replace("SOCKET", &near.as_raw_fd().to_string()))
        .collect();
    let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
    let finished = finish(command.current_dir(dir).args(options))?;
    let finished = finished.expect_code(1)?.expect_error(texts)?;
    Ok(finished.stderr)
}

fn commanded(dir: &Path, mut commands: Vec<(&str, Value)>, texts: &[&str]) -> Result<String> {
    // A bus, on which devices are plugged.
    let all = clone_of(&["-device", "virtio-rng-pci", "-S"]);
    let mut vm = QemuVm::start(dir, "m", &all)?;
    let (command, arguments) = commands.pop().context("no command")?;
    for (command, arguments) in commands {
        vm.qmp.ok(command, &arguments)?;
    }
    let said = vm.qmp.refused(command, &arguments)?;
    for text in texts {
        ensure!(said.contains(text), "{text:?} is not in {said:?}");
    }
    vm.quit()?;
    Ok(said)
}

#[test]
fn every_feature_is_as_the_page_says() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let template = fs::File::create(dir.path().join("tpl"))?;
    template.set_len(64 << 20)?;
    fs::write(dir.path().join("socket"), "")?;
    let mut page = "# Features that do not go with a template's memory\n\n\
        A template's file cannot be changed to discard RAM, and its clones share no memory with another process. QEMU's templating \
        page lists what\nthat rules out. Here each of them is as QEMU 10.0.2 has it and as Pando does. \
        `tests/tests/incompatible_features.rs` runs what\ncan be seen without a guest, makes sure that the other tests are there, and \
        writes this page.\n\n\
        | | what is tried | QEMU | Pando | seen by |\n|---|---|---|---|---|\n"
        .to_owned();
    let root = root()?;
    let in_linux = fs::read_to_string(root.join(MEMORY_SCRIPT)).context(MEMORY_SCRIPT)?;
    for row in rows() {
        let feature = row.feature;
        let seen = match &row.how {
            How::Refused(options, texts) => {
                refused(dir.path(), options, texts).with_context(|| feature.to_owned())?;
                said(texts)
            }
            How::Command(commands, texts) => {
                let done = commanded(dir.path(), commands(), texts);
                done.with_context(|| feature.to_owned())?;
                let first = texts.first().copied().unwrap_or_default();
                ensure!(
                    in_linux.contains(first),
                    "{MEMORY_SCRIPT} does not ask for {first:?}"
                );
                let (_, rig) = MEMORY_RIG;
                format!("{}; `{rig}`", said(texts))
            }
            How::Seen(tests) => {
                let names = tests.iter().map(|(file, name)| {
                    let source =
                        fs::read_to_string(root.join(file)).with_context(|| (*file).to_owned())?;
                    let is_there = source.contains(&format!("#[test]\nfn {name}("));
                    ensure!(is_there, "{feature}: {file} has no test {name}");
                    Ok(format!("`{name}`"))
                });
                names.collect::<Result<Vec<_>>>()?.join(", ")
            }
        };
        writeln!(
            page,
            "| {} | {feature} | {} | {} | {seen} |",
            row.paragraph, row.qemu, row.pando
        )?;
    }
    let path = root.join("docs/incompatible-features.md");
    if std::env::var_os("PANDO_WRITE_DOCS").is_some() {
        fs::write(&path, &page)?;
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    ensure!(
        written == page,
        "docs/incompatible-features.md is not what is seen: run this test with PANDO_WRITE_DOCS=1"
    );
    Ok(())
}

/// What it says, and that it was seen here.
fn said(texts: &[&str]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| format!("\"{text}\"")).collect();
    format!("this test: {}", texts.join(", "))
}
