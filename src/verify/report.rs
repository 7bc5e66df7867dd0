//! How all tensors compare, as a table and as `--json` has it.

use serde::Serialize;

use super::coverage::Coverage;
use crate::ui;

/// Characters of a tensor's name in a message.
const MAX_NAME: usize = 100;

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
    /// Whether all of them are within the tolerance, and every name in the reference is known.
    pub ok: bool,
    /// The first that is not.
    pub first_off: Option<String>,
    /// In the order in which a pipeline computes them.
    pub tensors: Vec<Comparison>,
    /// What could not be compared, and why.
    pub skipped: Vec<String>,
    /// Tensors of the reference that are none of this model, or lack the others that belong to them.
    pub unknown: Vec<String>,
    /// Parts of the model of which the reference holds nothing.
    pub not_in_reference: Vec<String>,
}

impl Report {
    /// Of the comparisons in their order.
    pub(super) fn new(tensors: Vec<Comparison>, skipped: Vec<String>, coverage: Coverage) -> Self {
        let first_off = tensors.iter().find(|c| !c.ok).map(|c| c.name.clone());
        Self {
            ok: first_off.is_none() && coverage.unknown.is_empty(),
            first_off,
            tensors,
            skipped,
            unknown: coverage.unknown,
            not_in_reference: coverage.missing,
        }
    }

    /// One line: what is off, or how much agrees.
    pub fn verdict(&self, runtime: &str) -> String {
        match (&self.first_off, self.unknown.as_slice()) {
            (Some(name), _) => format!("the first component that is off is `{name}` ({runtime})"),
            (None, []) => format!(
                "all {} agree ({runtime})",
                ui::counted(self.tensors.len(), "tensor")
            ),
            (None, unknown) => format!(
                "{} tensors agree, but {} of the reference could not be compared ({runtime})",
                self.tensors.len(),
                unknown.len()
            ),
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
        for name in &self.unknown {
            let name = ui::printable_name(name, MAX_NAME);
            text.push_str(&format!(
                "\nnot compared: `{name}`: nothing in this model has that name, or what belongs to it is not recorded"
            ));
        }
        if !self.not_in_reference.is_empty() {
            let missing = self.not_in_reference.join(", ");
            text.push_str(&format!("\nnot in the reference: {missing}"));
        }
        text
    }
}
