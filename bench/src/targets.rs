#![forbid(unsafe_code)]
//! What Pando promises, beside what was measured.

use serde::Serialize;

use crate::report::TextTable;

/// One promise, and how a run stands to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Target {
    /// What is promised.
    what: String,
    /// The bound, in the words of the table.
    wanted: String,
    /// What was measured, in the unit of the bound; `None` where this run could not.
    measured: Option<f64>,
    /// Whether the promise is kept; `None` where this run cannot tell.
    met: Option<bool>,
    /// What a run would need to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<String>,
}

impl Target {
    /// A figure that may not be above `bound`, in `unit` (`x` for a ratio).
    pub(crate) fn at_most(what: impl Into<String>, measured: f64, bound: f64, unit: &str) -> Self {
        Self {
            what: what.into(),
            wanted: format!("<= {bound} {unit}"),
            measured: Some(measured),
            met: Some(measured <= bound),
            needs: None,
        }
    }

    /// A figure that may not be below `bound`, in `unit` (`x` for a ratio).
    pub(crate) fn at_least(what: impl Into<String>, measured: f64, bound: f64, unit: &str) -> Self {
        Self {
            what: what.into(),
            wanted: format!(">= {bound} {unit}"),
            measured: Some(measured),
            met: Some(measured >= bound),
            needs: None,
        }
    }

    /// A promise that this run says nothing about.
    pub(crate) fn untold(
        what: impl Into<String>,
        wanted: impl Into<String>,
        needs: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            wanted: wanted.into(),
            measured: None,
            met: None,
            needs: Some(needs.into()),
        }
    }

    /// All of them, one a row.
    pub(crate) fn table(targets: &[Self]) -> TextTable {
        let mut table = TextTable::new("targets", &["", "wanted", "measured", "met"]);
        for target in targets {
            let measured = target
                .measured
                .map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
            let met = match (target.met, &target.needs) {
                (Some(true), _) => "yes".to_owned(),
                (Some(false), _) => "NO".to_owned(),
                (None, needs) => format!("needs {}", needs.as_deref().unwrap_or("another run")),
            };
            table.row(vec![
                target.what.clone(),
                target.wanted.clone(),
                measured,
                met,
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_judged_by_what_was_measured() {
        assert_eq!(Target::at_most("a", 1.5, 1.5, "x").met, Some(true));
        assert_eq!(Target::at_most("a", 1.51, 1.5, "x").met, Some(false));
        assert_eq!(Target::at_least("a", 0.8, 0.8, "x").met, Some(true));
        assert_eq!(Target::at_least("a", 0.79, 0.8, "x").met, Some(false));
        let untold = Target::untold("a", "<= 1 x", "2000 clones");
        assert_eq!((untold.met, untold.measured), (None, None));
        let text = format!("{:?}", Target::table(&[untold]));
        assert!(text.contains("needs 2000 clones"), "{text}");
    }
}
