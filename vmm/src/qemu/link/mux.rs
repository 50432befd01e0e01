#![forbid(unsafe_code)]
//! Several users of one terminal: the escapes by which a person goes from one to the next, and a line that
//! is typed. Pure.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What Ctrl-A h says.
pub const HELP: &[u8] = b"\r\n\
    C-a h    print this help\r\n\
    C-a x    exit emulator\r\n\
    C-a s    save disk data back to file (there is none)\r\n\
    C-a c    switch between console and monitor\r\n\
    C-a C-a  sends C-a\r\n";
/// What Ctrl-A x says.
pub const TERMINATED: &[u8] = b"QEMU: Terminated\r\n";

/// What a typed byte comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typed {
    /// It is for whoever has the terminal.
    Byte(u8),
    /// Tell what can be typed.
    Help,
    /// End.
    Quit,
    /// The next one gets the terminal.
    Next,
    /// Nothing.
    Nothing,
}

/// Watches typed bytes for escapes.
#[derive(Debug, Default)]
pub struct Escape {
    after_prefix: bool,
}

impl Escape {
    /// Takes a typed byte. What no escape is known for is dropped with its Ctrl-A, as with QEMU.
    pub fn take(&mut self, byte: u8) -> Typed {
        if !std::mem::take(&mut self.after_prefix) {
            self.after_prefix = byte == PREFIX;
            return if self.after_prefix {
                Typed::Nothing
            } else {
                Typed::Byte(byte)
            };
        }
        match byte {
            PREFIX => Typed::Byte(PREFIX),
            b'h' | b'?' => Typed::Help,
            b'x' => Typed::Quit,
            b'c' => Typed::Next,
            _ => Typed::Nothing,
        }
    }
}

/// Most bytes of a typed line; more are not taken.
const MAX_LINE_BYTES: usize = 4096;

/// A line that is being typed on a terminal which shows nothing by itself.
#[derive(Debug, Default)]
pub struct Line {
    text: Vec<u8>,
    sequence: Sequence,
}

/// Keys that send several bytes are not for a line.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    Begun,
    Inside,
}

impl Line {
    /// Takes a typed byte and puts what the terminal is to show for it into `shown`; the line with its end,
    /// once it is whole.
    pub fn take(&mut self, byte: u8, shown: &mut Vec<u8>) -> Option<Vec<u8>> {
        match (self.sequence, byte) {
            (Sequence::Begun, b'[' | b'O') => {
                self.sequence = Sequence::Inside;
                return None;
            }
            (Sequence::Inside, b'0'..=b'9' | b';') => return None,
            (Sequence::Begun | Sequence::Inside, _) => {
                self.sequence = Sequence::None;
                return None;
            }
            (Sequence::None, _) => (),
        }
        match byte {
            b'\r' | b'\n' => {
                shown.extend(b"\r\n");
                let mut line = std::mem::take(&mut self.text);
                line.push(b'\n');
                return Some(line);
            }
            0x1b => self.sequence = Sequence::Begun,
            // Backspace.
            0x08 | 0x7f => self.erase(shown),
            // Ctrl-C, Ctrl-U.
            0x03 | 0x15 => {
                while !self.text.is_empty() {
                    self.erase(shown);
                }
            }
            0..0x20 => (),
            _ if self.text.len() >= MAX_LINE_BYTES => (),
            _ => {
                self.text.push(byte);
                shown.push(byte);
            }
        }
        None
    }

    /// What was typed of it so far.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    fn erase(&mut self, shown: &mut Vec<u8>) {
        // All bytes of a character of UTF-8.
        while let Some(byte) = self.text.pop() {
            if byte & 0xc0 != 0x80 {
                shown.extend(b"\x08 \x08");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_qemus() {
        let mut escape = Escape::default();
        let mut typed = |bytes: &[u8]| {
            let taken = bytes.iter().map(|&byte| escape.take(byte));
            taken
                .filter(|typed| *typed != Typed::Nothing)
                .collect::<Vec<_>>()
        };
        let byte = Typed::Byte;
        assert_eq!(typed(b"ab\x03"), [byte(b'a'), byte(b'b'), byte(3)]);
        assert_eq!(typed(b"\x01"), []);
        assert_eq!(typed(b"x"), [Typed::Quit]);
        assert_eq!(typed(b"\x01h\x01?"), [Typed::Help, Typed::Help]);
        assert_eq!(typed(b"\x01\x01x"), [byte(1), byte(b'x')]);
        assert_eq!(typed(b"\x01s\x01c\x01zq"), [Typed::Next, byte(b'q')]);
    }

    #[test]
    fn a_line_is_shown_corrected_and_given_whole() {
        let mut line = Line::default();
        let mut shown = Vec::new();
        let mut lines = Vec::new();
        for &byte in "inkö\x7f\x7ffo\x1b[A\x1b[1;5C x\x15info status\r".as_bytes() {
            lines.extend(line.take(byte, &mut shown));
        }
        assert_eq!(lines, [b"info status\n"]);
        assert!(shown.starts_with("inkö\x08 \x08\x08 \x08fo x\x08 \x08".as_bytes()));
        assert!(shown.ends_with(b"info status\r\n") && line.text().is_empty());
        for _ in 0..MAX_LINE_BYTES + 10 {
            line.take(b'a', &mut shown);
        }
        assert_eq!(line.text().len(), MAX_LINE_BYTES);
    }
}
