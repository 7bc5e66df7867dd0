//! What happened: one entry for each step, one report for each phase.

use serde::{Deserialize, Serialize};

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// `double.01`, or `finetune`.
    pub phase: String,
    /// Steps done.
    pub step: usize,
    /// Loss of the step; `None` if only the held-out loss was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Held-out loss after the step, if it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Learning rate of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Length of the gradient before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient: Option<f64>,
}

/// What became of one phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PhaseReport {
    /// `double.01`, or `finetune`.
    pub phase: String,
    /// Steps taken.
    pub steps: usize,
    /// The step whose weights were kept; 0: those from before.
    pub kept: usize,
    /// Held-out loss before.
    pub before: f64,
    /// Held-out loss of what was kept.
    pub after: f64,
    /// Values that were trained.
    pub trainables: usize,
}
