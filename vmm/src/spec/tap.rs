#![forbid(unsafe_code)]
//! Names of taps: an interface of the host, maybe in a network namespace that has a name.

use std::fmt;

/// Longest name of an interface (`IFNAMSIZ`, without the byte behind it).
const MAX_NAME_BYTES: usize = 15;

/// Longest name of a file.
const MAX_NAMESPACE_BYTES: usize = 255;

/// An interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    name: String,
    namespace: Option<String>,
}

impl TapSpec {
    /// An interface in a namespace of `ip netns`, or in this process's own; what is wrong where the
    /// names are none.
    pub fn new(name: &str, namespace: Option<&str>) -> Result<Self, String> {
        let is_plain = |text: &str| {
            !matches!(text, "" | "." | "..")
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_graphic() && byte != b'/')
        };
        // The kernel takes a percent sign for a pattern of names to choose from.
        if !is_plain(name) || name.len() > MAX_NAME_BYTES || name.contains(['%', ':']) {
            return Err(format!(
                "{name:?} is no name of an interface: 1 to {MAX_NAME_BYTES} printable characters \
                 without '/', ':' and '%'"
            ));
        }
        if let Some(namespace) = namespace
            && (!is_plain(namespace) || namespace.len() > MAX_NAMESPACE_BYTES)
        {
            return Err(format!(
                "{namespace:?} is no name of a network namespace: 1 to {MAX_NAMESPACE_BYTES} printable \
                 characters without '/'"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            namespace: namespace.map(str::to_owned),
        })
    }

    /// The interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace, where it is not this process's own.
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

impl fmt::Display for TapSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)?;
        match &self.namespace {
            Some(namespace) => write!(f, " of the network namespace {namespace:?}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "tap%d",
            "a:1",
            "a b",
            "0123456789abcdef",
        ] {
            let error = TapSpec::new(name, None).unwrap_err();
            assert!(error.contains("no name of an interface"), "{name}");
        }
        for namespace in ["", "..", "a/b", "a b"] {
            let error = TapSpec::new("tap0", Some(namespace)).unwrap_err();
            assert!(
                error.contains("no name of a network namespace"),
                "{namespace}"
            );
        }
        let tap = TapSpec::new("tap0", Some("clone-7")).unwrap();
        assert_eq!(
            tap.to_string(),
            "\"tap0\" of the network namespace \"clone-7\""
        );
    }
}
