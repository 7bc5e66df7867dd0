//! Every number that changes what `train-sandwich` writes, as one JSON file (`configs/sandwich.json`).

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    calibrate::recipe::{MAX_BATCH, MAX_SAMPLES},
    pipeline::defaults::MAX_STEPS_OF_DATA,
};

/// Bounds beyond which a number is a slip, and would take for ever or exhaust memory.
const MOST_TRAINING: usize = 10_000_000;
const MOST_HELD_OUT: usize = 1_000_000;
const MOST_CACHE: usize = 100_000;
const MOST_ACCUMULATE: usize = 10_000;

/// The recipe of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct SandwichRecipe {
    /// Seed of pictures, noise, times and LoRA factors.
    pub seed: u64,
    /// What the blocks are trained on.
    pub data: DataRecipe,
    /// Which blocks are trained together, towards what.
    pub sandwich: LayersRecipe,
    /// What is added to unpruned blocks.
    pub lora: LoraRecipe,
    /// How errors are weighed.
    pub loss: LossRecipe,
    /// How weights move.
    pub optimiser: OptimiserRecipe,
    /// Steps for each sandwich; 0 leaves the sandwiches out.
    pub steps: usize,
    /// The pass over everything together.
    pub finish: FinishRecipe,
    /// Steps between two looks at the held-out loss.
    pub evaluate_every: usize,
    /// Looks at the held-out loss without a better one after which a sandwich is left as its best was; 0: never.
    pub patience: usize,
}

/// The model's own pictures, noised anew for every batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct DataRecipe {
    /// Prompts to sample; `null`: all of the list, 128 where pictures are large.
    pub samples: Option<usize>,
    /// Sampling steps; `null`: 8, or the model's own default where that is lower.
    pub steps: Option<usize>,
    /// Guidance; `null`: the model's own default.
    pub guidance: Option<f64>,
    /// Picture width in pixels; `null`: the model's own default.
    pub width: Option<usize>,
    /// Picture height in pixels; `null`: the model's own default.
    pub height: Option<usize>,
    /// States in one forward; `null`: as many as make some 1,344 tokens, at least 1.
    pub batch: Option<usize>,
    /// Forwards whose gradients are summed for one step.
    pub accumulate: usize,
    /// Held-out states, of prompts that are not trained on; `null`: 128, fewer where pictures are large.
    pub held_out: Option<usize>,
    /// Batches of activations that are kept in memory and used again; 0: new noise for every step.
    pub cache: usize,
}

/// What belongs to a sandwich.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LayersRecipe {
    /// Unpruned blocks on each side of the replaced ones.
    pub neighbours: usize,
    /// From the input upwards, or from the output downwards.
    pub order: Order,
    /// The original's output on its own path, or on what the pruned prefix puts out.
    pub target: Target,
}

/// In which order sandwiches are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// From the input upwards.
    Upwards,
    /// From the output downwards.
    Downwards,
}

/// What a sandwich is to put out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// What the original model has there.
    Global,
    /// What the original blocks make of the sandwich's own input.
    Local,
}

/// Low-rank additions to the projections of unpruned blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LoraRecipe {
    /// Rank; `null` here and no `--rank`: no LoRA, the replaced layers alone are trained.
    pub rank: Option<usize>,
    /// The addition is scaled by alpha / rank; `null`: alpha is the rank.
    pub alpha: Option<f64>,
    /// Which projections get one.
    pub targets: Vec<Projections>,
}

/// Groups of a block's projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projections {
    /// Queries, keys, values, and what follows attention (in single blocks also the MLP, which is fused with them).
    Attention,
    /// The MLP (in single blocks fused with attention).
    Mlp,
    /// Shift, scale and gate.
    Modulation,
}

/// Weights of the squared error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LossRecipe {
    /// What errors are measured in.
    pub normalise: Normalise,
    /// Weight of the text tokens, relative to the image tokens' 1.
    pub text_weight: f64,
}

/// The unit of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// As it is.
    None,
    /// The variance of the target's text or image tokens.
    Stream,
    /// The variance of each of the target's channels.
    Channel,
    /// The mean square of each of the target's tokens.
    Token,
    /// How far the error's direction moves the original's velocity, on average.
    Velocity,
}

/// AdamW and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct OptimiserRecipe {
    /// Highest learning rate.
    pub lr: f64,
    /// Share of the learning rate that the replaced layers get: they start from the least-squares solution and are not
    /// low-rank, so every step moves them further.
    pub layer_lr: f64,
    /// Steps from (almost) none to the highest learning rate.
    pub warmup: usize,
    /// What the cosine decay ends at, as a share of the highest learning rate.
    pub final_lr: f64,
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean squared gradient.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Longest gradient, over all trainables together; 0: any.
    pub clip: f64,
}

/// The last pass: all trainables together, end to end, against the original's velocity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FinishRecipe {
    /// Steps; 0 leaves it out.
    pub steps: usize,
    /// Highest learning rate; `null`: the sandwiches' own.
    pub lr: Option<f64>,
    /// Which unpruned blocks get a LoRA.
    pub blocks: FinishBlocks,
}

/// Which unpruned blocks the finish trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FinishBlocks {
    /// Those of the sandwiches.
    Sandwiches,
    /// All.
    All,
}

impl Default for SandwichRecipe {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataRecipe::default(),
            sandwich: LayersRecipe::default(),
            lora: LoraRecipe::default(),
            loss: LossRecipe::default(),
            optimiser: OptimiserRecipe::default(),
            steps: 150,
            finish: FinishRecipe::default(),
            evaluate_every: 50,
            patience: 10,
        }
    }
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self {
            samples: None,
            steps: None,
            guidance: None,
            width: None,
            height: None,
            batch: None,
            accumulate: 1,
            held_out: None,
            cache: 0,
        }
    }
}

impl Default for LayersRecipe {
    fn default() -> Self {
        Self {
            neighbours: 1,
            order: Order::Upwards,
            target: Target::Global,
        }
    }
}

impl Default for LoraRecipe {
    fn default() -> Self {
        Self {
            rank: Some(32),
            alpha: None,
            targets: vec![
                Projections::Attention,
                Projections::Mlp,
                Projections::Modulation,
            ],
        }
    }
}

impl Default for LossRecipe {
    fn default() -> Self {
        Self {
            normalise: Normalise::Stream,
            text_weight: 1.0,
        }
    }
}

impl Default for OptimiserRecipe {
    fn default() -> Self {
        Self {
            lr: 3e-3,
            layer_lr: 0.3,
            warmup: 40,
            final_lr: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

impl Default for FinishRecipe {
    fn default() -> Self {
        Self {
            steps: 400,
            lr: Some(2e-3),
            blocks: FinishBlocks::All,
        }
    }
}

impl LoraRecipe {
    /// What a LoRA of this recipe is scaled by: alpha / rank; 1 where there is none.
    pub fn scale(&self) -> f64 {
        match (self.alpha, self.rank) {
            (Some(alpha), Some(rank)) => alpha / rank as f64,
            _ => 1.0,
        }
    }
}

impl OptimiserRecipe {
    /// The learning rate of step `step` (from 0) of `steps`: linear warm-up to `peak`, cosine decay.
    pub fn rate(&self, peak: f64, step: usize, steps: usize) -> f64 {
        let warm = (step + 1) as f64 / self.warmup.max(1) as f64;
        let turn = std::f64::consts::PI * step as f64 / steps.max(1) as f64;
        let decay = self.final_lr + (1.0 - self.final_lr) * 0.5 * (1.0 + turn.cos());
        peak * warm.min(1.0) * decay
    }
}

impl SandwichRecipe {
    /// Reads a recipe; what it does not name has its default.
    ///
    /// # Errors
    /// When the file cannot be read, is not JSON, or has an unknown key or a value of the wrong type.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text =
            std::fs::read(path).with_context(|| format!("--recipe: cannot read `{name}`"))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("--recipe: `{name}` is not a training recipe"))
    }

    /// Checks the ranges of all numbers for a model `width` wide.
    ///
    /// # Errors
    /// When one is out of range; the message names it and the range.
    pub fn validate(&self, width: usize) -> Result<()> {
        if let Some(rank) = self.lora.rank {
            ensure!(
                (1..=width).contains(&rank),
                "--rank {rank}: a LoRA of this model has a rank between 1 and its width, {width}"
            );
        }
        let positive = |name: &str, value: f64| -> Result<()> {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name} {value}: expected a number above 0"
            );
            Ok(())
        };
        let o = &self.optimiser;
        positive("--lr", o.lr)?;
        positive("recipe: `finish.lr`", self.finish.lr.unwrap_or(1.0))?;
        positive("--alpha", self.lora.alpha.unwrap_or(1.0))?;
        positive("recipe: `optimiser.epsilon`", o.epsilon)?;
        for (name, share) in [
            ("beta1", o.beta1),
            ("beta2", o.beta2),
            ("final-lr", o.final_lr),
        ] {
            ensure!(
                (0.0..1.0).contains(&share),
                "recipe: `optimiser.{name}` must be at least 0 and below 1"
            );
        }
        for (name, value) in [
            ("optimiser.weight-decay", o.weight_decay),
            ("optimiser.clip", o.clip),
            ("optimiser.layer-lr", o.layer_lr),
            ("loss.text-weight", self.loss.text_weight),
        ] {
            ensure!(
                value.is_finite() && value >= 0.0,
                "recipe: `{name}` must be a number of at least 0"
            );
        }
        self.validate_counts()?;
        ensure!(
            self.steps + self.finish.steps > 0,
            "--steps 0 and --finetune 0: nothing would be trained"
        );
        Ok(())
    }

    /// The numbers that count something, with the flag or the key that sets them.
    fn validate_counts(&self) -> Result<()> {
        let d = &self.data;
        for (name, value, least, most) in [
            ("--batch", d.batch.unwrap_or(1), 1, MAX_BATCH),
            ("--num-prompts", d.samples.unwrap_or(1), 1, MAX_SAMPLES),
            ("--steps", self.steps, 0, MOST_TRAINING),
            ("--finetune", self.finish.steps, 0, MOST_TRAINING),
            ("--accumulate", d.accumulate, 1, MOST_ACCUMULATE),
            ("--cache", d.cache, 0, MOST_CACHE),
            ("`data.steps`", d.steps.unwrap_or(1), 1, MAX_STEPS_OF_DATA),
            ("`data.held-out`", d.held_out.unwrap_or(1), 1, MOST_HELD_OUT),
        ] {
            let from = if name.starts_with('-') {
                ""
            } else {
                "recipe: "
            };
            ensure!(
                (least..=most).contains(&value),
                "{from}{name} {value}: expected a number from {least} to {most}"
            );
        }
        for (name, value) in [
            ("sandwich.neighbours", self.sandwich.neighbours),
            ("evaluate-every", self.evaluate_every),
        ] {
            ensure!(value > 0, "recipe: `{name}` must be at least 1");
        }
        ensure!(
            d.guidance.is_none_or(|g| g.is_finite() && g >= 0.0),
            "recipe: `data.guidance` must be a number of at least 0"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_in_configs_is_the_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/sandwich.json");
        assert_eq!(
            SandwichRecipe::read(&path).unwrap(),
            SandwichRecipe::default()
        );
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let error = serde_json::from_str::<SandwichRecipe>(r#"{"lora": {"rnak": 1}}"#).unwrap_err();
        assert!(error.to_string().contains("rnak"), "{error}");
    }

    #[test]
    fn the_learning_rate_warms_up_and_decays_to_nothing() {
        let recipe = OptimiserRecipe::default();
        let rate = |step| recipe.rate(1.0, step, 100);
        assert!((rate(0) - 0.025).abs() < 1e-9);
        assert!(rate(39) > 0.6 && rate(39) < 1.0);
        assert!((0..39).all(|step| rate(step + 1) > rate(step)));
        assert!(rate(99) < 1e-3 && rate(99) > 0.0);
        assert!((0..99).skip(40).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        let refused = |change: fn(&mut SandwichRecipe), word: &str| {
            let mut recipe = SandwichRecipe::default();
            change(&mut recipe);
            let error = recipe.validate(128).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        SandwichRecipe::default().validate(128).unwrap();
        refused(|r| r.lora.rank = Some(0), "--rank 0");
        refused(|r| r.lora.rank = Some(129), "--rank 129");
        refused(|r| r.optimiser.lr = f64::NAN, "--lr");
        refused(|r| r.optimiser.beta2 = 1.0, "beta2");
        refused(|r| r.data.batch = Some(0), "--batch 0");
        refused(|r| (r.steps, r.finish.steps) = (0, 0), "nothing");
        refused(|r| r.data.accumulate = 0, "--accumulate 0");
        refused(|r| r.data.guidance = Some(-1.0), "data.guidance");
        // nor may a slip of the finger exhaust memory
        refused(|r| r.data.batch = Some(100_000_000), "--batch 1");
        refused(|r| r.data.samples = Some(usize::MAX), "--num-prompts 18");
        refused(|r| r.data.cache = usize::MAX, "--cache 18");
        refused(|r| r.data.steps = Some(1 << 63), "data.steps");
        refused(|r| r.data.held_out = Some(1 << 63), "data.held-out");
        refused(|r| r.steps = usize::MAX, "--steps 18");
    }
}
