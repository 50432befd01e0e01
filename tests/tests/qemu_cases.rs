#![forbid(unsafe_code)]
//! Every recorded case of QEMU 10.0.2, run with `pando qemu`: the same outcome and the same words, or
//! listed in `docs/qemu-compat.md` with the reason. That page is written here:
//! `PANDO_WRITE_DOCS=1 cargo nextest run -p pando-tests --test qemu_cases`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Running, eventually, pando};
use pando_tests::qemu::Qmp;
use pando_tests::qemu_differences::{DIFFERENCES, Difference, Kind};
use pando_tests::style::source::root;
use serde_json::Value;

const CASES: [&str; 2] = [
    include_str!("../fixtures/qemu-cases.json"),
    include_str!("../fixtures/qemu-cases-more.json"),
];

/// What a case came to.
struct Outcome {
    /// What is not as QEMU has it; empty when all is.
    deviations: Vec<String>,
    code: Option<i32>,
    stderr: String,
}

struct Case<'a>(&'a Value);

impl Case<'_> {
    fn text(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap_or_default()
    }

    fn list(&self, name: &str, dir: &str) -> Vec<String> {
        let words = self.0[name].as_array().into_iter().flatten();
        words
            .filter_map(Value::as_str)
            .map(|word| word.replace("$D", dir))
            .collect()
    }

    fn is_volatile(&self) -> bool {
        !self.0["volatile"].is_null()
    }
}

fn shell(script: &str, dir: &Path) -> Result<String> {
    let output = Command::new("sh")
        .args(["-c", script])
        .env("D", dir)
        .current_dir(dir)
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A message without the program's name and the option that it is about.
fn core(line: &str) -> &str {
    let line = line.strip_prefix("qemu-system-x86_64: ").unwrap_or(line);
    let options = [
        "-object",
        "-device",
        "-numa",
        "-global",
        "-incoming",
        "-smbios",
        "-chardev",
    ];
    match line.split_once(": ") {
        Some((option, rest)) if options.iter().any(|name| option.starts_with(name)) => rest,
        _ => line,
    }
}

/// What is the same whatever the file system.
fn comparable(text: &str) -> String {
    let lines = text.trim().lines().map(|line| {
        let words = line.split(' ').filter(|word| !word.starts_with("blocks="));
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether an answer says what QEMU's says; an error may say more.
fn says(answer: &Value, expected: &Value) -> bool {
    match (&answer["error"], &expected["error"]) {
        (Value::Null, _) | (_, Value::Null) => answer == expected,
        (ours, theirs) => {
            let desc = |error: &Value| error["desc"].as_str().unwrap_or_default().to_owned();
            ours["class"] == theirs["class"] && desc(ours).contains(&desc(theirs))
        }
    }
}

fn run(case: &Case<'_>) -> Result<Outcome> {
    let (home, sockets) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let dir = home.path();
    let name = dir.to_str().context("a path that is no text")?;
    shell(case.text("setup"), dir)?;
    // Another user may make its socket there.
    shell(&format!("chmod 777 {}", sockets.path().display()), dir)?;
    let socket = sockets.path().join("q");
    let inner = pando(&["qemu", "-nodefaults", "-nographic", "-S", "-qmp"])?;
    let mut words = case.list("run_under", name);
    words.push(inner.get_program().to_string_lossy().into_owned());
    words.extend(
        inner
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.push(format!("unix:{},server=on,wait=off", socket.display()));
    words.extend(case.list("args", name));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).current_dir(dir).env("D", dir);
    let mut running = Running::start(&mut command)?;
    // The socket is there a moment before anybody listens on it.
    let mut monitor = None;
    eventually("it listens or has ended", || {
        monitor = Qmp::open(&socket).ok();
        monitor.is_some() || !matches!(running.child.try_wait(), Ok(None))
    })?;
    let mut deviations = Vec::new();
    if let Some(mut qmp) = monitor {
        for exchange in case.0["expect_qmp"].as_array().into_iter().flatten() {
            let expected = with_path(&exchange["reply"], name)?;
            if expected["EOF"] == true {
                continue;
            }
            let answer = qmp.line(&with_path(&exchange["cmd"], name)?.to_string())?;
            if !case.is_volatile() && !says(&answer, &expected) {
                deviations.push(format!("{} is answered {answer}", exchange["cmd"]));
            }
        }
        // One that ends by itself may be gone by now; how it ended is compared below.
        let _gone = qmp.line(r#"{"execute":"quit"}"#);
    }
    let finished = running.finish()?;
    compare(case, dir, name, &finished.stderr, &mut deviations)?;
    let expected = case.0["expect_exit"]
        .as_i64()
        .map(|code| i32::try_from(code).unwrap_or(-1));
    if finished.code != expected {
        deviations.push(format!(
            "it exits with {:?}, QEMU with {expected:?}",
            finished.code
        ));
    }
    Ok(Outcome {
        deviations,
        code: finished.code,
        stderr: finished.stderr,
    })
}

fn with_path(value: &Value, dir: &str) -> Result<Value> {
    Ok(serde_json::from_str(&value.to_string().replace("$D", dir))?)
}

fn compare(
    case: &Case<'_>,
    dir: &Path,
    name: &str,
    stderr: &str,
    deviations: &mut Vec<String>,
) -> Result<()> {
    let expected = case.text("stderr").replace("$D", name);
    for line in expected.lines().map(core).filter(|line| !line.is_empty()) {
        if !stderr.contains(line) {
            deviations.push(format!("it does not say {line:?}"));
        }
    }
    if expected.is_empty() && !stderr.is_empty() {
        deviations.push("QEMU says nothing".to_owned());
    }
    let script = case.text("check");
    // A listing with dates is for people.
    if !script.is_empty() && script != "ls -l $D" {
        let found = comparable(&shell(script, dir)?).replace(name, "$D");
        if found != comparable(case.text("expect_check")) {
            deviations.push(format!("it leaves {found:?}"));
        }
    }
    Ok(())
}

#[test]
fn every_case_has_qemus_outcome_or_is_listed_with_the_reason() -> Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut cases = Vec::new();
    for text in CASES {
        let document: Value = serde_json::from_str(text)?;
        cases.extend(document["cases"].as_array().context("no cases")?.clone());
    }
    ensure!(cases.len() > 310);
    let mut same = 0;
    let mut wrong = Vec::new();
    let mut page = String::new();
    for case in cases.iter().map(Case) {
        let id = case.text("id");
        let outcome = run(&case).with_context(|| id.to_owned())?;
        let listed = DIFFERENCES.iter().find(|difference| difference.covers(id));
        match (outcome.deviations.is_empty(), listed) {
            (true, None) => same += 1,
            (true, Some(difference)) if difference.depends_on_host => {
                row(&mut page, &case, difference);
            }
            (true, Some(_)) => wrong.push(format!("{id} is listed, and is as with QEMU")),
            (false, None) => wrong.push(format!(
                "{id}: {:?}: {}",
                outcome.deviations, outcome.stderr
            )),
            (false, Some(difference)) => {
                if !outcome.stderr.contains("panicked") && difference.fits(outcome.code) {
                    row(&mut page, &case, difference);
                } else {
                    wrong.push(format!("{id}: {:?} {}", outcome.code, outcome.stderr));
                }
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} cases:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    let text = format!(
        "# QEMU's recorded cases\n\n\
         `tests/fixtures/qemu-cases.json` and `qemu-cases-more.json` hold {} cases that were run with QEMU 10.0.2: options for memory,\n\
         NUMA, vCPUs, modules, balloon, virtio-mem, migration and identity, each with its exit code, messages, monitor answers and \
         what it\nleaves on disk. `tests/tests/qemu_cases.rs` runs all of them with `pando qemu` and writes this page.\n{same} cases have QEMU's outcome and \
         contain its words. The others are these.\n\n\
         *better*: QEMU crashes, hangs, corrupts a template or runs a machine that cannot work. *other*: on purpose.\n\
         *not here*: Pando does not have it, and says so by name.\n\n\
         | case | what it is | | with Pando |\n|---|---|---|---|\n{page}",
        cases.len()
    );
    let path = root()?.join("docs/qemu-compat.md");
    if std::env::var_os("PANDO_WRITE_DOCS").is_some() {
        fs::write(&path, &text)?;
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    ensure!(
        written == text,
        "docs/qemu-compat.md is not what the cases give: run this test with PANDO_WRITE_DOCS=1"
    );
    Ok(())
}

fn row(page: &mut String, case: &Case<'_>, difference: &Difference) {
    let kind = match difference.kind {
        Kind::Better => "better",
        Kind::Other => "other",
        Kind::NotHere => "not here",
    };
    let title = case.text("title").replace('|', "\\|");
    let _ = writeln!(
        page,
        "| `{}` | {title} | {kind} | {} |",
        case.text("id"),
        difference.why
    );
}
