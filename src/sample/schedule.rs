//! The noise levels of a sampling run, from `scheduler_config.json`. `denoise.rs` takes the steps.
//!
//! Source: diffusers [`FlowMatchEulerDiscreteScheduler.set_timesteps`][set_timesteps] as [`FluxPipeline`][pipeline] calls
//! it. numpy computes in float32 there, so do we.
//!
//! [set_timesteps]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py#L283-L382
//! [pipeline]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux/pipeline_flux.py#L821

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::shift;
use crate::layout::ShiftRule;

/// Curve of the resolution-dependent shift.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum ShiftCurve {
    #[default]
    Exponential,
    Linear,
}

/// A flow-matching noise schedule.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "the fields of diffusers' config"
)]
pub struct Schedule {
    num_train_timesteps: u32,
    shift: f64,
    use_dynamic_shifting: bool,
    base_shift: f64,
    max_shift: f64,
    base_image_seq_len: usize,
    max_image_seq_len: usize,
    time_shift_type: ShiftCurve,
    shift_terminal: Option<f64>,
    invert_sigmas: bool,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    stochastic_sampling: bool,
    #[serde(skip)]
    rule: ShiftRule,
    #[serde(rename = "_class_name")]
    class: Option<String>,
    #[serde(flatten)]
    unknown: serde_json::Map<String, Value>,
}

impl Default for Schedule {
    /// The defaults of diffusers' class, which are FLUX.1-schnell's schedule too.
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            time_shift_type: ShiftCurve::Exponential,
            shift_terminal: None,
            invert_sigmas: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            stochastic_sampling: false,
            rule: ShiftRule::Tokens,
            class: None,
            unknown: serde_json::Map::new(),
        }
    }
}

impl Schedule {
    /// FLUX.1-dev's schedule: shifted towards noise the more image tokens there are.
    pub fn flux_dev() -> Self {
        Self {
            shift: 3.0,
            use_dynamic_shifting: true,
            ..Self::default()
        }
    }

    /// FLUX.1-schnell's schedule: evenly spaced.
    pub fn flux_schnell() -> Self {
        Self::default()
    }

    /// Reads `scheduler_config.json`. What this program cannot do as diffusers does is refused by name.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let schedule: Self = serde_json::from_slice(bytes).context("not a scheduler config")?;
        if let Some(class) = schedule.class.as_deref() {
            ensure!(
                class == "FlowMatchEulerDiscreteScheduler",
                "scheduler `{class}` is not supported; FLUX.1 uses FlowMatchEulerDiscreteScheduler"
            );
        }
        for (name, on) in [
            ("use_beta_sigmas", schedule.use_beta_sigmas),
            ("stochastic_sampling", schedule.stochastic_sampling),
        ] {
            ensure!(
                !on,
                "scheduler option `{name}` is not supported; set it to false"
            );
        }
        // diffusers ignores what it does not know, but a switch that is on and does nothing would be a surprise
        if let Some((name, _)) = schedule
            .unknown
            .iter()
            .find(|(_, value)| **value == Value::Bool(true))
        {
            bail!("scheduler option `{name}` is not known; remove it or set it to false");
        }
        ensure!(
            !(schedule.use_karras_sigmas && schedule.use_exponential_sigmas),
            "only one of the scheduler options `use_karras_sigmas` and `use_exponential_sigmas` can be true"
        );
        ensure!(
            schedule.num_train_timesteps > 0,
            "scheduler option `num_train_timesteps` must be positive"
        );
        ensure!(
            schedule.shift.is_finite()
                && schedule.shift > 0.0
                && schedule.base_shift.is_finite()
                && schedule.max_shift.is_finite(),
            "scheduler options `shift`, `base_shift` and `max_shift` must be finite, and `shift` positive"
        );
        ensure!(
            !schedule.use_dynamic_shifting
                || schedule.max_image_seq_len != schedule.base_image_seq_len,
            "scheduler options `base_image_seq_len` and `max_image_seq_len` must differ"
        );
        if let Some(end) = schedule.shift_terminal {
            ensure!(
                (0.0..1.0).contains(&end),
                "scheduler option `shift_terminal` must lie in [0, 1), not {end}"
            );
        }
        Ok(schedule)
    }

    /// The same with the dynamic shift of a family.
    #[must_use]
    pub fn with_rule(self, rule: ShiftRule) -> Self {
        Self { rule, ..self }
    }

    /// Noise levels before each of `steps` steps, and after the last: `steps + 1` numbers, from 1 down to 0.
    ///
    /// `image_tokens` (a quarter of the latent pixels) matters to a dynamic shift only; those of reference images do not
    /// count.
    pub fn sigmas(&self, steps: usize, image_tokens: usize) -> Result<Vec<f32>> {
        ensure!(steps > 0, "sampling takes at least one step");
        let mut sigmas: Vec<f32> = linspace(1.0, 1.0 / steps as f64, steps)
            .map(|s| s as f32)
            .collect();
        if self.use_dynamic_shifting {
            let mu = match self.rule {
                ShiftRule::Tokens => self.mu(image_tokens),
                ShiftRule::TokensAndSteps => shift::measured_mu(image_tokens, steps),
            };
            let top = match self.time_shift_type {
                ShiftCurve::Exponential => mu.exp(),
                ShiftCurve::Linear => mu,
            } as f32;
            for s in &mut sigmas {
                *s = top / (top + (1.0 / *s - 1.0));
            }
        } else {
            let (shift, more) = (self.shift as f32, (self.shift - 1.0) as f32);
            for s in &mut sigmas {
                *s = shift * *s / (1.0 + more * *s);
            }
        }
        if let Some(end) = self.shift_terminal.filter(|end| *end != 0.0) {
            let scale = (1.0 - sigmas[steps - 1]) / (1.0 - end) as f32;
            // one step has nothing to stretch: diffusers divides 0 by 0 there
            ensure!(
                scale != 0.0,
                "scheduler option `shift_terminal` needs at least two steps"
            );
            for s in &mut sigmas {
                *s = 1.0 - (1.0 - *s) / scale;
            }
        }
        let (first, last) = (f64::from(sigmas[0]), f64::from(sigmas[steps - 1]));
        if self.use_karras_sigmas {
            const RHO: f64 = 7.0;
            let (high, low) = (first.powf(1.0 / RHO), last.powf(1.0 / RHO));
            sigmas = linspace(0.0, 1.0, steps)
                .map(|ramp| (high + ramp * (low - high)).powf(RHO) as f32)
                .collect();
        } else if self.use_exponential_sigmas {
            sigmas = linspace(first.ln(), last.ln(), steps)
                .map(|s| s.exp() as f32)
                .collect();
        }
        if self.invert_sigmas {
            for s in &mut sigmas {
                *s = 1.0 - *s;
            }
        }
        sigmas.push(if self.invert_sigmas { 1.0 } else { 0.0 });
        Ok(sigmas)
    }

    /// The timestep in [0, 1] that the transformer gets at noise level `sigma`.
    pub fn timestep(&self, sigma: f32) -> f32 {
        // the pipeline divides by 1000 whatever the training steps were
        sigma * self.num_train_timesteps as f32 / 1000.0
    }

    /// Strength of the dynamic shift, linear in the number of image tokens ([diffusers `calculate_shift`][shift]).
    ///
    /// [shift]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux/pipeline_flux.py#L73-L83
    fn mu(&self, image_tokens: usize) -> f64 {
        let (base, max) = (
            self.base_image_seq_len as f64,
            self.max_image_seq_len as f64,
        );
        let slope = (self.max_shift - self.base_shift) / (max - base);
        image_tokens as f64 * slope + (self.base_shift - slope * base)
    }
}

/// `numpy.linspace(start, stop, n)`.
fn linspace(start: f64, stop: f64, n: usize) -> impl Iterator<Item = f64> {
    let step = if n > 1 {
        (stop - start) / (n - 1) as f64
    } else {
        0.0
    };
    (0..n).map(move |i| {
        if i > 0 && i == n - 1 {
            stop
        } else {
            i as f64 * step + start
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sigmas that diffusers 0.42 gives for the same options.
    fn check(options: &str, steps: usize, tokens: usize, diffusers: &[f64]) {
        let sigmas = Schedule::from_json(options.as_bytes())
            .and_then(|s| s.sigmas(steps, tokens))
            .unwrap();
        assert_eq!(sigmas.len(), diffusers.len());
        for (a, b) in sigmas.iter().zip(diffusers) {
            assert!((f64::from(*a) - b).abs() <= 1e-7, "{options}: {sigmas:?}");
        }
    }

    #[test]
    fn sigmas_equal_those_of_diffusers() {
        let dev = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true, "shift": 3.0}"#;
        check(
            dev,
            4,
            24,
            &[
                1.0,
                0.826_258_838_176_727_3,
                0.613_187_193_870_544_4,
                0.345_725_238_323_211_7,
                0.0,
            ],
        );
        let full = [
            1.0,
            0.926_647_365_093_231_2,
            0.825_701_653_957_366_9,
            0.677_986_741_065_979,
            0.441_199_749_708_175_66,
            0.0,
        ];
        check(dev, 5, 4096, &full);
        check("{}", 4, 16, &[1.0, 0.75, 0.5, 0.25, 0.0]);
        check("{}", 1, 16, &[1.0, 0.0]);
        check(
            r#"{"shift": 3.0}"#,
            3,
            16,
            &[1.0, 0.857_142_806_053_161_6, 0.599_999_964_237_213_1, 0.0],
        );
        let linear = r#"{"use_dynamic_shifting": true, "time_shift_type": "linear"}"#;
        check(
            linear,
            4,
            1024,
            &[
                1.0,
                0.653_979_182_243_347_2,
                0.386_503_070_592_880_25,
                0.173_553_705_215_454_1,
                0.0,
            ],
        );
        let terminal = r#"{"use_dynamic_shifting": true, "shift_terminal": 0.02}"#;
        check(
            terminal,
            4,
            1024,
            &[
                1.0,
                0.759_777_903_556_823_7,
                0.446_293_056_011_199_95,
                0.019_999_980_926_513_672,
                0.0,
            ],
        );
        let karras = r#"{"use_dynamic_shifting": true, "use_karras_sigmas": true}"#;
        check(
            karras,
            4,
            1024,
            &[
                1.0,
                0.737_876_594_066_619_9,
                0.536_998_808_383_941_7,
                0.384_944_736_957_550_05,
                0.0,
            ],
        );
        let exponential = r#"{"shift": 2.5, "use_exponential_sigmas": true}"#;
        check(
            exponential,
            4,
            1024,
            &[
                1.0,
                0.768_880_963_325_500_5,
                0.591_177_940_368_652_3,
                0.454_545_468_091_964_7,
                0.0,
            ],
        );
        check(
            r#"{"invert_sigmas": true}"#,
            4,
            1024,
            &[0.0, 0.25, 0.5, 0.75, 1.0],
        );
    }

    #[test]
    fn the_two_flux_schedules_are_those_of_their_configs() -> Result<()> {
        let dev = br#"{"_diffusers_version": "0.30.0", "shift": 3.0, "use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 1.15,
            "base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 1000, "shift_terminal": null}"#;
        assert_eq!(
            Schedule::flux_dev().sigmas(28, 4096)?,
            Schedule::from_json(dev)?.sigmas(28, 4096)?
        );
        assert_eq!(
            Schedule::flux_schnell().sigmas(4, 4096)?,
            [1.0, 0.75, 0.5, 0.25, 0.0]
        );
        Ok(())
    }

    #[test]
    fn the_model_is_told_sigma() {
        assert!((Schedule::flux_dev().timestep(0.75) - 0.75).abs() <= 0.0);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let refused = [
            (r#"{"use_beta_sigmas": true}"#, "use_beta_sigmas"),
            (r#"{"stochastic_sampling": true}"#, "stochastic_sampling"),
            (r#"{"use_magic": true}"#, "use_magic"),
            (r#"{"_class_name": "DDIMScheduler"}"#, "DDIMScheduler"),
            (
                r#"{"use_karras_sigmas": true, "use_exponential_sigmas": true}"#,
                "use_karras_sigmas",
            ),
            (r#"{"time_shift_type": "cubic"}"#, "cubic"),
            (r#"{"shift": "much"}"#, "much"),
            (r#"{"shift": 0.0}"#, "shift"),
            ("[]", "scheduler config"),
        ];
        for (options, named) in refused {
            let error = format!("{:#}", Schedule::from_json(options.as_bytes()).unwrap_err());
            assert!(error.contains(named), "{options}: {error}");
        }
        assert!(Schedule::flux_dev().sigmas(0, 16).is_err());
    }
}
