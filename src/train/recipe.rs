//! Every number that changes what `train-sandwich` writes, as one JSON file (`configs/sandwich.json`).

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

mod validate;

/// The recipe of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct SandwichRecipe {
    /// Seed of images, noise, times and LoRA factors.
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
    /// All sandwiches together, end to end.
    #[serde(alias = "finish")]
    pub finetune: FinetuneRecipe,
    /// Steps between two evaluations of the held-out loss.
    pub evaluate_every: usize,
    /// Early stopping: evaluations without improvement before the phase ends with its best weights; 0 disables it.
    pub patience: usize,
}

/// The model's own images, noised again for every batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct DataRecipe {
    /// Prompts to sample; `null`: all of the list, 128 if images are large.
    #[serde(alias = "samples")]
    pub num_prompts: Option<usize>,
    /// Sampling steps; `null`: 8, or the model's own default if that is lower.
    pub steps: Option<usize>,
    /// Guidance; `null`: the model's own default.
    pub guidance: Option<f64>,
    /// Image width in pixels; `null`: the model's own default.
    pub width: Option<usize>,
    /// Image height in pixels; `null`: the model's own default.
    pub height: Option<usize>,
    /// Noised latents in one forward; `null`: as many as make some 1,344 tokens, at least 1.
    pub batch: Option<usize>,
    /// Forwards whose gradients are summed for one step.
    pub accumulate: usize,
    /// Held-out noised latents, of prompts that are not trained on; `null`: 192, fewer if images have more than 341 tokens, at least 8.
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
    /// Rank; `null`: 64, in models wider than 1024 channels 32.
    pub rank: Option<usize>,
    /// The addition is scaled by alpha / rank; `null`: alpha is the rank.
    pub alpha: Option<f64>,
    /// Which projections get one; none: the replaced layers alone are trained.
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

/// How gradients become steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Muon for matrices, AdamW for vectors.
    Muon,
    /// AdamW for everything.
    Adamw,
}

/// The optimiser and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct OptimiserRecipe {
    /// Muon or AdamW.
    pub method: Method,
    /// Highest learning rate: how far a step moves a value, in the root mean square.
    pub lr: f64,
    /// Share of the learning rate that the replaced layers get: they start from the least-squares solution and are not
    /// low-rank, so every step moves them further.
    pub layer_lr: f64,
    /// Steps from (almost) none to the highest learning rate.
    pub warmup: usize,
    /// What the cosine decay ends at, as a share of the highest learning rate.
    pub final_lr: f64,
    /// Decay of Muon's mean gradient.
    pub momentum: f64,
    /// Decay of AdamW's mean gradient.
    pub beta1: f64,
    /// Decay of AdamW's mean squared gradient.
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
pub struct FinetuneRecipe {
    /// Steps; 0 leaves it out.
    pub steps: usize,
    /// Highest learning rate; `null`: the sandwiches' own.
    pub lr: Option<f64>,
    /// Which unpruned blocks get a LoRA.
    pub blocks: FinetuneBlocks,
}

/// Which unpruned blocks are finetuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FinetuneBlocks {
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
            finetune: FinetuneRecipe::default(),
            evaluate_every: 50,
            patience: 10,
        }
    }
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self {
            num_prompts: None,
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
            rank: None,
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
            method: Method::Muon,
            lr: 1.5e-3,
            layer_lr: 0.3,
            warmup: 40,
            final_lr: 0.0,
            momentum: 0.95,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

impl Default for FinetuneRecipe {
    fn default() -> Self {
        Self {
            steps: 800,
            lr: Some(4e-4),
            blocks: FinetuneBlocks::All,
        }
    }
}

impl LoraRecipe {
    /// What a LoRA of this recipe is scaled by: alpha / rank; 1 if there is none.
    pub fn scale(&self) -> f64 {
        match (self.alpha, self.rank) {
            (Some(alpha), Some(rank)) => alpha / rank as f64,
            _ => 1.0,
        }
    }
}

impl Method {
    /// Moments of each value that is trained; vectors, which have two with either, hardly count.
    pub fn moments(self) -> f64 {
        match self {
            Self::Muon => 1.0,
            Self::Adamw => 2.0,
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
        let text = crate::checkpoint::read_small(path).context("--recipe")?;
        let what = || format!("--recipe: `{name}` is not a training recipe");
        let mut recipe: Self = serde_json::from_slice(&text).with_context(what)?;
        let given: serde_json::Value = serde_json::from_slice(&text).with_context(what)?;
        let has = |key: &str| given.pointer(&format!("/optimiser/{key}")).is_some();
        // AdamW's numbers without a method are of a version that had nothing else
        if !has("method") && ["beta1", "beta2", "epsilon"].into_iter().any(has) {
            recipe.optimiser.method = Method::Adamw;
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests;
