#![forbid(unsafe_code)]
//! Reading a body that may say anything: every step is checked, nothing is allocated that the
//! bytes do not bear out.

/// Where a body stopped making sense, and what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nonsense {
    /// Offset in the body.
    pub(crate) offset: usize,
    /// What is wrong there.
    pub(crate) reason: &'static str,
}

/// Reads little-endian fields from front to back.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self { body, at: 0 }
    }

    /// Something is wrong here.
    pub(crate) fn wrong(&self, reason: &'static str) -> Nonsense {
        Nonsense {
            offset: self.at,
            reason,
        }
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at == self.body.len()
    }

    /// Bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.body.len() - self.at
    }

    pub(crate) fn take(&mut self, bytes: u64, what: &'static str) -> Result<&'a [u8], Nonsense> {
        let end = usize::try_from(bytes)
            .ok()
            .and_then(|bytes| self.at.checked_add(bytes));
        let field = end.and_then(|end| self.body.get(self.at..end));
        let field = field.ok_or_else(|| self.wrong(what))?;
        self.at += field.len();
        Ok(field)
    }

    /// A text behind its length of two bytes.
    pub(crate) fn text(&mut self, what: &'static str) -> Result<&'a str, Nonsense> {
        let length = self.u16(what)?;
        let bytes = self.take(length.into(), what)?;
        std::str::from_utf8(bytes).map_err(|_| self.wrong("a name is not utf-8"))
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Nonsense> {
        let field = self.take(2, what)?;
        let field = field.try_into().map_err(|_| self.wrong(what))?;
        Ok(u16::from_le_bytes(field))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Nonsense> {
        let field = self.take(4, what)?;
        let field = field.try_into().map_err(|_| self.wrong(what))?;
        Ok(u32::from_le_bytes(field))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Nonsense> {
        let field = self.take(8, what)?;
        let field = field.try_into().map_err(|_| self.wrong(what))?;
        Ok(u64::from_le_bytes(field))
    }

    pub(crate) fn words(&mut self, count: u64, what: &'static str) -> Result<Vec<u64>, Nonsense> {
        let bytes = count.checked_mul(8).ok_or_else(|| self.wrong(what))?;
        let field = self.take(bytes, what)?;
        Ok(field
            .chunks_exact(8)
            .filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)))
            .collect())
    }
}
