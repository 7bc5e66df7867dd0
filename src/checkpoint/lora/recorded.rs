//! A LoRA that is in the weights of a checkpoint, as its record has it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecordedLora {
    /// The file, absolute.
    pub file: PathBuf,
    /// What it was multiplied by.
    pub weight: f32,
    /// The fingerprint of its tensors, as [`super::super::record::fingerprint`] has it.
    pub fingerprint: String,
    /// Whether it acts on text encoders too, which are not in the checkpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub text: bool,
}
