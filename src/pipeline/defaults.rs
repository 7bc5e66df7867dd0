//! What a model's makers recommend for `generate`, and the bounds of what anybody may ask for.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Beyond these a number is a slip of the finger, and would take for ever or all memory.
pub const MOST_STEPS: usize = 10_000;
/// The longest text, in tokens.
pub const MOST_TEXT: usize = 8_192;
/// Guidance: models are trained with numbers below 10, and far above it nothing is finite.
pub const MOST_GUIDANCE: f64 = 1000.0;
/// One image token is 2×2 latent pixels of 8×8 pixels each.
pub const SMALLEST_PICTURE: usize = 16;
/// Beyond this the position ids of FLUX make no sense and attention outgrows any machine.
pub const LARGEST_PICTURE: usize = 8192;

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
            ("steps", self.steps, 1, MOST_STEPS),
            ("size", self.size, SMALLEST_PICTURE, LARGEST_PICTURE),
            ("text-length", self.text_length, 1, MOST_TEXT),
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
                (0.0..=MOST_GUIDANCE).contains(&guidance),
                "its `guidance` is {guidance}, expected a number from 0 to {MOST_GUIDANCE}"
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
