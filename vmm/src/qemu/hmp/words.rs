#![forbid(unsafe_code)]
//! The words of a line for people: apart by spaces, or in double quotes with escapes. Pure.

/// Takes a line apart. The first word, the command, has no quotes, as with QEMU.
pub fn words(line: &str) -> Result<Vec<String>, String> {
    let line = line.trim_start();
    let end = line.find(char::is_whitespace).unwrap_or(line.len());
    let (command, mut rest) = line.split_at(end);
    let mut all = Vec::new();
    if command.is_empty() {
        return Ok(all);
    }
    all.push(command.to_owned());
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Ok(all);
        }
        let (word, behind) = match rest.strip_prefix('"') {
            Some(quoted) => {
                in_quotes(quoted).map_err(|why| format!("{why}\n{command}: string expected"))?
            }
            None => {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                let (word, behind) = rest.split_at(end);
                (word.to_owned(), behind)
            }
        };
        all.push(word);
        rest = behind;
    }
}

/// What is before the closing quote, and what is behind it.
fn in_quotes(text: &str) -> Result<(String, &str), String> {
    let mut word = String::new();
    let mut rest = text.chars();
    loop {
        match rest.next() {
            None => return Err("unterminated string".to_owned()),
            Some('"') => return Ok((word, rest.as_str())),
            Some('\\') => word.push(match rest.next() {
                Some('n') => '\n',
                Some('r') => '\r',
                Some(same @ ('\\' | '\'' | '"')) => same,
                Some(other) => return Err(format!("unsupported escape code: '\\{other}'")),
                None => return Err("unterminated string".to_owned()),
            }),
            Some(other) => word.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quotes_keep_spaces_and_escapes_are_those_of_qemu() {
        let read = |line| words(line).unwrap();
        assert_eq!(read("  info   status "), ["info", "status"]);
        assert_eq!(read(""), Vec::<String>::new());
        assert_eq!(
            read(r#"migrate -d "file:/a b/\"c\"\\d\'e""#),
            ["migrate", "-d", r#"file:/a b/"c"\d'e"#]
        );
        assert_eq!(read(r#"x "a""b" """#), ["x", "a", "b", ""]);
        assert_eq!(read(r#"x "a\nb\r""#), ["x", "a\nb\r"]);
        // A quote within a word, or in the command, is a character like others.
        assert_eq!(read(r#"x"y a"b"#), [r#"x"y"#, r#"a"b"#]);
        let refused = |line| words(line).unwrap_err();
        assert_eq!(
            refused(r#"migrate "file:a"#),
            "unterminated string\nmigrate: string expected"
        );
        assert_eq!(
            refused(r#"migrate "\t""#),
            "unsupported escape code: '\\t'\nmigrate: string expected"
        );
    }

    proptest! {
        #[test]
        fn no_line_panics_and_a_quoted_word_comes_back(line: String, word in "[^\"\\\\]*") {
            let _ = words(&line);
            let found = words(&format!("x \"{word}\"")).unwrap();
            prop_assert_eq!(found, ["x".to_owned(), word]);
        }
    }
}
