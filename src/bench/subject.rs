//! What is timed: a model with its weights, or random weights of a shape.

use anyhow::{Context, Result, ensure};

use super::inputs::{random_weights, replaced};
use crate::{
    device::Runtime,
    layout::FluxConfig,
    model::{
        Flux,
        memory::{self, ElementSizes},
        ops,
    },
    pipeline::{Pipeline, defaults::released_text_length, load},
    ui,
    ui::Reporter,
};

/// Side of the images that random weights are timed on by default, in pixels.
const DEFAULT_SIZE: usize = 1024;

/// A transformer to time.
#[derive(Clone, Debug)]
pub struct Subject {
    /// As it was named.
    pub name: String,
    /// Its shape.
    pub config: FluxConfig,
    /// Side of its images by default, in pixels.
    pub default_size: usize,
    /// Text tokens it is given by default.
    pub default_text_tokens: usize,
    /// `None`: random weights in the number format that is timed.
    pipeline: Option<Pipeline>,
}

impl Subject {
    /// A model with its weights.
    ///
    /// # Errors
    /// When its defaults cannot be read.
    pub fn from_pipeline(pipeline: Pipeline) -> Result<Self> {
        Ok(Self {
            name: pipeline.name.clone(),
            config: pipeline.config.clone(),
            default_size: pipeline.default_size()?,
            default_text_tokens: pipeline.default_text_length()?,
            pipeline: Some(pipeline),
        })
    }

    /// Random weights of this shape.
    pub fn from_config(name: String, config: FluxConfig) -> Self {
        Self {
            name,
            default_size: DEFAULT_SIZE,
            default_text_tokens: released_text_length(&config),
            config,
            pipeline: None,
        }
    }

    /// Fails unless both take the same inputs.
    ///
    /// # Errors
    /// The message names both and their widths.
    pub fn check_inputs(&self, first: &Self) -> Result<()> {
        let widths = |s: &Self| {
            (
                s.config.in_channels,
                s.config.context_in_dim,
                s.config.vec_in_dim,
            )
        };
        ensure!(
            widths(self) == widths(first),
            "`{}`: it does not take the same inputs as `{}` (channels, T5 and CLIP width {:?} and {:?})",
            self.name,
            first.name,
            widths(self),
            widths(first)
        );
        Ok(())
    }

    /// This shape with `count` of its single blocks replaced.
    ///
    /// # Errors
    /// When it has fewer.
    pub(super) fn replaced(&self, count: usize) -> Result<Self> {
        let blocks = self.config.layout.len();
        Ok(Self {
            name: format!("{}, {count} of {blocks} blocks replaced", self.name),
            config: replaced(&self.config, count)?,
            pipeline: None,
            ..*self
        })
    }

    /// How weights and activations are held in memory; weights of packed formats in fewer bytes.
    pub(super) fn format(&self, runtime: &Runtime) -> ElementSizes {
        let element = runtime.dtype.size_in_bytes();
        let weight = self.pipeline.as_ref().map_or(element as f64, |pipeline| {
            pipeline.bytes_of_a_weight(runtime.dtype)
        });
        ElementSizes {
            element: element as u64,
            weight,
            scores: ops::holds_scores(&runtime.device, runtime.dtype, self.config.head_dim()),
        }
    }

    /// Bytes of all weights in memory.
    pub(super) fn weight_bytes(&self, runtime: &Runtime) -> u64 {
        memory::weights(&self.config, self.format(runtime))
    }

    /// The transformer on the device.
    pub(super) fn load(&self, runtime: &Runtime, reporter: &Reporter) -> Result<Flux> {
        load::check_kernels(runtime, reporter);
        let vb = match &self.pipeline {
            Some(pipeline) => pipeline
                .transformer
                .var_builder(runtime.dtype, &runtime.device),
            None => random_weights(&self.config, runtime)?,
        };
        Flux::new(&self.config, vb)
            .with_context(|| format!("cannot load the transformer of `{}`", self.name))
    }
}

/// Fails before memory runs out if the weights alone do not fit into what is free.
pub(super) fn check_memory(subjects: &[Subject], runtime: &Runtime) -> Result<()> {
    let bytes: u64 = subjects.iter().map(|s| s.weight_bytes(runtime)).sum();
    let free = runtime.free_memory().unwrap_or(u64::MAX);
    ensure!(
        bytes <= free,
        "the weights take {} in {}, and {} are free\nhint: --dtype bf16 halves float32; or time a smaller --config",
        ui::bytes(bytes as f64),
        runtime.dtype.as_str(),
        ui::bytes(free as f64)
    );
    Ok(())
}
