#![forbid(unsafe_code)]
//! Where unsafe code may be, and what it says about itself.

use super::text::{excused, word_lines};
use super::{Finding, Project, SourceFile};

/// Lines between an unsafe block and the comment that justifies it: the rest of its statement.
const SAFETY_DISTANCE: usize = 4;
/// Where unsafe code may be.
const UNSAFE_PLACES: [&str; 4] = [
    "/sys/",
    "vmm/src/kvm/",
    "vmm/src/memory/guest.rs",
    "vmm/src/sandbox/",
];

/// Unsafe code only where it may be, and everywhere else forbidden by the file itself.
pub fn unsafe_code(project: &Project) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in &project.sources {
        let uses = word_lines(&file.code, "unsafe");
        let allowed = UNSAFE_PLACES.iter().any(|place| file.path.contains(place)) || file.is_test();
        if let (Some(line), false) = (uses.first(), allowed) {
            found.push(format!(
                "{}:{line}: unsafe code does not belong here",
                file.path
            ));
        }
        if !uses.is_empty() && !file.is_test() {
            found.extend(head_of_unsafe_file(file));
        }
        if is_leaf(file) && uses.is_empty() && !file.text.starts_with("#![forbid(unsafe_code)]") {
            found.push(format!(
                "{}:1: does not start with #![forbid(unsafe_code)]",
                file.path
            ));
        }
        for line in uses {
            found.extend(unjustified(file, line));
        }
    }
    excused("unsafe", found)
}

/// A file with code of its own and no submodule files that might be unsafe.
fn is_leaf(file: &SourceFile) -> bool {
    let root = ["/lib.rs", "/main.rs", "/mod.rs"]
        .iter()
        .any(|end| file.path.ends_with(end));
    file.path.contains("/src/") && !file.is_test() && !root
        || file.path.starts_with("tests/src/") && !root
}

fn head_of_unsafe_file(file: &SourceFile) -> Option<Finding> {
    let opens = file.text.starts_with("// UNSAFETY:");
    // The attribute may be spread over lines.
    let code: String = file.code.split_whitespace().collect();
    let expects = code.contains("#![expect(unsafe_code,");
    (!opens || !expects).then(|| {
        format!(
            "{}:1: has unsafe code, so it opens with `// UNSAFETY:` and has \
             #![expect(unsafe_code, reason)]",
            file.path
        )
    })
}

/// An unsafe block or impl with no `SAFETY:` comment above its statement.
fn unjustified(file: &SourceFile, line: usize) -> Option<Finding> {
    let code = file.code.lines().nth(line - 1).unwrap_or_default();
    let after = code[code.find("unsafe").unwrap_or(0)..]
        .trim_start_matches("unsafe")
        .trim_start();
    // Declarations say it in their documentation; a block may open on the next line.
    if ["fn ", "extern ", "trait "]
        .iter()
        .any(|word| after.starts_with(word))
    {
        return None;
    }
    let lines: Vec<&str> = file.text.lines().collect();
    let above = (line.saturating_sub(SAFETY_DISTANCE + 1)..line)
        .rev()
        .find(|&at| lines[at].trim_start().starts_with("//"));
    let mut at = above?;
    loop {
        if lines[at].contains("SAFETY:") {
            return None;
        }
        if at == 0 || !lines[at - 1].trim_start().starts_with("//") {
            return Some(format!(
                "{}:{line}: unsafe code without a SAFETY comment",
                file.path
            ));
        }
        at -= 1;
    }
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
    fn unsafe_code_has_its_places() {
        let here = unsafe_code(&project(
            "vmm/src/machine/a.rs",
            "fn f() { unsafe { g() } }",
        ));
        assert_eq!(with(&here, "does not belong here").len(), 1, "{here:?}");
        let text = "// UNSAFETY: why\n#![expect(unsafe_code, reason = \"x\")]\nfn f() {\n    // SAFETY: it is\n    let a =\n        unsafe { g() };\n}\n";
        assert!(unsafe_code(&project("vmm/src/kvm/a.rs", text)).is_empty());
        let bare = text.replace("SAFETY: it is", "it is");
        let found = unsafe_code(&project("vmm/src/kvm/a.rs", &bare));
        assert_eq!(with(&found, "without a SAFETY").len(), 1, "{found:?}");
        assert_eq!(unsafe_code(&project("vmm/src/a.rs", "fn f() {}")).len(), 1);
    }
}
