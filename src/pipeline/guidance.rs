//! What guides images: an embedding, or a second velocity in each step, away from that of a negative prompt. Models without
//! an embedding were distilled to few steps, or not; that is told by evidence, and said if it is a guess.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Defaults, Pipeline, scheduler};
use crate::{
    checkpoint::record::Record,
    files::Files,
    layout::{Family, FluxConfig, TextModel},
    ui,
};

/// What makers of models that were trained out of distillation say of their guidance.
const UNDISTILLED_GUIDANCE: f64 = 3.5;
/// Words in names of such models, without the hyphens that they are written with.
const UNDISTILLED_WORDS: [&str; 4] = ["dedistill", "undistill", "openflux", "libreflux"];

/// What says that a FLUX.1 without guidance embedding was trained out of distillation; a guess unless its own files do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Its scheduler shifts as FLUX.1-dev's does.
    Scheduler,
    /// Its name.
    Name,
    /// `--true-cfg`.
    Flag,
}

impl Evidence {
    fn words(self) -> &'static str {
        match self {
            Self::Scheduler => "its scheduler shifts as FLUX.1-dev's does",
            Self::Name => "its name says that it is not distilled",
            Self::Flag => "--true-cfg is given",
        }
    }
}

/// The evidence, of a model without guidance embedding. `released`: the scheduler was taken for want of its own.
pub(super) fn evidence(
    config: &FluxConfig,
    locator: &str,
    scheduler: &Value,
    released: bool,
) -> Option<Evidence> {
    if config.family != Family::FLUX1 || config.guidance_embed {
        return None;
    }
    let letters = |c: char| c.is_ascii_alphanumeric().then(|| c.to_ascii_lowercase());
    let name: String = last_part(locator).chars().filter_map(letters).collect();
    if UNDISTILLED_WORDS.iter().any(|word| name.contains(word)) {
        return Some(Evidence::Name);
    }
    let shifts = scheduler["use_dynamic_shifting"] == Value::Bool(true);
    (shifts && !released).then_some(Evidence::Scheduler)
}

fn last_part(locator: &str) -> &str {
    let locator = locator.trim_end_matches(['/', '\\']);
    locator.rsplit(['/', '\\']).next().unwrap_or_default()
}

impl Defaults {
    /// With what `model_index.json` says about distillation, or else the file's name, for a model of FLUX.2.
    ///
    /// # Errors
    /// When `model_index.json` is damaged.
    pub(super) fn with_distilled(
        mut self,
        config: &FluxConfig,
        pipeline: Option<&Files>,
        locator: &str,
    ) -> Result<Self> {
        if config.family != Family::FLUX2 || config.guidance_embed || self.distilled.is_some() {
            return Ok(self);
        }
        let index = pipeline.map_or(Ok(None), |files| files.json("model_index.json"))?;
        let said = index
            .filter(|index| !index["transformer"].is_null())
            // diffusers takes a pipeline that does not say as one that was not distilled
            .map(|index| index["is_distilled"].as_bool().unwrap_or(false));
        let named_base = || {
            let name = last_part(locator).to_lowercase();
            name.contains("base").then_some(false)
        };
        self.distilled = said.or_else(named_base);
        Ok(self)
    }

    /// With what the record of a model that was pruned from this one says about distillation.
    ///
    /// # Errors
    /// When the record is damaged.
    pub(super) fn or_of(mut self, record: Option<&Record>) -> Result<Self> {
        if let (Some(record), None) = (record, self.distilled) {
            let recorded: Self = serde_json::from_value(record.defaults.clone())?;
            self.distilled = recorded.distilled;
            self.guidance = self.guidance.or(recorded.guidance);
        }
        Ok(self)
    }
}

impl Pipeline {
    /// Whether it is a FLUX.1 without guidance embedding that was trained out of distillation, by its files or by evidence.
    pub(super) fn is_undistilled(&self) -> bool {
        self.config.family == Family::FLUX1
            && !self.config.guidance_embed
            && self.defaults.distilled == Some(false)
    }

    /// Takes the model as one that was trained out of distillation.
    pub(super) fn undistill(&mut self, evidence: Evidence) {
        if self.defaults.distilled.is_some() {
            return;
        }
        self.defaults.distilled = Some(false);
        self.evidence = Some(evidence);
        if self.has_released_scheduler() {
            self.scheduler = scheduler::released(true);
        }
    }

    /// Whether the scheduler was taken for want of the model's own.
    pub(super) fn has_released_scheduler(&self) -> bool {
        self.scheduler_name.ends_with(scheduler::RELEASED)
    }

    /// Takes the scale of `--true-cfg`: images are drawn away from a negative prompt, with a second forward in each step.
    /// A FLUX.1 without guidance embedding of which nothing else is known is then none that was distilled.
    ///
    /// # Errors
    /// When the model is a FLUX.2.
    pub fn set_true_cfg(&mut self, scale: Option<f64>) -> Result<()> {
        let Some(scale) = scale else { return Ok(()) };
        ensure!(
            self.config.family == Family::FLUX1,
            "--true-cfg: `{}` is a {}, where --guidance is the scale of a negative prompt",
            self.name,
            self.config.family.name()
        );
        self.true_cfg = Some(scale);
        if scale > 1.0
            && !self.config.guidance_embed
            && self.has_released_scheduler()
            && !self.is_named_schnell()
        {
            self.undistill(Evidence::Flag);
        }
        Ok(())
    }

    /// The same for statistics and training, which record one number of guidance: that of the embedding, if there is one.
    ///
    /// # Errors
    /// When there is one, or the model is a FLUX.2.
    pub fn set_true_cfg_of_data(&mut self, scale: Option<f64>) -> Result<()> {
        ensure!(
            scale.is_none() || !self.config.guidance_embed,
            "--true-cfg: `{}` has a guidance embedding, and images for calibration and training are drawn with that",
            self.name
        );
        self.set_true_cfg(scale)
    }

    /// Whether images are drawn away from a negative prompt, with a second forward in each step: FLUX.2 as long as it was
    /// not distilled, FLUX.1 if it is asked for or the model was trained out of distillation.
    pub fn takes_negative_prompt(&self) -> bool {
        match (self.config.family.text, self.true_cfg) {
            (TextModel::Qwen3, _) => {
                !self.config.guidance_embed && self.defaults.distilled != Some(true)
            }
            (TextModel::ClipAndT5, Some(scale)) => scale > 1.0,
            (TextModel::ClipAndT5, None) => self.is_undistilled(),
        }
    }

    /// How far the velocity is moved away from that of the negative prompt in images that are drawn with `guidance`.
    pub fn cfg_scale(&self, guidance: f64) -> f64 {
        match (self.config.guidance_embed, self.true_cfg) {
            (true, scale) => scale.unwrap_or(1.0),
            (false, _) if self.takes_negative_prompt() => guidance,
            (false, _) => 1.0,
        }
    }

    /// The same for people, where a FLUX.1 is guided so: FLUX.2's scale is its guidance.
    pub fn shown_true_cfg(&self, guidance: Option<f64>) -> Option<f64> {
        let scale = self.cfg_scale(guidance.unwrap_or_default());
        (self.config.family == Family::FLUX1 && scale > 1.0).then_some(scale)
    }

    /// Draws away from `negative`, with this scale, as a recording says.
    pub(crate) fn with_negative_prompt(mut self, scale: f64, negative: &str) -> Result<Self> {
        self.set_true_cfg(Some(scale))?;
        negative.clone_into(&mut self.negative_prompt);
        Ok(self)
    }

    /// Whether the model was distilled to so few steps that it is evaluated at their noise levels only: FLUX.2 klein
    /// without `base`.
    pub fn has_few_steps(&self) -> bool {
        self.config.family == Family::FLUX2
            && !self.config.guidance_embed
            && self.defaults.distilled != Some(false)
    }

    /// Whether guidance has an effect.
    pub fn takes_guidance(&self) -> bool {
        self.config.guidance_embed || self.takes_negative_prompt()
    }

    /// Guidance when the user names none: for the embedding if the model has one, or else the scale of the negative prompt.
    pub fn default_guidance(&self) -> f64 {
        let guided = self.config.guidance_embed;
        if let (Some(scale), false) = (self.true_cfg, guided) {
            return scale;
        }
        let own = match self.config.family.text {
            TextModel::Qwen3 if guided || self.defaults.distilled == Some(false) => 4.0,
            // no effect
            TextModel::Qwen3 => 1.0,
            TextModel::ClipAndT5 if guided => 3.5,
            TextModel::ClipAndT5 if self.is_undistilled() => UNDISTILLED_GUIDANCE,
            TextModel::ClipAndT5 => 0.0,
        };
        self.defaults.guidance.unwrap_or(own)
    }

    /// Guidance as a file that leaves this folder must record it.
    pub(super) fn recorded_guidance(&self) -> Option<f64> {
        let flag = self.true_cfg.filter(|_| self.is_undistilled());
        flag.or(self.defaults.guidance)
    }

    /// Guidance that a recipe or a flag asks for, unless `--true-cfg` says another of a model without embedding.
    pub fn guidance_or_default(&self, asked: Option<f64>) -> f64 {
        let flag = self.true_cfg.filter(|_| !self.config.guidance_embed);
        flag.or(asked).unwrap_or_else(|| self.default_guidance())
    }

    /// The guidance that images are drawn with, if the model takes any; sets the negative prompt, and says if `given`
    /// guidance has no effect.
    ///
    /// # Errors
    /// When there is a negative prompt, but the model takes none.
    pub fn guide(&mut self, given: Option<f64>, negative: Option<&str>) -> Result<Option<f64>> {
        if let Some(negative) = negative {
            let hint = match self.config.family.text {
                TextModel::ClipAndT5 => {
                    "give --true-cfg, such as 3.5, for a second forward in each step"
                }
                TextModel::Qwen3 => "only FLUX.2 as long as it was not distilled is guided by one",
            };
            ensure!(
                self.takes_negative_prompt(),
                "--negative-prompt: `{}` takes none\nhint: {hint}",
                self.name
            );
            negative.clone_into(&mut self.negative_prompt);
        }
        if !self.takes_guidance() {
            if given.is_some() {
                self.reporter.note(format!(
                    "`{}` takes no guidance (it has no embedding of it, or was distilled): --guidance has no effect",
                    self.name
                ));
            }
            return Ok(None);
        }
        Ok(Some(self.guidance_or_default(given)))
    }

    fn is_named_schnell(&self) -> bool {
        last_part(&self.model_ref)
            .to_lowercase()
            .contains("schnell")
    }

    /// What was guessed about how a model is sampled, and which flags say otherwise; `steps` are those asked for.
    pub fn note_guesses(&self, steps: Option<usize>) {
        if self.config.guidance_embed || self.config.family != Family::FLUX1 {
            return;
        }
        let steps = ui::counted(steps.unwrap_or_else(|| self.default_steps()), "step");
        if let Some(evidence) = self.evidence {
            let shift = if self.has_released_scheduler() {
                " and dev's shift"
            } else {
                ""
            };
            let (how, hint) = match self.cfg_scale(self.default_guidance()) {
                scale if scale > 1.0 => (
                    format!("guided by a second forward in each step (scale {scale})"),
                    "--true-cfg 1 leaves that out, ",
                ),
                _ => ("not guided".to_owned(), ""),
            };
            self.reporter.note(format!(
                "`{}` has no guidance embedding, and {}: taken as FLUX.1 without distillation, {steps}{shift}, {how}\nhint: {hint}--steps and --config with a `scheduler` say otherwise",
                self.name,
                evidence.words()
            ));
            return;
        }
        let knows = self.defaults.distilled.is_some()
            || self.defaults.steps.is_some()
            || !self.has_released_scheduler()
            || self.record.is_some()
            || self.is_named_schnell();
        if !knows {
            self.reporter.note(format!(
                "`{}` has no guidance embedding: taken as FLUX.1-schnell, {steps} and no shift\nhint: for a de-distilled FLUX.1-dev give --true-cfg 3.5: then 28 steps and dev's shift are taken, and --negative-prompt acts",
                self.name
            ));
        }
    }
}

#[cfg(test)]
mod tests;
