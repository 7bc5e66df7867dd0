//! Sandwich training: heals a pruned model by moving the replaced layers and LoRA factors beside their neighbours towards
//! what the unpruned model computes, one sandwich after another, then all together (FastFLUX, arXiv 2506.10035).
//!
//! Files, flags and progress bars are `commands`' business; what a block computes is `model`'s.

pub mod adamw;
pub mod backward;
pub mod chart;
pub mod data;
pub mod loss;
pub mod memory;
pub mod peft;
mod phase;
pub mod recipe;
mod run;
mod samples;
pub mod sandwich;
pub mod state;
pub mod trainables;

use serde::{Deserialize, Serialize};

pub use run::{Training, Watch};

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// `double.01`, or `finish`.
    pub phase: String,
    /// Steps done.
    pub step: usize,
    /// Loss of the step; `None` where only the held-out loss was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Held-out loss after the step, where it was taken.
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
    /// `double.01`, or `finish`.
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
