#![forbid(unsafe_code)]
//! What the rules share: words in lines, and exceptions.

use super::{EXCEPTIONS, Finding};

/// Drops what is excused, and reports excuses that nothing needs.
pub(super) fn excused(rule: &str, found: Vec<Finding>) -> Vec<Finding> {
    let about = |finding: &Finding, path: &str| {
        finding
            .strip_prefix(path)
            .is_some_and(|rest| rest.starts_with(':'))
    };
    let excuses: Vec<_> = EXCEPTIONS.iter().filter(|(of, ..)| *of == rule).collect();
    let idle = excuses
        .iter()
        .filter(|(_, path, _)| !found.iter().any(|finding| about(finding, path)))
        .map(|(_, path, _)| {
            format!("{path}: has an exception from the rule '{rule}' and needs none")
        })
        .collect::<Vec<_>>();
    let kept = |finding: &Finding| !excuses.iter().any(|(_, path, _)| about(finding, path));
    found.into_iter().filter(kept).chain(idle).collect()
}

/// Numbers of the lines that have the word.
pub(super) fn word_lines(code: &str, word: &str) -> Vec<usize> {
    let lines = code.lines().enumerate();
    lines
        .filter(|(_, line)| has_word(line, word))
        .map(|(at, _)| at + 1)
        .collect()
}

/// Whether the line has `word` with no letter, digit or underscore around it.
pub(super) fn has_word(line: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let open = |end: &str| !end.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(at, _)| {
        !part(line[..at].chars().next_back())
            && (open(&line[at + word.len()..]) || !part(word.chars().next_back()))
    })
}
