//! The phases of a run: which entries each trains, how long, and how its error is measured.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use candle::{DType, Tensor, Var};

use super::{
    loss::{self, Loss},
    recipe::{FinetuneBlocks, Normalise, SandwichRecipe},
    sandwich::Sandwich,
};
use crate::model::{Conditioning, Flux, Stream, ops};

/// Batches that the velocity's sensitivity is measured on.
const SENSITIVITY_BATCHES: usize = 4;

/// Name of the phase that trains all sandwiches together.
pub(super) const FINETUNE: &str = "finetune";

/// What is trained in a phase.
pub(super) enum Kind {
    Sandwich(Sandwich),
    Finetune,
}

pub(super) struct Phase {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Entries of the student that are run with gradients.
    pub(super) range: Range<usize>,
    /// Entries that are trained.
    pub(super) trained: Vec<Range<usize>>,
    pub(super) steps: usize,
    pub(super) lr: f64,
}

/// The phases of a run on a model of `entries` entries.
pub(super) fn phases(
    recipe: &SandwichRecipe,
    sandwiches: &[Sandwich],
    entries: usize,
) -> Vec<Phase> {
    let mut out = Vec::new();
    if recipe.steps > 0 {
        out.extend(sandwiches.iter().map(|sandwich| Phase {
            name: sandwich.to_string(),
            kind: Kind::Sandwich(sandwich.clone()),
            range: sandwich.student.clone(),
            trained: vec![sandwich.student.clone()],
            steps: recipe.steps,
            lr: recipe.optimiser.lr,
        }));
    }
    if recipe.finetune.steps > 0 {
        let all = 0..entries;
        let trained: Vec<Range<usize>> = match recipe.finetune.blocks {
            FinetuneBlocks::Sandwiches => {
                // neighbouring sandwiches share blocks
                let within = |i: &usize| sandwiches.iter().any(|s| s.student.contains(i));
                all.clone().filter(within).map(|i| i..i + 1).collect()
            }
            FinetuneBlocks::All => vec![all.clone()],
        };
        let first = trained.first().map_or(0, |range| range.start);
        out.push(Phase {
            name: FINETUNE.to_owned(),
            kind: Kind::Finetune,
            range: first..all.end,
            trained,
            steps: recipe.finetune.steps,
            lr: recipe.finetune.lr.unwrap_or(recipe.optimiser.lr),
        });
    }
    out
}

/// One batch at the entry of what is trained. Clones share the tensors.
#[derive(Clone)]
pub(super) struct Sample {
    pub(super) stream: Stream,
    pub(super) conditioning: Conditioning,
    /// The original's tokens after the sandwich, or its velocity.
    pub(super) target: Tensor,
}

impl Sample {
    fn target_stream(&self) -> Stream {
        Stream {
            tokens: self.target.clone(),
            txt_len: self.stream.txt_len,
        }
    }
}

/// How a phase's error is measured.
pub(super) enum Measure {
    Tokens(Box<Loss>),
    /// Squared error of the velocity over this mean square.
    Velocity(f64),
}

impl Measure {
    pub(super) fn judge(
        &self,
        student: &Flux,
        output: &Stream,
        sample: &Sample,
    ) -> Result<(f64, Tensor)> {
        let mean = match self {
            Self::Tokens(loss) => return loss.judge(output, &sample.target_stream()),
            Self::Velocity(mean) => mean,
        };
        let var = Var::from_tensor(&output.tokens)?;
        let tracked = Stream {
            tokens: var.as_tensor().clone(),
            txt_len: output.txt_len,
        };
        let velocity = student.head(&tracked, &sample.conditioning)?;
        let error =
            (velocity.detach().to_dtype(DType::F32)? - sample.target.to_dtype(DType::F32)?)?;
        let scale = 1.0 / (mean * error.elem_count() as f64);
        let loss = sum_sq(&error)? * scale;
        let grad = (error * (2.0 * scale))?.to_dtype(velocity.dtype())?;
        let mut grads = ops::backward(&velocity, &grad)?;
        let grad = grads.remove(&var).context("the velocity has no gradient")?;
        Ok((loss, grad))
    }
}

fn sum_sq(t: &Tensor) -> Result<f64> {
    let sum = t.to_dtype(DType::F32)?.sqr()?.sum_all()?;
    Ok(f64::from(sum.to_scalar::<f32>()?))
}

impl Measure {
    /// What `phase` is measured by, from its held-out samples; `entries` is the length of the pruned model.
    pub(super) fn new(
        phase: &Phase,
        held_out: &[Sample],
        teacher: &Flux,
        entries: usize,
        recipe: &SandwichRecipe,
        gradient_checkpointing: bool,
    ) -> Result<Self> {
        let Kind::Sandwich(sandwich) = &phase.kind else {
            let mut sum = (0.0, 0);
            for sample in held_out {
                sum.0 += sum_sq(&sample.target)?;
                sum.1 += sample.target.elem_count();
            }
            let mean = sum.0 / sum.1.max(1) as f64;
            ensure!(
                mean.is_finite() && mean > 0.0,
                "the original's velocity is NaN, infinite or zero"
            );
            return Ok(Self::Velocity(mean));
        };
        let streams: Vec<Stream> = held_out.iter().map(Sample::target_stream).collect();
        let last = sandwich.student.end == entries;
        let sensitivity = if recipe.loss.normalise == Normalise::Velocity {
            let inputs = streams.iter().cloned();
            let samples: Vec<_> = inputs
                .zip(held_out.iter().map(|s| s.conditioning.clone()))
                .take(SENSITIVITY_BATCHES)
                .collect();
            Some(loss::sensitivity(
                teacher,
                sandwich.teacher.end,
                &samples,
                recipe.seed,
                gradient_checkpointing,
            )?)
        } else {
            None
        };
        let loss = Loss::new(&recipe.loss, &streams, last, sensitivity)?;
        Ok(Self::Tokens(Box::new(loss)))
    }
}
