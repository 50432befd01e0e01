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
pub fn saved_state(project: &Project) -> Vec<Finding> {
    const PLACES: [&str; 4] = ["/state.rs", "/manifest.rs", "/index.rs", "/report.rs"];
    let mut found = Vec::new();
    for file in project
        .sources
        .iter()
        .filter(|file| file.path.starts_with("vmm/src/"))
    {
        let words = ["vmm/src/cli/", "vmm/src/config/"];
        let place = PLACES.iter().any(|end| file.path.ends_with(end))
            || words.iter().any(|place| file.path.starts_with(place));
        let state = file.path.ends_with("/state.rs");
        let mut serialized = false;
        for (line, code) in file.code_lines() {
            let derives = code.contains("derive(");
            serialized = (serialized && !derives) || (derives && has_word(code, "Serialize"));
            if serialized && derives && !place {
                let text = "a type that is saved belongs in a state.rs, manifest.rs or report.rs";
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

/// Metrics that are declared and never touched, and names of metrics outside the declarations.
pub fn metrics(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in project
        .sources
        .iter()
        .filter(|file| file.path.ends_with("/metrics.rs"))
    {
        for (line, text) in file.string_lines() {
            let Some((name, value)) = constant(text).filter(|(_, v)| v.starts_with("pando_"))
            else {
                continue;
            };
            if !project.sources.iter().any(|user| touches(user, name)) {
                found.push(format!(
                    "{}:{line}: {value} is declared and never touched",
                    file.path
                ));
            }
        }
    }
    for file in project
        .sources
        .iter()
        .filter(|file| file.path.contains("/src/"))
    {
        for (line, text) in file.string_lines() {
            let named = ["counter!(\"", "gauge!(\"", "histogram!(\""];
            if named.iter().any(|start| text.contains(start)) {
                found.push(format!("{}:{line}: a metric without a constant", file.path));
            }
        }
    }
    excused("metrics", found)
}

/// `const NAME: &str = "value"`: the name and the value.
fn constant(line: &str) -> Option<(&str, &str)> {
    let rest = &line[line.find("const ")? + "const ".len()..];
    let (name, rest) = rest.split_once(": &str")?;
    Some((name.trim(), rest.split('"').nth(1)?))
}

/// Whether a file uses the constant beyond declaring and describing it.
fn touches(file: &SourceFile, name: &str) -> bool {
    let code: Vec<(usize, &str)> = file.code_lines().collect();
    !file.is_test()
        && code.iter().enumerate().any(|(at, (_, line))| {
            let describes = |line: &str| line.contains("describe_") || line.trim() == "describe(";
            let declared = line.contains("const ") || line.trim_start().starts_with("use ");
            has_word(line, name)
                && !declared
                && !describes(line)
                && !(at > 0 && describes(code[at - 1].1))
        })
}

/// Paths of the machine that the project is written on: its root, and home folders.
pub fn words(project: &Project, root: &str) -> Vec<Finding> {
    // Put together here, or this file would be a finding.
    let homes = ["home", "root"].map(|folder| format!("/{folder}/"));
    let mut found = Vec::new();
    for (path, text) in &project.texts {
        for (at, line) in text.lines().enumerate() {
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
