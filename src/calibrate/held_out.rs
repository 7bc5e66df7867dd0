//! The error of the model's final velocity on held-out noised latents when blocks are exchanged.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};
use indicatif::ProgressBar;

use super::{
    journal::Journal,
    noised::{Batch, NoisedLatents},
};
use crate::model::{Block, Flux, Stream, Trunk, memory::BATCHES_PER_LOAD};

/// Held-out noised latents with the unpruned model's velocity on them.
pub struct HeldOut {
    batches: Vec<(Batch, Tensor)>,
    /// Σ ‖v‖² of the unpruned model.
    norm_sq: f64,
    journal: Option<Journal>,
}

impl HeldOut {
    /// Runs the unpruned model on `noised`.
    ///
    /// # Errors
    /// When a forward fails or its result is not finite.
    pub fn new(
        flux: &Flux,
        noised: &NoisedLatents,
        batch: usize,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let mut batches = Vec::new();
        let mut norm_sq = 0.0;
        for range in noised.batches(batch) {
            let batch = noised.batch(range, device, dtype)?;
            let velocity = flux
                .forward(&batch.inputs(), &mut ())?
                .to_dtype(DType::F32)?;
            norm_sq += sum_sq(&velocity)?;
            batches.push((batch, velocity));
        }
        ensure!(
            norm_sq.is_finite() && norm_sq > 0.0,
            "the unpruned model's velocity is NaN, infinite or zero"
        );
        Ok(Self {
            batches,
            norm_sq,
            journal: None,
        })
    }

    /// Relative mean squared error of the velocity of `flux` with `trunk` in place of its own.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn error(&self, flux: &Flux, trunk: &Trunk) -> Result<f64> {
        let mut error = 0.0;
        for (batch, velocity) in &self.batches {
            let (stream, conditioning) = flux.embed(&batch.inputs())?;
            let stream = trunk.forward_range(0..trunk.len(), &stream, &conditioning, &mut ())?;
            let got = flux.head(&stream, &conditioning)?.to_dtype(DType::F32)?;
            error += sum_sq(&(got - velocity)?)?;
        }
        Ok(error / self.norm_sq)
    }

    /// With numbers that an earlier, killed run measured, and to keep those of this one.
    #[must_use]
    pub fn with_journal(mut self, journal: Option<Journal>) -> Self {
        self.journal = journal;
        self
    }

    /// The error of `trunk` with each of `candidates` (index in the trunk → replacement) exchanged in turn; `what` is compared.
    ///
    /// The trunk is a fold, so the prefix before a block is computed once for all candidates behind it. If blocks are
    /// read whenever they are run, several candidates go through each together; the numbers are the same.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn ablate(
        &self,
        flux: &Flux,
        trunk: &Trunk,
        candidates: &BTreeMap<usize, Block>,
        what: &str,
        progress: &ProgressBar,
    ) -> Result<BTreeMap<usize, f64>> {
        let section = self.journal.as_ref().map(|j| j.section(what, trunk));
        let mut errors: BTreeMap<usize, f64> = candidates.keys().map(|k| (*k, 0.0)).collect();
        let together = if trunk.has_offloaded(0..trunk.len()) {
            BATCHES_PER_LOAD
        } else {
            1
        };
        for (number, (batch, velocity)) in self.batches.iter().enumerate() {
            let mut order = Vec::new();
            for index in candidates.keys() {
                let known = section.as_ref().and_then(|s| s.get(*index, number));
                match known {
                    Some(error) => {
                        *errors.entry(*index).or_default() += error;
                        progress.inc(1);
                    }
                    None => order.push(*index),
                }
            }
            if order.is_empty() {
                continue;
            }
            let (mut prefix, conditioning) = flux.embed(&batch.inputs())?;
            let mut start = 0;
            for group in order.chunks(together) {
                let last = group.last().copied().unwrap_or(start);
                // what came out of the candidates so far, on its way to the end
                let mut under_way: Vec<(usize, Stream)> = Vec::new();
                trunk.visit(start..trunk.len(), &mut |index, _, block| {
                    for (_, stream) in &mut under_way {
                        *stream = block.forward(stream, &conditioning)?;
                    }
                    if let Some(candidate) = candidates.get(&index)
                        && group.contains(&index)
                    {
                        under_way.push((index, candidate.forward(&prefix, &conditioning)?));
                    }
                    if index < last {
                        prefix = block.forward(&prefix, &conditioning)?;
                    }
                    Ok(())
                })?;
                for (index, end) in under_way {
                    let got = flux.head(&end, &conditioning)?.to_dtype(DType::F32)?;
                    let error = sum_sq(&(got - velocity)?)? / self.norm_sq;
                    *errors.entry(index).or_default() += error;
                    if let Some(section) = &section {
                        section.put(index, number, error);
                    }
                    progress.inc(1);
                }
                start = last;
            }
        }
        Ok(errors)
    }

    /// Number of batches, for progress bars.
    pub fn batches(&self) -> usize {
        self.batches.len()
    }
}

fn sum_sq(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?))
}
