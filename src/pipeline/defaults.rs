//! What a model's makers recommend for `generate`, and the bounds of what flags and recipes may ask for.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Pipeline, locate::DAMAGED};
pub use crate::sample::size::{MAX_SIDE, MIN_SIDE};
use crate::{
    checkpoint::{record::Record, with_hint},
    files::Files,
    layout::{Family, FluxConfig, TextModel},
    sample::{png::Image, size::ImageSize},
};

/// The file with a model's own defaults for `generate`.
const DEFAULTS_FILE: &str = "fastflux.json";

/// Beyond these a number is a slip of the finger, and would take for ever or all memory.
pub const MAX_STEPS: usize = 10_000;
/// Sampling steps of images for calibration and training.
pub const MAX_STEPS_OF_DATA: usize = 1000;
/// The longest text, in tokens.
pub const MAX_TEXT_TOKENS: usize = 8_192;
/// The longest text that FLUX.1-dev and FLUX.2 are given.
const MAX_TEXT_TOKENS_OF_DEV: usize = 512;
/// Guidance: models are trained with numbers below 10, and far above it nothing is finite.
pub const MAX_GUIDANCE: f64 = 1000.0;

/// Sampling steps of images for calibration and training, if the model itself takes more.
const STEPS_OF_DATA: usize = 8;

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
    /// Width and height of images, in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// The longest text the text encoder is given, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_length: Option<usize>,
    /// Whether a model without guidance embedding was distilled to few steps, as FLUX.1-schnell and FLUX.2 klein were: then
    /// it knows no negative prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distilled: Option<bool>,
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
        if let Some(family) = &self.family {
            ensure!(
                family.len() <= 100 && !family.chars().any(char::is_control),
                "its `family` is not a line of at most 100 characters"
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

impl Pipeline {
    /// Steps to sample with when the user names none.
    pub fn default_steps(&self) -> usize {
        let guided = self.config.guidance_embed;
        let own = match self.config.family.text {
            TextModel::Qwen3 if guided || self.defaults.distilled == Some(false) => 50,
            TextModel::ClipAndT5 if guided || self.is_undistilled() => 28,
            _ => 4,
        };
        self.defaults.steps.unwrap_or(own)
    }

    /// Width and height in pixels when the user names none: the model's own, its VAE's sample size, or FLUX.1's 1024.
    ///
    /// # Errors
    /// When the VAE's configuration is damaged, or no image can have that size.
    pub fn default_size(&self) -> Result<usize> {
        if let Some(size) = self.defaults.size {
            return Ok(size);
        }
        let Some(own) = &self.components.own else {
            return Ok(1024);
        };
        let vae = own.sub("vae");
        let json = vae.json("config.json")?;
        let size = json.and_then(|json| json.get("sample_size")?.as_u64());
        let size = size.map_or(1024, |size| size as usize);
        ensure!(
            (MIN_SIDE..=MAX_SIDE).contains(&size),
            "`{}`: `sample_size` is {size}: images are between {MIN_SIDE} and {MAX_SIDE} pixels wide and high\nhint: correct it, or name a size with --width and --height",
            vae.describe("config.json")
        );
        Ok(size)
    }

    /// The size that the user asked for, rounded down to what the model can generate (with a note), or the model's own.
    ///
    /// # Errors
    /// When a side is out of range, or the model's own size cannot be read.
    pub fn image_size(&self, width: Option<usize>, height: Option<usize>) -> Result<ImageSize> {
        let own = |said: Option<usize>| said.map_or_else(|| self.default_size(), Ok);
        let (width, height) = (own(width)?, own(height)?);
        let size = ImageSize::rounded(width, height)?;
        if (size.width, size.height) != (width, height) {
            self.reporter.note(format!(
                "generating {}×{} instead of {width}×{height}: sizes are multiples of {}",
                size.width,
                size.height,
                ImageSize::STEP
            ));
        }
        Ok(size)
    }

    /// The size of an edited image: that asked for, or for FLUX.2 that of the first reference image, as diffusers has it.
    ///
    /// # Errors
    /// As [`Self::image_size`].
    pub fn size_of_edit(
        &self,
        width: Option<usize>,
        height: Option<usize>,
        references: &[Image],
    ) -> Result<ImageSize> {
        let first = references.first();
        let first = first.filter(|_| self.config.family == Family::FLUX2);
        let side = |side: fn(&Image) -> u32| first.map(|image| side(image) as usize);
        self.image_size(
            width.or(side(|image| image.width)),
            height.or(side(|image| image.height)),
        )
    }

    /// Steps in which images for calibration and training are sampled, unless asked otherwise: they are noised again, so
    /// their number counts for more than their finish.
    pub fn default_steps_of_data(&self) -> usize {
        self.default_steps().min(STEPS_OF_DATA)
    }

    /// The longest text the text encoder is given by default, in tokens: 512 for FLUX.2 and with guidance embedding (dev),
    /// 256 without (schnell), or the limit of the model's own tokenizer where that is smaller.
    ///
    /// # Errors
    /// When the tokenizer's configuration is damaged.
    pub fn default_text_length(&self) -> Result<usize> {
        if let Some(length) = self.defaults.text_length {
            return Ok(length);
        }
        let family = if self.is_undistilled() {
            MAX_TEXT_TOKENS_OF_DEV
        } else {
            released_text_length(&self.config)
        };
        let Some(own) = &self.components.own else {
            return Ok(family);
        };
        let folder = match self.config.family.text {
            TextModel::ClipAndT5 => "tokenizer_2",
            TextModel::Qwen3 => "tokenizer",
        };
        let tokenizer = own.sub(folder).json("tokenizer_config.json")?;
        // tokenizers without a limit give a huge float
        let limit = tokenizer.and_then(|json| json.get("model_max_length")?.as_u64());
        Ok(limit.map_or(family, |limit| family.min(limit as usize)))
    }

    /// The defaults as a file that leaves this folder must record them: with what VAE and tokenizer say.
    ///
    /// # Errors
    /// When their configurations are damaged.
    pub fn recorded_defaults(&self) -> Result<Defaults> {
        Ok(Defaults {
            size: Some(self.default_size()?),
            text_length: Some(self.default_text_length()?),
            guidance: self.recorded_guidance(),
            ..self.defaults.clone()
        })
    }
}

/// The longest text that the released models of these sizes are given, in tokens.
pub fn released_text_length(config: &FluxConfig) -> usize {
    match config.family.text {
        TextModel::ClipAndT5 if !config.guidance_embed => 256,
        _ => MAX_TEXT_TOKENS_OF_DEV,
    }
}

/// The defaults in a record, or in a file next to the model.
pub(super) fn of_model(
    pipeline: Option<&Files>,
    record: Option<&Record>,
    name: &str,
) -> Result<Defaults> {
    let read = |json: Value| {
        let defaults: Defaults = serde_json::from_value(json)?;
        defaults.check()?;
        anyhow::Ok(defaults)
    };
    if let Some(record) = record {
        return with_hint(read(record.defaults.clone()), DAMAGED)
            .with_context(|| format!("`{name}`: the defaults in its fastflux metadata"));
    }
    let Some(files) = pipeline else {
        return Ok(Defaults::default());
    };
    let Some(json) = files.json(DEFAULTS_FILE)? else {
        return Ok(Defaults::default());
    };
    with_hint(read(json), "correct it, or take it out")
        .with_context(|| format!("`{}`", files.describe(DEFAULTS_FILE)))
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
