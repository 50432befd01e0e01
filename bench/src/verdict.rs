#![forbid(unsafe_code)]
//! `pando-bench report`: every promise judged in one run. Each part runs as a process of its own, as a
//! user would run it: a part that fails is told and does not take the others with it.

use std::io::IsTerminal;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::cli::ReportArgs;
use crate::host::Host;
use crate::report::{Report, TextTable, time};

/// A command of this program, and how it is shortened.
struct Part {
    command: &'static str,
    full: &'static [&'static str],
    quick: &'static [&'static str],
    /// Whether it takes `--pando`.
    is_of_clones: bool,
}

const PARTS: &[Part] = &[
    Part {
        command: "clone",
        full: &[
            "--rounds", "25", "--starts", "10", "--count", "200", "--waves", "1",
        ],
        quick: &[
            "--rounds", "4", "--starts", "5", "--count", "50", "--waves", "1",
        ],
        is_of_clones: true,
    },
    Part {
        command: "clone",
        full: &["--cold", "--rounds", "4", "--starts", "3", "--count", "0"],
        quick: &["--cold", "--rounds", "1", "--starts", "2", "--count", "0"],
        is_of_clones: true,
    },
    Part {
        command: "density",
        full: &["--counts", "100,500,1000,2000", "--engines", "kernel,root"],
        quick: &["--counts", "100,300,500", "--engines", "root"],
        is_of_clones: true,
    },
    Part {
        command: "pager",
        full: &["--rounds", "6", "--pairs", "200", "--pages", "128"],
        quick: &[
            "--rounds",
            "2",
            "--pairs",
            "60",
            "--pages",
            "64",
            "--clones",
            "1,100",
            "--no-cold",
        ],
        is_of_clones: false,
    },
];

/// The verdict that asks to be looked at.
const MISSED: &str = "MISSED";

/// A promise and how it stands.
#[derive(Debug, Serialize)]
struct Verdict {
    promise: String,
    wanted: String,
    found: Option<f64>,
    /// `kept`, `missed`, or why it is not known.
    verdict: String,
    command: String,
}

/// All of them.
#[derive(Debug, Serialize)]
struct Verdicts {
    quick: bool,
    verdicts: Vec<Verdict>,
    /// What each part printed, by its command line.
    parts: Vec<(String, Value)>,
    took_ns: u64,
}

/// Runs all parts and prints what they found.
pub(crate) fn run(args: &ReportArgs) -> Result<()> {
    let host = Host::probe()?;
    let begun = Instant::now();
    let mut all = Verdicts {
        quick: args.quick,
        verdicts: Vec::new(),
        parts: Vec::new(),
        took_ns: 0,
    };
    for part in PARTS {
        let words = words(part, args);
        let line = format!("pando-bench {}", words.join(" "));
        if std::io::stderr().is_terminal() || !args.json {
            eprintln!("{line}");
        }
        match measure(&words) {
            Ok(document) => {
                all.verdicts.extend(verdicts(&document, &line));
                all.parts.push((line, document));
            }
            Err(error) => all.verdicts.push(Verdict {
                promise: format!("{} can be measured", part.command),
                wanted: "a report".to_owned(),
                found: None,
                verdict: format!("failed: {error:#}"),
                command: line,
            }),
        }
    }
    all.took_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    report(host, all).print(args.json)
}

fn words(part: &Part, args: &ReportArgs) -> Vec<String> {
    let options = if args.quick { part.quick } else { part.full };
    let options = options.iter().map(|&word| word.to_owned());
    let mut words: Vec<String> = std::iter::once(part.command.to_owned())
        .chain(options)
        .collect();
    let mut add = |name: &str, path: &Option<std::path::PathBuf>| {
        if let Some(path) = path {
            words.extend([name.to_owned(), path.display().to_string()]);
        }
    };
    add("--dir", &args.dir);
    if part.is_of_clones {
        add("--pando", &args.pando);
    }
    words
}

/// Runs this program once more and takes its document.
fn measure(words: &[String]) -> Result<Value> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let output = Command::new(program)
        .args(words)
        .arg("--json")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("cannot run this program once more")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let first_line = said
        .lines()
        .find(|line| line.starts_with("Error"))
        .unwrap_or("");
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "it ended with {} and no report: {first_line}",
            output.status
        )
    })
}

/// The promises that a document judges.
fn verdicts(document: &Value, line: &str) -> Vec<Verdict> {
    let targets = document["results"]["targets"].as_array();
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    // Whatever was measured cold is another figure than the one that was promised.
    let cold = if line.contains("--cold") {
        ", not in the page cache"
    } else {
        ""
    };
    targets
        .into_iter()
        .flatten()
        .filter(|target| cold.is_empty() || target["measured"].is_number())
        .map(|target| Verdict {
            promise: text(&target["what"]) + cold,
            wanted: text(&target["wanted"]),
            found: target["measured"].as_f64(),
            verdict: match target["met"].as_bool() {
                Some(true) => "kept".to_owned(),
                Some(false) => MISSED.to_owned(),
                None => format!("needs {}", text(&target["needs"])),
            },
            command: line.to_owned(),
        })
        .collect()
}

fn report(host: Host, mut all: Verdicts) -> Report<Verdicts> {
    // What one part cannot tell and another can is told once.
    let told: Vec<String> = all
        .verdicts
        .iter()
        .filter(|verdict| verdict.found.is_some())
        .map(|verdict| verdict.promise.clone())
        .collect();
    all.verdicts
        .retain(|verdict| verdict.found.is_some() || !told.contains(&verdict.promise));
    let heads = ["promise", "wanted", "found", "verdict", "command"];
    let mut table = TextTable::new("what is promised, and what was found", &heads);
    for verdict in &all.verdicts {
        table.row(vec![
            verdict.promise.clone(),
            verdict.wanted.clone(),
            verdict
                .found
                .map_or_else(|| "-".to_owned(), |found| format!("{found:.2}")),
            verdict.verdict.clone(),
            verdict.command.clone(),
        ]);
    }
    let (kept, missed) = (count(&all, "kept"), count(&all, MISSED));
    let summary = format!(
        "{kept} promises kept, {missed} missed, {} not known; took {}",
        all.verdicts.len() - kept - missed,
        time(all.took_ns)
    );
    let mut report = Report::new("report", host, all);
    report.marks = vec![
        summary,
        "each command can be run alone; without --json it prints its tables".to_owned(),
    ];
    report.tables = vec![table];
    report
}

fn count(all: &Verdicts, word: &str) -> usize {
    all.verdicts
        .iter()
        .filter(|one| one.verdict == word)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_promise_of_a_document_gets_its_verdict() {
        let document = json!({"results": {"targets": [
            {"what": "a", "wanted": "<= 1 x", "measured": 0.5, "met": true},
            {"what": "b", "wanted": "<= 1 x", "measured": 2.0, "met": false},
            {"what": "c", "wanted": "<= 1 x", "measured": null, "met": null, "needs": "more"},
        ]}});
        let found = |line: &str| -> Vec<(String, String)> {
            let all = verdicts(&document, line);
            all.into_iter()
                .map(|one| (one.promise, one.verdict))
                .collect()
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            found("pando-bench clone"),
            [
                pair("a", "kept"),
                pair("b", "MISSED"),
                pair("c", "needs more")
            ]
        );
        let cold = found("pando-bench clone --cold");
        assert_eq!(cold[0].0, "a, not in the page cache");
        assert_eq!(cold.len(), 2, "what it cannot tell is told by the warm one");
        assert!(verdicts(&json!({}), "x").is_empty());
    }

    #[test]
    fn the_parts_are_commands_of_this_program() {
        use clap::Parser;
        for quick in [false, true] {
            let args = ReportArgs {
                quick,
                pando: Some("/p".into()),
                dir: Some("/d".into()),
                json: true,
            };
            for part in PARTS {
                let words = words(part, &args);
                let all = std::iter::once("pando-bench").chain(words.iter().map(String::as_str));
                crate::cli::Args::try_parse_from(all.chain(["--json"])).unwrap();
            }
        }
    }
}
