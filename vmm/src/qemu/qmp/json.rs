#![forbid(unsafe_code)]
//! JSON as a QMP client may send it: values behind each other with or without line ends, over
//! several lines, with either kind of quotes; and everything else, which must do no harm. Pure.

use serde_json::{Map, Number, Value};

/// Most bytes of one value; what is longer is dropped up to the end of its line.
pub const MAX_VALUE_BYTES: usize = 4 << 20;
/// Most brackets inside each other.
pub const MAX_DEPTH: usize = 1024;
/// How much of a wrong word is quoted.
const QUOTED_CHARS: usize = 32;

/// Cuts a stream of bytes into values.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// How far the value at the beginning of `buffer` was looked at.
    scanned: usize,
    brackets: Vec<u8>,
    quote: Option<u8>,
    escaped: bool,
    /// The rest of this line belongs to a value that was refused.
    discarding: bool,
}

/// What to do after one byte.
enum Step {
    Go,
    /// The value ends behind this byte.
    End,
    /// The value ends before this byte.
    EndBefore,
    Refuse(&'static str),
}

impl Reader {
    /// Takes bytes in. [`Self::next_value`] must be called until it has no more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend(bytes);
    }

    /// The next value, or why there is none in its place; `None` when more bytes are needed.
    pub fn next_value(&mut self) -> Option<Result<Value, String>> {
        loop {
            if self.discarding {
                let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') else {
                    self.buffer.clear();
                    return None;
                };
                self.buffer.drain(..=end);
                self.discarding = false;
            }
            if self.scanned == 0 {
                let blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
                let begin = self.buffer.iter().take_while(|byte| blank(byte)).count();
                self.buffer.drain(..begin);
            }
            let byte = *self.buffer.get(self.scanned)?;
            match self.step(byte) {
                Step::Go => self.scanned += 1,
                Step::End => return Some(self.finish(self.scanned + 1)),
                Step::EndBefore => return Some(self.finish(self.scanned)),
                Step::Refuse(why) => {
                    self.restart();
                    self.discarding = true;
                    return Some(Err(why.to_owned()));
                }
            }
            if self.scanned > MAX_VALUE_BYTES {
                self.restart();
                self.discarding = true;
                return Some(Err("JSON token size limit exceeded".to_owned()));
            }
        }
    }

    fn step(&mut self, byte: u8) -> Step {
        if let Some(quote) = self.quote {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                // A string does not go over a line's end: what comes is the next line.
                b'\n' => return Step::Refuse("JSON parse error, unterminated string"),
                _ if byte == quote => {
                    self.quote = None;
                    if self.brackets.is_empty() {
                        return Step::End;
                    }
                }
                _ => {}
            }
            return Step::Go;
        }
        match byte {
            b'{' | b'[' if self.brackets.is_empty() && self.scanned > 0 => Step::EndBefore,
            b'{' | b'[' if self.brackets.len() >= MAX_DEPTH => {
                Step::Refuse("JSON nesting depth limit exceeded")
            }
            b'{' | b'[' => {
                self.brackets.push(byte);
                Step::Go
            }
            b'}' | b']' => {
                let open = if byte == b'}' { b'{' } else { b'[' };
                let fits = self.brackets.pop() == Some(open);
                if fits && !self.brackets.is_empty() {
                    Step::Go
                } else {
                    Step::End
                }
            }
            b'"' | b'\'' if self.brackets.is_empty() && self.scanned > 0 => Step::EndBefore,
            b'"' | b'\'' => {
                self.quote = Some(byte);
                Step::Go
            }
            _ if self.brackets.is_empty() && (byte.is_ascii_whitespace() || byte == 0) => {
                Step::EndBefore
            }
            _ => Step::Go,
        }
    }

    fn finish(&mut self, end: usize) -> Result<Value, String> {
        let value = parse(&self.buffer[..end]);
        self.buffer.drain(..end);
        self.brackets.clear();
        self.quote = None;
        self.escaped = false;
        self.scanned = 0;
        value
    }

    fn restart(&mut self) {
        let seen = (self.scanned + 1).min(self.buffer.len());
        // A line's end that was refused ends the line.
        let keep = usize::from(self.buffer.get(seen.saturating_sub(1)) == Some(&b'\n'));
        self.buffer.drain(..seen - keep);
        self.brackets.clear();
        self.quote = None;
        self.escaped = false;
        self.scanned = 0;
    }
}

/// Parses one value that takes up all of `bytes`.
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    let mut parser = Parser { bytes, at: 0 };
    let value = parser.value(0)?;
    parser.blank();
    if parser.at < bytes.len() {
        return Err(parser.error("expecting the end of the value"));
    }
    Ok(value)
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn error(&self, what: &str) -> String {
        format!("JSON parse error, {what}")
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn blank(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    fn eat(&mut self, byte: u8) -> bool {
        self.blank();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        if depth > MAX_DEPTH {
            return Err("JSON nesting depth limit exceeded".to_owned());
        }
        self.blank();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(quote @ (b'"' | b'\'')) => {
                self.at += 1;
                self.string(quote).map(Value::String)
            }
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(byte) if byte.is_ascii_alphabetic() => self.keyword(),
            None | Some(b'}' | b']' | b',' | b':') => Err(self.error("expecting value")),
            Some(_) => Err(self.stray()),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut members = Map::new();
        if self.eat(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value(depth + 1)? else {
                return Err(self.error("key is not a string in object"));
            };
            if !self.eat(b':') {
                return Err(self.error("missing : in object pair"));
            }
            let value = self.value(depth + 1)?;
            if members.insert(key, value).is_some() {
                return Err(self.error("duplicate key"));
            }
            if self.eat(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.eat(b',') {
                return Err(self.error("expected separator in dict"));
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut items = Vec::new();
        if self.eat(b']') {
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.eat(b']') {
                return Ok(Value::Array(items));
            }
            if !self.eat(b',') {
                return Err(self.error("expected separator in list"));
            }
        }
    }

    fn string(&mut self, quote: u8) -> Result<String, String> {
        let mut text = Vec::new();
        while let Some(byte) = self.peek() {
            self.at += 1;
            match byte {
                b'\\' => self.escape(&mut text)?,
                _ if byte == quote => {
                    return String::from_utf8(text)
                        .map_err(|_| self.error("invalid UTF-8 sequence in string"));
                }
                _ => text.push(byte),
            }
        }
        Err(self.error("unterminated string"))
    }

    fn escape(&mut self, text: &mut Vec<u8>) -> Result<(), String> {
        let escape = self.peek();
        self.at += 1;
        let byte = match escape {
            Some(b'n') => b'\n',
            Some(b't') => b'\t',
            Some(b'r') => b'\r',
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(byte @ (b'"' | b'\'' | b'\\' | b'/')) => byte,
            Some(b'u') => {
                let character = self.unicode()?;
                text.extend(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.error("invalid escape sequence in string")),
        };
        text.push(byte);
        Ok(())
    }

    fn unicode(&mut self) -> Result<char, String> {
        let first = self.four_digits()?;
        let code = match first {
            0xd800..0xdc00 => {
                let pair = self.bytes.get(self.at..self.at + 2) == Some(b"\\u");
                self.at += 2;
                match (pair, pair.then(|| self.four_digits()).transpose()?) {
                    (true, Some(second @ 0xdc00..0xe000)) => {
                        0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                    }
                    _ => return Err(self.error("invalid surrogate pair in string")),
                }
            }
            0 => return Err(self.error("\\u0000 in string")),
            code => code,
        };
        char::from_u32(code).ok_or_else(|| self.error("invalid Unicode character in string"))
    }

    fn four_digits(&mut self) -> Result<u32, String> {
        let digits = self.bytes.get(self.at..self.at + 4);
        self.at += 4;
        digits
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .ok_or_else(|| self.error("invalid escape sequence in string"))
    }

    fn number(&mut self) -> Result<Value, String> {
        let begin = self.at;
        let part =
            |byte: u8| byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E');
        while self.peek().is_some_and(part) {
            self.at += 1;
        }
        std::str::from_utf8(&self.bytes[begin..self.at])
            .ok()
            .and_then(|text| text.parse::<Number>().ok())
            .map(Value::Number)
            .ok_or_else(|| self.error("invalid number"))
    }

    fn keyword(&mut self) -> Result<Value, String> {
        let begin = self.at;
        while self
            .peek()
            .is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            self.at += 1;
        }
        match &self.bytes[begin..self.at] {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            word => Err(self.error(&format!("invalid keyword '{}'", quoted(word)))),
        }
    }

    fn stray(&self) -> String {
        self.error(&format!("stray '{}'", quoted(&self.bytes[self.at..])))
    }
}

fn quoted(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .take(QUOTED_CHARS)
        .map(|character| {
            if character.is_control() {
                '?'
            } else {
                character
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn all(bytes: &[u8]) -> Vec<Result<Value, String>> {
        let mut reader = Reader::default();
        let mut values = Vec::new();
        for byte in bytes {
            reader.push(&[*byte]);
            while let Some(value) = reader.next_value() {
                values.push(value);
            }
        }
        values
    }

    #[test]
    fn values_come_one_behind_the_other() {
        let values = all(b"{'a': \"b}\"}{\"c\":\n[1, -2, 3.5, true, null]}\n\n{}");
        let values: Vec<_> = values.into_iter().map(Result::unwrap).collect();
        assert_eq!(
            values,
            [
                json!({"a": "b}"}),
                json!({"c": [1, -2, 3.5, true, null]}),
                json!({})
            ]
        );
    }

    #[test]
    fn escapes_are_resolved() {
        assert_eq!(
            all(br#"["\u00e9\n\ud83c\udf33\"\\"]"#),
            [Ok(json!(["\u{e9}\n\u{1f333}\"\\"]))]
        );
        all(br#"["\ud83c"]"#)[0].as_ref().unwrap_err();
        all(br#"["\q"]"#)[0].as_ref().unwrap_err();
    }

    #[test]
    fn garbage_is_answered_and_left_behind() {
        let error = |bytes: &[u8]| all(bytes)[0].clone().unwrap_err();
        assert_eq!(
            error(b"{\"execute\": }"),
            "JSON parse error, expecting value"
        );
        assert_eq!(
            error(b"hello there\n"),
            "JSON parse error, invalid keyword 'hello'"
        );
        assert_eq!(
            error(b"{\"a\" 1}"),
            "JSON parse error, missing : in object pair"
        );
        assert_eq!(
            error(b"{\"a\": 1]"),
            "JSON parse error, expected separator in dict"
        );
        assert_eq!(
            error(b"{1: 1}"),
            "JSON parse error, key is not a string in object"
        );
        let values = all(b"{\"a\": \"never ends\n{\"b\": 1}\n");
        assert_eq!(values.len(), 2, "{values:?}");
        assert_eq!(values[1], Ok(json!({"b": 1})));
    }

    #[test]
    fn what_is_too_long_or_too_deep_is_dropped_to_the_end_of_its_line() {
        let mut reader = Reader::default();
        reader.push(b"{\"a\": \"");
        let mut errors = 0;
        for _ in 0..8 {
            reader.push(&vec![b'x'; 1 << 20]);
            while let Some(value) = reader.next_value() {
                assert_eq!(value.unwrap_err(), "JSON token size limit exceeded");
                errors += 1;
            }
            assert!(reader.buffer.len() <= MAX_VALUE_BYTES + (1 << 20));
        }
        assert_eq!(errors, 1);
        reader.push(b"\"}\n{}\n");
        assert_eq!(reader.next_value(), Some(Ok(json!({}))));
        let deep = [vec![b'['; MAX_DEPTH + 1], b"\n{}\n".to_vec()].concat();
        let values = all(&deep);
        assert_eq!(
            values[0],
            Err("JSON nesting depth limit exceeded".to_owned())
        );
        assert_eq!(values[1], Ok(json!({})));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_neither_panic_nor_stay(bytes: Vec<u8>) {
            let mut reader = Reader::default();
            reader.push(&bytes);
            while reader.next_value().is_some() {}
            reader.push(b"\n");
            while reader.next_value().is_some() {}
            prop_assert!(reader.buffer.len() <= bytes.len() + 1);
        }

        #[test]
        fn what_serde_writes_is_read(text: String, number: i64, flag: bool) {
            let value = json!({"t": text.replace('\0', ""), "n": number, "f": [flag, {}]});
            let bytes = serde_json::to_vec(&value).unwrap();
            prop_assert_eq!(all(&bytes), [Ok(value)]);
        }
    }
}
