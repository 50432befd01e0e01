#![forbid(unsafe_code)]
//! Templates that were damaged in every way: each is refused with the file's name, exit code 4.

use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pando_tests::command::{Finished, Running, eventually, finish, make_template, names, pando};
use pando_vmm::template::manifest::{FORMAT, Manifest, ManifestFile};

struct Case {
    _dir: tempfile::TempDir,
    template: PathBuf,
}

impl Case {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let template = make_template(dir.path())?;
        Ok(Self {
            template,
            _dir: dir,
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.template.join(name)
    }

    /// Opens a file of the template for writing, which its owner must first allow.
    fn writable(&self, name: &str) -> Result<File> {
        let path = self.file(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        Ok(File::options().read(true).write(true).open(path)?)
    }

    /// Flips a bit and gives the file its old modification time back: the seal stays intact.
    fn flip_unseen(&self, name: &str, offset: u64) -> Result<()> {
        let file = self.writable(name)?;
        let modified = file.metadata()?.modified()?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ 4], offset)?;
        file.set_times(FileTimes::new().set_modified(modified))?;
        Ok(())
    }

    fn edit_manifest(&self, edit: impl FnOnce(&mut ManifestFile)) -> Result<()> {
        let path = self.file("manifest.json");
        let mut file: ManifestFile = serde_json::from_slice(&fs::read(&path)?)?;
        edit(&mut file);
        let bytes = Manifest::seal(&path, file)?.to_json();
        self.writable("manifest.json")?.set_len(0)?;
        self.writable("manifest.json")?.write_all_at(&bytes, 0)?;
        Ok(())
    }

    fn clone_it(&self) -> Result<Finished> {
        finish(pando(&["clone"])?.arg(&self.template))
    }

    /// Every command that opens a template must refuse it with these texts.
    fn expect_refused(&self, texts: &[&str]) -> Result<()> {
        self.clone_it()?.expect_code(4)?.expect_error(texts)?;
        finish(pando(&["template", "inspect"])?.arg(&self.template))?.expect_code(4)?;
        finish(pando(&["template", "verify"])?.arg(&self.template))?.expect_code(4)?;
        Ok(())
    }
}

#[test]
fn a_directory_that_is_no_template() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for path in [dir.path().to_owned(), dir.path().join("missing")] {
        finish(pando(&["clone"])?.arg(&path))?
            .expect_code(4)?
            .expect_error(&[
                "is not a template: it has no readable manifest.json",
                "pando template create",
            ])?;
    }
    Ok(())
}

#[test]
fn a_ram_file_that_is_missing_cut_enlarged_or_replaced() -> Result<()> {
    let case = Case::new()?;
    let ram = case.file("ram0.mem");
    let away = case.file("away");
    fs::rename(&ram, &away)?;
    case.expect_refused(&[
        "ram0.mem is damaged: it is missing",
        "restore it from a copy",
    ])?;

    fs::copy(&away, &ram)?;
    case.expect_refused(&[
        "ram0.mem is not the file that was sealed: its inode is",
        "--reseal",
    ])?;
    fs::rename(&away, &ram)?;
    finish(pando(&["template", "verify"])?.arg(&case.template))?.expect_code(0)?;

    let bytes = fs::metadata(&ram)?.len();
    for wrong in [bytes - 4096, bytes + 4096, 0] {
        case.writable("ram0.mem")?.set_len(wrong)?;
        case.expect_refused(&[
            "ram0.mem is not the file that was sealed",
            &format!("its size is {wrong} bytes, sealed was {bytes} bytes"),
        ])?;
    }
    Ok(())
}

#[test]
fn a_ram_file_that_was_written() -> Result<()> {
    let case = Case::new()?;
    case.writable("ram0.mem")?.write_all_at(b"x", 1 << 20)?;
    case.expect_refused(&["ram0.mem", "its modification time is"])
}

/// The built-in guest's code is at 1 MiB: a running clone reads it.
#[test]
fn a_flipped_bit_of_ram_is_found_by_verify_and_ends_the_clone_that_reads_it() -> Result<()> {
    let case = Case::new()?;
    // The page that holds the guest's parameters and stack, past its first words.
    case.flip_unseen("ram0.mem", 0x10_2800)?;
    finish(pando(&["template", "verify"])?.arg(&case.template))?
        .expect_code(4)?
        .expect_error(&[
            "ram0.mem is damaged: page 25",
            "is not what the index has for it",
        ])?;
    let serial = case.file("serial");
    let running = Running::start(
        pando(&["clone"])?
            .arg(&case.template)
            .arg("--serial")
            .arg(&serial),
    )?;
    eventually("the clone listens", || {
        names(&serial).is_ok_and(|names| names.len() == 1)
    })?;
    let mut socket = UnixStream::connect(serial.join("clone-0.sock"))?;
    // It may have ended by the time this is sent.
    let _ = socket.write_all(b"i\n");
    running.finish()?.expect_code(5)?.expect_error(&[
        "guest memory could not be read",
        "ram0",
        "checksum",
    ])?;
    Ok(())
}

#[test]
fn an_index_that_is_missing_cut_or_flipped() -> Result<()> {
    let case = Case::new()?;
    let length = fs::metadata(case.file("pages.idx"))?.len();
    for offset in [0, 9, 20, 28, 40, length - 1] {
        case.flip_unseen("pages.idx", offset)?;
        case.expect_refused(&["pages.idx"])?;
        case.flip_unseen("pages.idx", offset)?;
    }
    finish(pando(&["template", "verify"])?.arg(&case.template))?.expect_code(0)?;
    case.writable("pages.idx")?.set_len(length / 2)?;
    case.expect_refused(&["pages.idx", "its size is"])?;
    fs::remove_file(case.file("pages.idx"))?;
    case.expect_refused(&["pages.idx is damaged: it is missing"])
}

#[test]
fn a_state_that_is_missing_cut_flipped_or_of_a_newer_format() -> Result<()> {
    let case = Case::new()?;
    let length = fs::metadata(case.file("state.bin"))?.len();
    for (offset, text) in [
        (0, "does not begin with the mark"),
        (12, "its header claims"),
        (16, "its header promises"),
        (24, "its checksum is"),
        (length / 2, "its checksum is"),
    ] {
        case.flip_unseen("state.bin", offset)?;
        case.expect_refused(&["state.bin is damaged", text])?;
        case.flip_unseen("state.bin", offset)?;
    }
    case.flip_unseen("state.bin", 8)?;
    case.expect_refused(&["state.bin has format 5, and this pando reads formats up to 1"])?;
    case.flip_unseen("state.bin", 8)?;
    case.writable("state.bin")?.set_len(length - 1)?;
    case.expect_refused(&["state.bin", "its size is"])?;
    fs::remove_file(case.file("state.bin"))?;
    case.expect_refused(&["state.bin is damaged: it is missing"])
}

/// Whole files of another template, with size and modification time as they were.
#[test]
fn a_state_or_index_of_another_template() -> Result<()> {
    let (case, other) = (Case::new()?, Case::new()?);
    for name in ["state.bin", "pages.idx"] {
        let own = fs::read(case.file(name))?;
        let swap = |bytes: &[u8]| -> Result<()> {
            let file = case.writable(name)?;
            let modified = file.metadata()?.modified()?;
            file.write_all_at(bytes, 0)?;
            file.set_times(FileTimes::new().set_modified(modified))?;
            Ok(())
        };
        let mut foreign = fs::read(other.file(name))?;
        if foreign.len() != own.len() || foreign == own {
            // Two boots are never quite the same, but their indexes may be: another checksum then,
            // under a frame that fits.
            foreign = own.clone();
            let last = foreign.len() - 1;
            foreign[last] ^= 1;
            let checksum = xxhash_rust::xxh3::xxh3_64(&foreign[32..]).to_le_bytes();
            foreign[24..32].copy_from_slice(&checksum);
        }
        swap(&foreign)?;
        finish(pando(&["template", "verify"])?.arg(&case.template))?
            .expect_code(4)?
            .expect_error(&[name, "damaged"])?;
        swap(&own)?;
        finish(pando(&["template", "verify"])?.arg(&case.template))?.expect_code(0)?;
    }
    Ok(())
}

#[test]
fn a_manifest_that_is_missing_cut_flipped_or_of_a_newer_version() -> Result<()> {
    let case = Case::new()?;
    let good = fs::read(case.file("manifest.json"))?;
    let write = |bytes: &[u8]| -> Result<()> {
        let file = case.writable("manifest.json")?;
        file.set_len(0)?;
        Ok(file.write_all_at(bytes, 0)?)
    };
    write(&good[..good.len() / 2])?;
    case.expect_refused(&["manifest.json is damaged", "EOF"])?;
    let text = String::from_utf8(good)?;
    write(text.replace("\"cpus\": 1", "\"cpus\": 2").as_bytes())?;
    case.expect_refused(&["manifest.json is damaged: its checksum is"])?;
    let newer = FORMAT + 1;
    write(
        text.replace("\"format\": 1", &format!("\"format\": {newer}"))
            .as_bytes(),
    )?;
    let named = format!("manifest.json has format {newer}");
    case.expect_refused(&[&named, "use a newer pando"])?;
    write(text.replace("\"format\": 1", "\"format\": 0").as_bytes())?;
    case.expect_refused(&["manifest.json is damaged: it has format 0"])?;
    write(text.replace("\"cpus\"", "\"moons\"").as_bytes())?;
    case.expect_refused(&["manifest.json is damaged", "moons"])?;
    write(b"")?;
    case.expect_refused(&["manifest.json is damaged"])?;
    fs::remove_file(case.file("manifest.json"))?;
    case.expect_refused(&["is not a template"])
}

/// Opening a FIFO waits for a writer, and a device has no end: neither is ever read.
#[test]
fn a_file_that_is_a_fifo_or_a_device() -> Result<()> {
    let case = Case::new()?;
    for name in ["manifest.json", "ram0.mem", "state.bin", "pages.idx"] {
        let (path, away) = (case.file(name), case.file("away"));
        fs::rename(&path, &away)?;
        let expect_refused = |kind: &str| -> Result<()> {
            case.expect_refused(&[name, kind, "not a regular file"])?;
            finish(pando(&["template", "verify", "--reseal"])?.arg(&case.template))?
                .expect_code(4)?
                .expect_error(&[name, kind])?;
            Ok(fs::remove_file(&path)?)
        };
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR)?;
        expect_refused("it is a FIFO")?;
        std::os::unix::fs::symlink("/dev/zero", &path)?;
        expect_refused("it is a device")?;
        fs::rename(&away, &path)?;
    }
    finish(pando(&["template", "verify"])?.arg(&case.template))?.expect_code(0)?;
    Ok(())
}

#[test]
fn a_state_of_other_vcpus_than_the_manifest_has() -> Result<()> {
    let case = Case::new()?;
    case.edit_manifest(|manifest| manifest.cpus = 2)?;
    case.expect_refused(&[
        "state.bin is damaged: it has the state of 1 vCPUs, the manifest has 2",
    ])?;
    finish(pando(&["template", "verify", "--reseal"])?.arg(&case.template))?
        .expect_code(4)?
        .expect_error(&["state.bin is damaged"])?;
    Ok(())
}

#[test]
fn a_feature_or_register_that_this_host_lacks_is_named() -> Result<()> {
    let case = Case::new()?;
    case.edit_manifest(|manifest| {
        // Leaf 7.0, edx bit 2: avx512_4vnniw, of a processor that was hardly ever sold.
        for row in &mut manifest.host.cpuid {
            if row[..2] == [7, 0] {
                row[6] |= 1 << 2;
            }
        }
        manifest.host.msrs.push(0x4b56_4dff);
    })?;
    case.clone_it()?.expect_code(4)?.expect_error(&[
        "this host cannot run",
        "avx512_4vnniw",
        "MSR 0x4b564dff",
        "run it on a host like the one that made it",
    ])?;
    Ok(())
}

#[test]
fn a_copied_template_is_sealed_again_only_when_every_checksum_is_right() -> Result<()> {
    let case = Case::new()?;
    let copy = case.file("copy");
    fs::create_dir(&copy)?;
    for name in ["manifest.json", "pages.idx", "ram0.mem", "state.bin"] {
        fs::copy(case.file(name), copy.join(name))?;
    }
    let reseal = |dir: &Path| finish(pando(&["template", "verify", "--reseal"])?.arg(dir));
    finish(pando(&["template", "verify"])?.arg(&copy))?.expect_code(4)?;
    reseal(&copy)?.expect_code(0)?;
    finish(pando(&["template", "verify"])?.arg(&copy))?.expect_code(0)?;

    let damaged = Case {
        template: copy,
        _dir: tempfile::tempdir()?,
    };
    damaged
        .writable("ram0.mem")?
        .write_all_at(b"x", 0x10_2800)?;
    let before = fs::read(damaged.file("manifest.json"))?;
    reseal(&damaged.template)?
        .expect_code(4)?
        .expect_error(&["ram0.mem is damaged"])?;
    assert_eq!(
        fs::read(damaged.file("manifest.json"))?,
        before,
        "nothing was sealed"
    );
    Ok(())
}

#[test]
fn inspect_draws_the_image() -> Result<()> {
    let case = Case::new()?;
    let svg = case.file("map.svg");
    let shown = finish(
        pando(&["template", "inspect", "--svg"])?
            .arg(&svg)
            .arg(&case.template),
    )?
    .expect_code(0)?;
    assert!(
        shown.stdout.contains('·') && shown.stdout.contains("0 MiB"),
        "{}",
        shown.stdout
    );
    assert!(fs::read_to_string(svg)?.starts_with("<svg"));
    let json = finish(pando(&["template", "inspect", "--json"])?.arg(&case.template))?.json()?;
    let backend = &json["backends"][0];
    let pages = ["data_bytes", "zero_bytes", "hole_bytes"].map(|kind| backend[kind].as_u64());
    let sum = pages.iter().flatten().sum::<u64>();
    assert_eq!(Some(sum), backend["bytes"].as_u64().context("bytes").ok());
    Ok(())
}
