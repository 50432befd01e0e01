#![forbid(unsafe_code)]
//! The escape by which the user of a raw terminal leaves: Ctrl-A x.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// Watches typed bytes for the escape.
#[derive(Debug, Default)]
pub(super) struct Escape {
    after_prefix: bool,
}

/// What typed bytes come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Typed {
    /// What the guest gets.
    pub(super) bytes: Vec<u8>,
    /// The user wants to leave.
    pub(super) quit: bool,
}

impl Escape {
    /// Takes what was typed. Ctrl-A x quits, Ctrl-A twice is one Ctrl-A, and Ctrl-A before anything
    /// else is passed on with it.
    pub(super) fn filter(&mut self, typed: &[u8]) -> Typed {
        let mut result = Typed::default();
        for &byte in typed {
            if !std::mem::take(&mut self.after_prefix) {
                self.after_prefix = byte == PREFIX;
                if byte != PREFIX {
                    result.bytes.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => result.quit = true,
                PREFIX => result.bytes.push(PREFIX),
                other => result.bytes.extend([PREFIX, other]),
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(chunks: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let typed: Vec<Typed> = chunks.iter().map(|chunk| escape.filter(chunk)).collect();
        let quit = typed.iter().any(|typed| typed.quit);
        (
            typed.into_iter().flat_map(|typed| typed.bytes).collect(),
            quit,
        )
    }

    #[test]
    fn only_ctrl_a_x_quits_however_it_arrives() {
        assert_eq!(filter(&[b"ax\x01", b"xb"]), (b"axb".to_vec(), true));
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01\x01\x01x"]), (b"\x01".to_vec(), true));
        assert_eq!(filter(&[b"\x01", b"e\x03"]), (b"\x01e\x03".to_vec(), false));
    }
}
