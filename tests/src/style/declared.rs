#![forbid(unsafe_code)]
//! What is declared for others: error texts, saved state, metrics, and words in general.

use super::text::{excused, has_word};
use super::{Finding, Project, SourceFile};

/// Error texts: lowercase, no full stop, no source in them.
pub fn errors(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in &project.sources {
        for (at, _) in file.strings.match_indices("#[error(") {
            let rest = file.strings[at + "#[error(".len()..].trim_start();
            let Some(text) = rest
                .strip_prefix('"')
                .and_then(|rest| rest.split("\")").next())
            else {
                continue;
            };
            let text = text.split("\",").next().unwrap_or(text);
            let line = file.strings[..at].matches('\n').count() + 1;
            let fault = if text.contains("{source") {
                "repeats its source"
            } else if text.ends_with('.') {
                "ends with a full stop"
            } else if starts_like_a_sentence(text) {
                "does not start in lower case"
            } else {
                continue;
            };
            found.push(format!(
                "{}:{line}: the error text '{text}' {fault}",
                file.path
            ));
        }
    }
    excused("errors", found)
}

/// `No such..`, but not `KVM..`, `COM1..` or `{path}..`.
fn starts_like_a_sentence(text: &str) -> bool {
    let word: Vec<char> = text.chars().take_while(|c| c.is_alphanumeric()).collect();
    let plain = word.iter().skip(1).all(|c| c.is_lowercase());
    word.first().is_some_and(|c| c.is_uppercase()) && plain
}

/// Saved state outside the files that are for it, or not in plain integers.
///
/// Only the parts whose state is saved are looked at: elsewhere a type may be serialized to be
/// printed, or sent to another process of the same build.
pub fn saved_state(project: &Project) -> Vec<Finding> {
    const SAVED: [&str; 6] = ["arch", "device", "kvm", "machine", "memory", "vcpu"];
    let mut found = Vec::new();
    let saved = |file: &&SourceFile| {
        SAVED
            .iter()
            .any(|part| file.path.starts_with(&format!("vmm/src/{part}/")))
    };
    for file in project.sources.iter().filter(saved) {
        let state = file.path.ends_with("/state.rs");
        let mut serialized = false;
        for (line, code) in file.code_lines() {
            let derives = code.contains("derive(");
            serialized = (serialized && !derives) || (derives && has_word(code, "Serialize"));
            if serialized && derives && !state {
                let text = "a type that is saved belongs in a state.rs";
                found.push(format!("{}:{line}: {text}", file.path));
            }
            if state && serialized && (has_word(code, "usize") || has_word(code, "isize")) {
                found.push(format!("{}:{line}: a saved integer has a size", file.path));
            }
            serialized &= code != "}";
        }
    }
    excused("saved state", found)
}

/// Metrics that are declared and never touched, that are named outside the declarations, or that
/// `docs/metrics.md` does not list.
pub fn metrics(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    let document = project
        .texts
        .iter()
        .find(|(path, _)| path == "docs/metrics.md");
    for file in project.sources.iter().filter(|file| !file.is_test()) {
        let declares = file.path.ends_with("/metrics.rs");
        let families = families(file);
        for (line, name, role) in &families {
            let at = format!("{}:{line}: {name}", file.path);
            match role {
                Role::Recorded if !declares => {
                    found.push(format!("{at} is named outside metrics.rs"))
                }
                Role::Constant(constant)
                    if !project.sources.iter().any(|user| touches(user, constant)) =>
                {
                    found.push(format!("{at} is declared and never touched"));
                }
                Role::Described
                    if !families
                        .iter()
                        .any(|(_, other, role)| other == name && *role == Role::Recorded) =>
                {
                    found.push(format!("{at} is described and never recorded"));
                }
                _ => {}
            }
            if declares && document.is_some_and(|(_, text)| !text.contains(&format!("`{name}`"))) {
                found.push(format!("{at} is not in docs/metrics.md"));
            }
        }
        if declares {
            found.extend(idle_recorders(project, file));
        }
    }
    found.dedup();
    excused("metrics", found)
}

/// What a metric's name is there for.
#[derive(PartialEq)]
enum Role {
    Described,
    Recorded,
    Constant(String),
}

/// Every name of a metric family in the file: line, name, role.
fn families(file: &SourceFile) -> Vec<(usize, String, Role)> {
    let mut found = Vec::new();
    for (at, _) in file.strings.match_indices("\"pando_") {
        let name: String = file.strings[at + 1..]
            .chars()
            .take_while(|c| *c != '"')
            .collect();
        let line = file.strings[..at].matches('\n').count() + 1;
        let before = file.strings[..at].trim_end();
        let start = before.rfind(['\n', ';', '{', '}']).map_or(0, |at| at + 1);
        let role = if let Some((constant, _)) = before[start..]
            .split_once("const ")
            .and_then(|(_, rest)| rest.split_once(':'))
        {
            Role::Constant(constant.trim().to_owned())
        } else if ["counter!(", "gauge!(", "histogram!("]
            .iter()
            .any(|end| before.ends_with(end))
        {
            let described = before[start..].contains("describe_");
            if described {
                Role::Described
            } else {
                Role::Recorded
            }
        } else {
            continue;
        };
        if line < file.tests_from {
            found.push((line, name, role));
        }
    }
    found
}

/// Public functions of a `metrics.rs` that nobody calls: what they record never moves.
fn idle_recorders(project: &Project, file: &SourceFile) -> Vec<Finding> {
    let mut found = Vec::new();
    for (line, code) in file.code_lines() {
        let Some(rest) = code.trim_start().strip_prefix("pub fn ") else {
            continue;
        };
        let name: String = rest
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let used = project
            .sources
            .iter()
            .filter(|user| !user.is_test())
            .any(|user| {
                let mut lines = user.code_lines();
                lines
                    .any(|(_, line)| has_word(line, &name) && !line.contains(&format!("fn {name}")))
            });
        if !used {
            found.push(format!("{}:{line}: nobody calls {name}", file.path));
        }
    }
    found
}

/// Whether a file uses the constant beyond declaring and describing it.
fn touches(file: &SourceFile, name: &str) -> bool {
    let code: Vec<&str> = file.code_lines().map(|(_, line)| line).collect();
    // A description may open on the line before its constant.
    let idle = |at: usize| {
        let line = code[at];
        let declares = line.contains("const ") || line.trim_start().starts_with("use ");
        declares
            || code[at.saturating_sub(1)..=at]
                .iter()
                .any(|line| line.contains("describe_"))
    };
    !file.is_test() && (0..code.len()).any(|at| has_word(code[at], name) && !idle(at))
}

/// Paths of the machine that the project is written on: its root, and home folders.
pub fn words(project: &Project, root: &str) -> Vec<Finding> {
    // Put together here, or this file would be a finding.
    let homes = ["home", "root"].map(|folder| format!("/{folder}/"));
    let mut found = Vec::new();
    for (path, text) in &project.texts {
        for (at, line) in text.lines().enumerate() {
            // The sources of the root process are in a folder of that name.
            let line = line.replace("src/root/", "");
            if line.contains(root) || homes.iter().any(|home| line.contains(home)) {
                found.push(format!("{path}:{}: a path of one machine", at + 1));
            }
        }
    }
    excused("words", found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(path: &str, text: &str) -> Project {
        let sources = vec![SourceFile::new(path, text)];
        Project {
            sources,
            texts: Vec::new(),
        }
    }

    fn with<'a>(found: &'a [Finding], part: &str) -> Vec<&'a Finding> {
        found
            .iter()
            .filter(|finding| finding.contains(part))
            .collect()
    }

    #[test]
    fn error_texts_are_judged() {
        let found = |text: &str| with(&errors(&project("a/src/b.rs", text)), "error text").len();
        assert_eq!(found("#[error(\"cannot open {path}\")]"), 0);
        assert_eq!(found("#[error(\"KVM refused {0}\", .x)]"), 0);
        assert_eq!(found("#[error(\"Cannot open\")]"), 1);
        assert_eq!(found("#[error(\"cannot open.\")]"), 1);
        assert_eq!(found("#[error(\"cannot open: {source}\")]"), 1);
    }

    #[test]
    fn metrics_must_be_touched() {
        let declared =
            "const A: &str = \"pando_a\";\nfn d() {\n    describe_counter!(A, \"x\");\n}\n";
        assert_eq!(metrics(&project("pager/src/metrics.rs", declared)).len(), 1);
        let used = format!("{declared}fn u() {{ counter!(A).increment(1) }}\n");
        assert_eq!(metrics(&project("pager/src/metrics.rs", &used)).len(), 0);
    }

    #[test]
    fn saved_state_has_its_files() {
        let text = "#[derive(Debug, Serialize)]\npub struct A {\n    b: usize,\n}\nstruct C {\n    d: usize,\n}\n";
        assert_eq!(saved_state(&project("vmm/src/machine/a.rs", text)).len(), 1);
        assert_eq!(
            saved_state(&project("vmm/src/machine/state.rs", text)).len(),
            1
        );
    }
}
