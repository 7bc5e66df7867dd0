//! The student and its teacher: a pruned model, and the model it was pruned from, checked against each other.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    checkpoint::{Source, keys, lora::RecordedLora, record},
    device::Runtime,
    layout::{BlockSpec, FluxConfig},
    model::{Block, Flux, Trunk, memory::OffloadPlan},
    pipeline::{ModelChoice, Pipeline, load},
};

/// A pruned model and the model it was pruned from.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The model to train.
    pub pruned: Pipeline,
    /// The model it was pruned from.
    pub teacher: Pipeline,
    /// Identities of their weights: pruned model, teacher.
    pub fingerprints: [String; 2],
}

impl Pair {
    /// Opens the teacher: the model named `teacher`, by default the one that `pruned` was made from. `choice` names the
    /// pruned model's components. Only headers and samples of tensors are read.
    ///
    /// # Errors
    /// When nothing is replaced in `pruned`, or the teacher is not the model that it was made from.
    pub fn open(pruned: Pipeline, teacher: Option<&str>, choice: &ModelChoice) -> Result<Self> {
        let Some(record) = pruned.record.clone() else {
            bail!(
                "`{}` has nothing replaced, so there is nothing to train\nhint: make a pruned model with `fastflux prune`",
                pruned.name
            )
        };
        ensure!(
            pruned.config.replaced().next().is_some(),
            "`{}` has nothing replaced, so there is nothing to train\nhint: make a pruned model with `fastflux prune`",
            pruned.name
        );
        let teacher = match teacher {
            None => pruned
                // --config is the pruned model's, whose record knows what it says of both
                .base_with(&ModelChoice {
                    config: None,
                    ..choice.clone()
                })
                .context("the teacher\nhint: name the original model with --teacher")?,
            Some(name) => {
                let mut lora = record
                    .lora
                    .iter()
                    .map(RecordedLora::choice)
                    .collect::<Vec<_>>();
                lora.extend(pruned.shared_lora());
                let choice = ModelChoice {
                    model: Some(name.to_owned()),
                    lora,
                    patch: None,
                    ..choice.clone()
                };
                Pipeline::open_original(&choice, Some(&record)).context("--teacher")?
            }
        };
        let found = record::fingerprint(&teacher.transformer.unadapted())?;
        ensure!(
            found == record.base_fingerprint,
            "`{}` is not the model that `{}` was pruned from (fingerprint {found}, expected {})\nhint: --teacher names the original model",
            teacher.name,
            pruned.name,
            record.base_fingerprint
        );
        let sizes = |config: &FluxConfig| FluxConfig {
            layout: Vec::new(),
            ..config.clone()
        };
        ensure!(
            sizes(&teacher.config) == sizes(&pruned.config)
                && teacher
                    .config
                    .original_ids()
                    .eq(pruned.config.original_ids()),
            "`{}` and `{}` have different sizes or blocks",
            teacher.name,
            pruned.name
        );
        let of = |pipeline: &Pipeline| record::fingerprint(&pipeline.transformer);
        let fingerprints = [of(&pruned)?, of(&teacher)?];
        Ok(Self {
            pruned,
            teacher,
            fingerprints,
        })
    }

    /// What a dry run looks at if nothing was pruned yet: `teacher` with the layout of `config` in the place of its own.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn example(teacher: Pipeline, config: FluxConfig) -> Result<Self> {
        let fingerprint = record::fingerprint(&teacher.transformer)?;
        let mut pruned = teacher.clone();
        pruned.config = config;
        Ok(Self {
            pruned,
            teacher,
            fingerprints: [fingerprint.clone(), fingerprint],
        })
    }

    /// The unpruned model; with `offload`, the blocks that do not stay by it are read whenever they are run.
    ///
    /// # Errors
    /// When its weights are damaged or do not fit into memory.
    pub fn flux(&self, offload: Option<&OffloadPlan>, runtime: &Runtime) -> Result<Flux> {
        let Some(plan) = offload else {
            return load::flux(&self.teacher, runtime);
        };
        load::check_kernels(runtime, &self.teacher.reporter);
        let vb = self
            .teacher
            .transformer
            .offloaded_var_builder(runtime.dtype, &runtime.device);
        Flux::offloaded(&self.teacher.config, &vb, &|index| plan.is_resident(index))
            .with_context(|| format!("cannot load the transformer of `{}`", self.teacher.name))
    }

    /// The pruned model: the teacher's blocks if the file holds the same bytes, and how many of them there are
    /// before the first other one.
    ///
    /// # Errors
    /// When the two differ in a tensor that pruning leaves alone.
    pub fn student(&self, flux: &Flux, offload: bool, runtime: &Runtime) -> Result<(Flux, usize)> {
        let (ours, theirs) = (&self.pruned.transformer, &self.teacher.transformer);
        let outside = |name: &str| keys::parse(name).is_none() && !name.starts_with("final_layer.");
        for (name, source) in ours.iter().filter(|(name, _)| outside(name)) {
            ensure!(
                theirs
                    .get(name)
                    .is_some_and(|other| same(source, other).unwrap_or(false)),
                "`{}` and `{}` differ in the tensor `{name}`, which pruning leaves alone\nhint: --teacher names the original model",
                self.pruned.name,
                self.teacher.name
            );
        }
        let vb = ours.var_builder(runtime.dtype, &runtime.device);
        let config = &self.pruned.config;
        let (mut entries, mut shared, mut alike) = (Vec::new(), 0, true);
        for (spec, prefix) in config.slots() {
            let teachers = match spec {
                BlockSpec::Original(_) => self.teachers(spec, prefix.as_deref(), flux)?,
                BlockSpec::Replaced(_) => None,
            };
            alike &= teachers.is_some();
            shared += usize::from(alike);
            let block = match (teachers, &prefix) {
                (Some(block), _) => block,
                (None, Some(prefix)) if offload && matches!(spec, BlockSpec::Original(_)) => {
                    Block::offloaded(&Arc::new(config.clone()), spec, &vb.pp(prefix))
                }
                (None, Some(prefix)) => Block::new(config, spec, &vb.pp(prefix))?,
                (None, None) => Block::new(config, spec, &vb)?,
            };
            entries.push((spec.clone(), block));
        }
        let student = flux.with_trunk_and_head(config, Trunk::new(entries), &vb)?;
        Ok((student, shared))
    }

    /// The teacher's block of `spec`, when the pruned file holds the same weights at `prefix`.
    fn teachers(
        &self,
        spec: &BlockSpec,
        prefix: Option<&str>,
        flux: &Flux,
    ) -> Result<Option<Block>> {
        let slots = self.teacher.config.slots();
        let entry = slots.iter().position(|(other, _)| *other == spec);
        let (Some(entry), Some(prefix)) = (entry, prefix) else {
            return Ok(None);
        };
        let Some(theirs) = &slots[entry].1 else {
            return Ok(None);
        };
        let prefix = format!("{prefix}.");
        for (name, source) in self.pruned.transformer.iter() {
            let Some(tail) = name.strip_prefix(&prefix) else {
                continue;
            };
            let other = self.teacher.transformer.get(&format!("{theirs}.{tail}"));
            if !other.map_or(Ok(false), |other| same(source, other))? {
                return Ok(None);
            }
        }
        Ok(flux.trunk.entries().get(entry).map(|(_, b)| b.clone()))
    }
}

/// Bytes at each end by which tensors are compared: weights that were trained differ everywhere.
const COMPARED: usize = 4096;

/// Whether the pruned model's tensor `a` is the teacher's `b`.
fn same(a: &Source, b: &Source) -> Result<bool> {
    if a.shape() != b.shape() {
        return Ok(false);
    }
    if a.format() == b.format() {
        return Ok(a.scale() == b.scale() && a.ends(COMPARED)? == b.ends(COMPARED)?);
    }
    let equal = |a: &Source, b: &Source| {
        // what a format cannot hold is not what was written in it
        let there = b.converted(a.format(), None).ends(COMPARED);
        there.is_ok_and(|there| a.ends(COMPARED).is_ok_and(|here| here == there))
    };
    // pruning writes GGML's blocks as floats; a format that holds all numbers of another, GGUF's f32, changes none
    Ok(equal(a, b) && (b.format().dtype().is_none() || equal(b, a)))
}
