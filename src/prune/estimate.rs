//! What a plan will cost and save, counted from shapes before anything is written.

use serde::Serialize;

use super::plan::PruningPlan;
use crate::{
    layout::FluxConfig,
    model::{
        cost::{self, Cost},
        memory::{self, ElementSizes},
    },
};

/// Where and how large images are drawn: what arithmetic and memory are counted for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Image tokens of one image.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Bytes of one activation: 2 for bf16.
    pub element: usize,
    /// Bytes of one weight in memory, on average: 2 for bf16, less if weights stay packed.
    pub weight_bytes: f64,
    /// Bytes of the whole unpruned checkpoint on disk for each parameter.
    pub file_bytes: f64,
}

/// Sizes of a model, pruned or not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ModelCost {
    /// Number of parameters of the transformer.
    pub parameters: u64,
    /// Bytes of its checkpoint.
    pub file_bytes: u64,
    /// Floating-point operations of one step at batch 1.
    pub flops: u64,
    /// Device memory while drawing one image: the transformer's weights and the widest moment of a block. Text
    /// encoders and VAE come before and after it, never at the same time.
    pub memory_bytes: u64,
}

impl ModelCost {
    /// Of a model as it is.
    pub fn for_config(config: &FluxConfig, workload: Workload) -> Self {
        let Workload {
            image_tokens,
            text_tokens,
            element,
            weight_bytes,
            file_bytes,
        } = workload;
        let cost: Cost = cost::model(config, image_tokens, text_tokens);
        let format = ElementSizes {
            element: element as u64,
            weight: weight_bytes,
            scores: false, // as with kernels that hold none
        };
        let tokens = image_tokens + text_tokens;
        Self {
            parameters: cost.parameters,
            file_bytes: (cost.parameters as f64 * file_bytes).round() as u64,
            flops: cost.flops(),
            memory_bytes: (cost.parameters as f64 * weight_bytes).round() as u64
                + memory::activations(config, 1, tokens, format),
        }
    }

    /// Of the model that `plan` makes of another. The plan must be valid.
    pub fn of_plan(config: &FluxConfig, plan: &PruningPlan, workload: Workload) -> Self {
        let pruned = FluxConfig {
            layout: plan.layout(config),
            ..config.clone()
        };
        Self::for_config(&pruned, workload)
    }

    /// How many times faster than `before` a step is, by its arithmetic alone.
    pub fn speed_up(&self, before: &Self) -> f64 {
        before.flops as f64 / self.flops as f64
    }
}
