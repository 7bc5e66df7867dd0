//! What a run takes, from the sizes alone: trainables, and memory on the device. Nothing is loaded.
//!
//! An upper estimate of what is alive at once: weights, trainables with gradients and moments, and the activations of the
//! dearest phase. What an allocator keeps beyond that is not in it.

use std::ops::Range;

use serde::Serialize;

use super::{
    recipe::{LoraRecipe, Projections, SandwichRecipe},
    sandwich::Sandwich,
};
use crate::{
    layout::{BlockKind, BlockSpec, FluxConfig},
    model::cost,
};

/// Scores that the backward pass of attention holds at once if no kernel does it: four tensors of f32 of this many
/// elements.
const SCORES: f64 = (1u64 << 26) as f64;

/// Bytes on the device for batches that pass through a stored block together, if there is room for so many.
const MAX_LOADED_BATCH_BYTES: f64 = (1u64 << 31) as f64;
/// Batches from which reading takes a small part of the time: more would only take memory.
const MAX_BATCHES_PER_LOAD: usize = 64;

/// Where and how a run computes.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each holds or not whatever the others do"
)]
pub struct Workload {
    /// Bytes of an activation.
    pub element: f64,
    /// Bytes of a frozen weight, on average: fewer if weights stay packed.
    pub weight: f64,
    /// Whether on the CPU.
    pub cpu: bool,
    /// Whether the backward pass of attention holds matrices of scores: see `ops::holds_scores_backward`.
    pub scores: bool,
    /// Noised latents in a forward.
    pub batch: usize,
    /// Text and image tokens of a state.
    pub tokens: (usize, usize),
    /// Whether only the inputs of blocks are kept.
    pub gradient_checkpointing: bool,
    /// Whether blocks that are not trained stay off the device.
    pub offload: bool,
    /// Bytes of blocks that stay all the same.
    pub resident: f64,
    /// Batches that pass through such a block together; at least 1.
    pub batches_per_load: usize,
}

impl Workload {
    /// Bytes of the tokens of one batch between two blocks.
    fn input(self, config: &FluxConfig) -> f64 {
        let (text, image) = self.tokens;
        (config.hidden_size * self.batch * (text + image)) as f64 * self.element
    }

    /// Bytes of one batch at the entry of what is trained: input and target, and the rotary table.
    fn sample(self, config: &FluxConfig) -> f64 {
        let (text, image) = self.tokens;
        let head = config.axes_dims.iter().sum::<usize>();
        2.0 * self.input(config) + (4 * head * (text + image)) as f64
    }

    /// How many batches may pass through a stored block together: as many as fit into 2 GiB and into `room` bytes, of the
    /// `samples` that there are, 64 at most.
    pub fn max_batches_per_load(
        self,
        config: &FluxConfig,
        samples: usize,
        room: Option<f64>,
    ) -> usize {
        if !self.offload {
            return 1;
        }
        // a sample, and another stream of it on its way through a block
        let each = self.sample(config) + self.input(config);
        let room = room
            .unwrap_or(MAX_LOADED_BATCH_BYTES)
            .clamp(0.0, MAX_LOADED_BATCH_BYTES);
        let more = (room / each) as usize;
        (1 + more).min(samples).clamp(1, MAX_BATCHES_PER_LOAD)
    }
}

/// What one phase takes, in bytes on the device.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryEstimate {
    /// Values that are trained.
    pub trainables: f64,
    /// Frozen weights.
    pub weights: f64,
    /// Trainables, their gradients and both moments.
    pub optimiser: f64,
    /// Activations and gradients of the tokens.
    pub activations: f64,
    /// Batches that wait: held-out ones, those that are used again, and those that were prefetched.
    pub samples: f64,
}

impl MemoryEstimate {
    /// All bytes.
    pub fn bytes(&self) -> f64 {
        self.weights + self.optimiser + self.activations + self.samples
    }
}

/// What training `sandwich` takes, or, without one, all of them end to end.
pub fn estimate(
    config: &FluxConfig,
    teacher: &FluxConfig,
    sandwiches: &[Sandwich],
    sandwich: Option<&Sandwich>,
    recipe: &SandwichRecipe,
    workload: Workload,
) -> MemoryEstimate {
    let all = 0..config.layout.len();
    let trained = |i: usize| match sandwich {
        Some(sandwich) => sandwich.student.contains(&i),
        None => {
            recipe.finetune.blocks == super::recipe::FinetuneBlocks::All
                || sandwiches.iter().any(|s| s.student.contains(&i))
        }
    };
    let first = all.clone().find(|i| trained(*i)).unwrap_or(0);
    let range: Range<usize> = sandwich.map_or(first..all.end, |s| s.student.clone());
    let count = |i: usize| values(config, &config.layout[i], &recipe.lora);
    let trainables: f64 = all.clone().filter(|i| trained(*i)).map(count).sum();

    let s = workload;
    let (text, image) = s.tokens;
    let wide =
        |spec: &BlockSpec| cost::block(config, spec, image, text).parameters as f64 * s.element;
    // new layers are never packed
    let parameters = |spec: &BlockSpec| match spec {
        BlockSpec::Original(_) => wide(spec) / s.element * s.weight,
        BlockSpec::Replaced(_) => wide(spec),
    };
    let outside = cost::embedder_and_head(config, image, text).parameters as f64 * s.weight;
    let layers = config.layout.iter();
    let replaced: f64 = layers
        .filter(|spec| matches!(spec, BlockSpec::Replaced(_)))
        .map(parameters)
        .sum();
    let largest = teacher.layout.iter().map(parameters).fold(0.0, f64::max);
    let weights = if s.offload {
        // end to end, blocks come and go one at a time
        let resident: f64 = match sandwich {
            Some(sandwich) => config.layout[sandwich.student.clone()]
                .iter()
                .map(parameters)
                .sum(),
            None => largest,
        };
        outside + replaced + resident + largest + s.resident
    } else {
        outside + replaced + teacher.layout.iter().map(parameters).sum::<f64>()
    };

    // the way back needs packed matrices wide, of one block or of all
    let each = config.layout[range.clone()].iter();
    let originals = each.filter(|spec| matches!(spec, BlockSpec::Original(_)));
    let dequantized = match (s.weight < s.element, s.gradient_checkpointing) {
        (false, _) => 0.0,
        (true, true) => originals.map(wide).fold(0.0, f64::max),
        (true, false) => originals.map(wide).sum(),
    };

    let rows = (s.batch * (text + image)) as f64;
    let graph = |i: usize| graph(config, &config.layout[i]) * rows * s.element;
    let input = s.input(config);
    let kept = if s.gradient_checkpointing {
        input * range.len() as f64 + range.clone().map(graph).fold(0.0, f64::max)
    } else {
        range.clone().map(graph).sum()
    };
    // the backward pass of attention: queries, keys, values and their gradients, wide, and scores
    let scores = if s.scores { 4.0 * 4.0 * SCORES } else { 0.0 };
    let full = (s.batch * config.num_heads) as f64 * ((text + image) as f64).powi(2) * 16.0;
    let attention = 24.0 * config.hidden_size as f64 * rows * 4.0 + scores.min(full);
    let data = &recipe.data;
    let held_out = data.held_out.unwrap_or(0) as f64 / s.batch.max(1) as f64;
    let more = s.batches_per_load.saturating_sub(1) as f64;
    let waiting = match data.cache {
        0 => more,
        // no more than are ever drawn
        cache => cache.min(recipe.steps.max(recipe.finetune.steps) * data.accumulate) as f64,
    };
    MemoryEstimate {
        trainables,
        weights: weights + dequantized,
        // value, gradient and moments; on the CPU the best values so far are next to them
        optimiser: 4.0
            * (2.0 + recipe.optimiser.method.moments() + f64::from(u8::from(s.cpu)))
            * trainables,
        // next to the graph: the sample (input and target) and gradients of the widest tensor
        activations: kept + attention + 6.0 * input,
        samples: (held_out + waiting) * s.sample(config) + more * input,
    }
}

/// Values kept for the backward pass for each token.
fn graph(config: &FluxConfig, spec: &BlockSpec) -> f64 {
    let (hidden, mlp) = (config.hidden_size as f64, config.mlp_size as f64);
    match spec {
        BlockSpec::Original(id) if id.kind == BlockKind::Double => 12.0 * hidden + 2.0 * mlp,
        BlockSpec::Original(_) => 8.0 * hidden + 2.0 * mlp,
        BlockSpec::Replaced(_) => 4.0 * hidden,
    }
}

/// Values that are trained in one entry.
fn values(config: &FluxConfig, spec: &BlockSpec, recipe: &LoraRecipe) -> f64 {
    let (hidden, mlp) = (config.hidden_size, config.mlp_size);
    let BlockSpec::Original(id) = spec else {
        return cost::block(config, spec, 1, 1).parameters as f64;
    };
    let Some(rank) = recipe.rank else {
        return 0.0;
    };
    let has = |group| recipe.targets.contains(&group);
    let (attention, wide, modulation) = (
        has(Projections::Attention),
        has(Projections::Mlp),
        has(Projections::Modulation),
    );
    let projections: Vec<(usize, usize, bool, usize)> = match id.kind {
        BlockKind::Double => vec![
            (hidden, 6 * hidden, modulation, 2),
            (hidden, 3 * hidden, attention, 2),
            (hidden, hidden, attention, 2),
            (hidden, mlp, wide, 2),
            (mlp, hidden, wide, 2),
        ],
        BlockKind::Single => vec![
            (hidden, 3 * hidden, modulation, 1),
            (hidden, 3 * hidden + mlp, attention || wide, 1),
            (hidden + mlp, hidden, attention || wide, 1),
        ],
    };
    let values = projections
        .into_iter()
        .filter(|(_, _, wanted, _)| *wanted)
        .map(|(input, output, _, times)| {
            let rank = rank.min(input).min(output);
            rank * (input + output) * times
        });
    values.sum::<usize>() as f64
}

#[cfg(test)]
mod tests;
