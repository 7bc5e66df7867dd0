//! How all tensors compare, as a table and as `--json` has it.

use serde::Serialize;

use crate::ui;

/// How one tensor compares.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// As the reference names it, `transformer.double.03.txt` for one.
    pub name: String,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// ‖a − b‖ / ‖b‖; of token ids, the share that differs.
    pub relative: f64,
    /// Whether that is within the tolerance.
    pub ok: bool,
}

/// How all tensors compare.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Whether all of them are within the tolerance.
    pub ok: bool,
    /// The first that is not.
    pub first_off: Option<String>,
    /// In the order in which a pipeline computes them.
    pub tensors: Vec<Comparison>,
    /// What could not be compared, and why.
    pub skipped: Vec<String>,
}

impl Report {
    /// Of the comparisons in their order.
    pub(super) fn new(tensors: Vec<Comparison>, skipped: Vec<String>) -> Self {
        let first_off = tensors.iter().find(|c| !c.ok).map(|c| c.name.clone());
        Self {
            ok: first_off.is_none(),
            first_off,
            tensors,
            skipped,
        }
    }

    /// What a terminal shows.
    pub fn table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .tensors
            .iter()
            .map(|c| {
                let verdict = if c.ok { "ok" } else { "off" };
                vec![
                    c.name.clone(),
                    format!("{:.3e}", c.max_abs),
                    format!("{:.3e}", c.relative),
                    verdict.to_owned(),
                ]
            })
            .collect();
        let mut text = ui::table(&["tensor", "max abs", "relative", ""], &rows, &[1, 2]);
        for name in &self.skipped {
            text.push_str(&format!("\nnot compared: {name}"));
        }
        text
    }
}
