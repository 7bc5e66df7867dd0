//! What a model's makers recommend for `generate`, and the bounds of what anybody may ask for.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Beyond these a number is a slip of the finger, and would take for ever or all memory.
pub const MAX_STEPS: usize = 10_000;
/// Sampling steps of images for calibration and training.
pub const MAX_STEPS_OF_DATA: usize = 1000;
/// The longest text, in tokens.
pub const MAX_TEXT_TOKENS: usize = 8_192;
/// Guidance: models are trained with numbers below 10, and far above it nothing is finite.
pub const MAX_GUIDANCE: f64 = 1000.0;
/// One image token is 2×2 latent pixels of 8×8 pixels each.
pub const MIN_SIDE: usize = 16;
/// Beyond this the position ids of FLUX make no sense and attention outgrows any machine.
pub const MAX_SIDE: usize = 8192;

/// What a model's makers recommend for `generate`; every field may be missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Defaults {
    /// What kind of model it is, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Sampling steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Guidance scale given to the guidance embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// Width and height of pictures, in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// The longest text the T5 encoder is given, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_length: Option<usize>,
}

impl Defaults {
    /// Fails at a value that the flag of the same name would not take.
    ///
    /// # Errors
    /// The message names the field.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("steps", self.steps, 1, MAX_STEPS),
            ("size", self.size, MIN_SIDE, MAX_SIDE),
            ("text-length", self.text_length, 1, MAX_TEXT_TOKENS),
        ];
        for (field, value, smallest, largest) in sizes {
            let value = value.unwrap_or(smallest);
            ensure!(
                (smallest..=largest).contains(&value),
                "its `{field}` is {value}, expected a number from {smallest} to {largest}"
            );
        }
        if let Some(guidance) = self.guidance {
            ensure!(
                (0.0..=MAX_GUIDANCE).contains(&guidance),
                "its `guidance` is {guidance}, expected a number from 0 to {MAX_GUIDANCE}"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_default_is_within_the_bounds_of_its_flag() {
        let check = |field: &str, value: serde_json::Value| {
            let defaults: Defaults = serde_json::from_value(json!({ field: value })).unwrap();
            defaults.check().map_err(|error| error.to_string())
        };
        for (field, bad) in [
            ("steps", json!(0)),
            ("steps", json!(1_000_000)),
            ("steps", json!(1u64 << 63)),
            ("size", json!(0)),
            ("size", json!(8193)),
            ("text-length", json!(0)),
            ("text-length", json!(1u64 << 63)),
            ("guidance", json!(-1)),
            ("guidance", json!(1e308)),
        ] {
            let error = check(field, bad).unwrap_err();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
        for (field, good) in [
            ("steps", 28),
            ("size", 1024),
            ("text-length", 512),
            ("guidance", 0),
        ] {
            check(field, json!(good)).unwrap();
        }
    }
}
