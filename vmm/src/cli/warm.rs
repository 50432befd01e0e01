#![forbid(unsafe_code)]
//! `pando template warm`: records which pages clones touch.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::args::WarmArgs;
use super::clone::{pager_config, require_engine};
use super::fail::Failure;
use super::out::{note, say};
use super::table::table;
use super::{inspect, progress};
use crate::clone::Engine;
use crate::clone::record::Recording;
use crate::clone::warm::{WarmError, WarmOptions, WarmRun, Warmer};
use crate::host;
use crate::report::{chain, exit};
use crate::template::touched::{Facts, RunFacts};
use crate::template::working_set::{LearnError, Learned, WorkingSetFile};
use crate::template::{Template, compat};

/// Records runs.
pub fn run(args: &WarmArgs, verbosity: u8) -> Result<u8, Failure> {
    let pager = pager_config(&args.pager)?;
    let recording = Recording {
        idle: seconds("--idle", args.idle)?,
        limit: seconds("--seconds", args.seconds)?,
    };
    // Everything that can be wrong is said before the first run.
    let template = Template::open(&args.dir)?;
    let offer = host::offer().map_err(|error| Failure::new(exit::HOST, chain(&error)))?;
    compat::check(&args.dir, template.manifest(), &offer)?;
    require_engine(Engine::Copy, &pager)?;
    let file = WorkingSetFile::of(&template);
    file.check_writable().map_err(|error| not_saved(&error))?;
    let warmer = Warmer::new(WarmOptions {
        program: std::env::current_exe().map_err(|error| Failure::of(&error))?,
        template: args.dir.clone(),
        pager,
        verbosity,
        input: args
            .input
            .as_ref()
            .map_or_else(Vec::new, |line| line.0.clone()),
        recording,
    })?;
    let bar = progress::bar(args.runs.into(), "runs recorded").with_prefix("warm");
    let mut runs = Vec::new();
    let mut last: Option<Learned> = None;
    for number in 1..=args.runs {
        let run = warmer.run(number.into())?;
        let learned = file
            .learn_run(&run.trace)
            .map_err(|error| not_saved(&error))?;
        if let Some(reason) = &learned.replaced {
            note!("note: the working set that was there is replaced: {reason}");
        }
        let facts = learned.facts(&run.trace);
        bar.inc(1);
        bar.set_message(format!(
            "{} pages touched, {} new",
            facts.touched, facts.new
        ));
        runs.push((run, facts));
        last = Some(learned);
    }
    bar.finish_and_clear();
    let facts = last.map(|learned| Facts::of(&learned.set, template.index()));
    let Some(facts) = facts.filter(|facts| facts.runs > 0) else {
        return Err(Failure::new(
            exit::FAILED,
            format!(
                "the guest of {} touched nothing: is it halted? give it work with --input",
                args.dir.display()
            ),
        ));
    };
    if args.json {
        return inspect::print_json(&document(args, &file.path(), &runs, &facts));
    }
    print_runs(&runs);
    inspect::print_working_set(&facts);
    say!("kept in {}", file.path().display());
    Ok(exit::OK)
}

fn seconds(flag: &str, seconds: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|time| !time.is_zero() && *time <= MAX_RUN)
        .ok_or_else(|| {
            let most = MAX_RUN.as_secs();
            Failure::usage(format!(
                "{flag} {seconds} is no time above 0 and up to {most} s"
            ))
        })
}

/// The longest run.
const MAX_RUN: Duration = Duration::from_secs(24 * 3600);

/// Without its file a warm is in vain.
fn not_saved(error: &LearnError) -> Failure {
    Failure::new(exit::FAILED, chain(error))
}

impl From<WarmError> for Failure {
    fn from(error: WarmError) -> Self {
        Self::new(error.exit_code(), chain(&error))
    }
}

fn print_runs(runs: &[(WarmRun, RunFacts)]) {
    let header = [
        "run",
        "pages touched",
        "written",
        "without data",
        "known",
        "new",
        "forgotten",
        "took",
    ];
    let mut rows = table(&header);
    for (number, (run, facts)) in (1..).zip(runs) {
        let counts = [
            number,
            facts.touched,
            facts.written,
            facts.zero_reads,
            facts.known,
            facts.new,
            facts.forgotten,
        ];
        let mut cells: Vec<String> = counts.iter().map(u64::to_string).collect();
        cells.push(format!("{:.2} s", run.took.as_secs_f64()));
        rows.add_row(cells);
    }
    say!("{rows}");
}

fn document(
    args: &WarmArgs,
    file: &Path,
    runs: &[(WarmRun, RunFacts)],
    facts: &Facts,
) -> serde_json::Value {
    let runs: Vec<_> = runs
        .iter()
        .map(|(run, facts)| {
            json!({
                "touches": facts,
                "ending": run.ending,
                "seconds": run.took.as_secs_f64(),
            })
        })
        .collect();
    json!({
        "template": args.dir.display().to_string(),
        "file": file.display().to_string(),
        "runs": runs,
        "working_set": facts,
    })
}
