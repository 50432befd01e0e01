#![forbid(unsafe_code)]
//! How long things are, and what libraries have no use for.

use super::text::{excused, has_word};
use super::{Finding, Project, SourceFile};

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 100;
/// Macros that a library has no use for.
const MACROS: [&str; 7] = [
    "dbg!",
    "eprint!",
    "eprintln!",
    "print!",
    "println!",
    "todo!",
    "unimplemented!",
];
/// Who may print: it is their work.
const PRINTERS: [&str; 6] = [
    "bench/src/",
    "tests/fuzz/src/bin/",
    "tests/src/bin/",
    "vmm/examples/",
    "vmm/src/cli/",
    "vmm/src/main.rs",
];

/// Files and functions that have grown too long.
pub fn sizes(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in &project.sources {
        let lines = file.text.lines().count();
        if lines > FILE_LINES {
            found.push(format!(
                "{}:1: {lines} lines, the limit is {FILE_LINES}",
                file.path
            ));
        }
        for (line, name, length) in functions(&file.code) {
            if length > FUNCTION_LINES {
                found.push(format!(
                    "{}:{line}: function {name} has {length} lines, the limit is {FUNCTION_LINES}",
                    file.path
                ));
            }
        }
    }
    excused("sizes", found)
}

/// Functions with a body: line, name, lines from the signature to the closing brace.
fn functions(code: &str) -> Vec<(usize, String, usize)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + 3..];
        let name: String = rest
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let (mut depth, mut nested) = (0_usize, 0_usize);
        for (offset, character) in rest.char_indices() {
            match character {
                '(' | '[' => nested += 1,
                ')' | ']' => nested = nested.saturating_sub(1),
                ';' if depth == 0 && nested == 0 => break,
                '{' => depth += 1,
                '}' if depth <= 1 => {
                    let line = code[..at].matches('\n').count() + 1;
                    found.push((line, name, rest[..offset].matches('\n').count() + 1));
                    break;
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    found
}

/// Printing and unfinished work in libraries.
pub fn macros(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in project
        .sources
        .iter()
        .filter(|file| !file.path.contains("/tests/"))
    {
        for (line, code) in file.code_lines() {
            for name in MACROS {
                let unfinished = matches!(name, "dbg!" | "todo!" | "unimplemented!");
                let printer = PRINTERS.iter().any(|place| file.path.starts_with(place));
                if has_word(code, name) && (unfinished || !printer) {
                    found.push(format!("{}:{line}: {name} does not belong here", file.path));
                }
            }
        }
    }
    excused("macros", found)
}

/// Queues without a limit.
pub fn queues(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    let libraries = |file: &&SourceFile| {
        ["vmm/src/", "pager/src/"]
            .iter()
            .any(|place| file.path.starts_with(place))
    };
    for file in project.sources.iter().filter(libraries) {
        for (line, code) in file.code_lines() {
            if has_word(code, "unbounded()") || has_word(code, "mpsc::channel()") {
                found.push(format!("{}:{line}: a queue without a limit", file.path));
            }
        }
    }
    excused("queues", found)
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

    #[test]
    fn long_functions_are_found() {
        let body = "    x();\n".repeat(100);
        let text = format!(
            "#[x]\nfn long(a: [u8; 3]) {{\n{body}}}\nfn short() {{}}\ntrait T {{ fn none(&self); }}\n"
        );
        let found = sizes(&project("vmm/src/a.rs", &text));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("long has 102 lines"), "{found:?}");
    }

    #[test]
    fn printing_belongs_to_programs() {
        let text =
            "fn f() { println!(\"x\"); }\n#[cfg(test)]\nmod tests {\n fn g() { println!(); }\n}\n";
        assert_eq!(macros(&project("vmm/src/kvm/a.rs", text)).len(), 1);
        assert_eq!(macros(&project("vmm/src/cli/a.rs", text)).len(), 0);
        assert_eq!(
            macros(&project("vmm/src/cli/a.rs", "fn f() { todo!() }")).len(),
            1
        );
    }
}
