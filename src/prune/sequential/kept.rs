//! Refits what a kept block ends in.

use anyhow::{Context, Result};
use candle::{DType, Tensor};

use super::{super::projections::OutputProjectionSums, SequentialFit, ahead::Aim};
use crate::{
    calibrate::subsample,
    layout::{BlockKind, BlockSpec},
    model::{
        Block, Linear, OutputProjection,
        ops::{self, Branch},
    },
};

/// What text tokens count in the fits of the first single block, where image tokens count 1.
const TEXT_WEIGHT: f64 = 0.5;
/// Bytes of the inputs of output projections that are held while these are fitted, instead of being computed again.
const HELD_INPUTS: u64 = 80 << 20;

impl SequentialFit<'_> {
    /// Fits the output projections of the kept block `index`, which is ahead: to give the original's stream behind the block,
    /// or what `aim` asks for, when the original's streams are behind the blocks that it stands ahead of.
    pub(super) fn kept(&mut self, index: usize, aim: Option<&Aim>) -> Result<()> {
        let mut block = self.block(index)?.resident()?;
        let id = self.flux.trunk.entries()[index].0.id();
        let joint = id.kind == BlockKind::Single;
        let text_weight = self.text_weight(index);
        let mut projections: Vec<(&'static str, Linear, OutputProjectionSums)> = Vec::new();
        let (mut held, mut room) = (Vec::new(), HELD_INPUTS);
        for batch in &mut self.batches {
            let (before, pruned) = batch.load(&mut self.store, &self.runtime.device)?;
            let conditioning = &batch.conditioning;
            let steps = block.output_projections(&pruned, conditioning)?;
            let (after, wanted) = match aim {
                None => {
                    let after = block.forward(&before, conditioning)?;
                    (after.clone(), after.tokens)
                }
                Some(aim) => {
                    let here = block.project(&pruned, &steps)?;
                    let wanted = aim.wanted(&here, &before, conditioning)?;
                    (before, wanted)
                }
            };
            let mut offset = 0;
            for (place, step) in steps.iter().enumerate() {
                if projections.len() <= place {
                    let linear = block.linears_mut().into_iter();
                    let (_, linear) = linear
                        .into_iter()
                        .find(|(name, _)| *name == step.name)
                        .with_context(|| format!("block {id} has no `{}`", step.name))?;
                    projections.push((step.name, linear.clone(), OutputProjectionSums::default()));
                }
                let (_, linear, sums) = &mut projections[place];
                let tokens = step.x.dim(1)?;
                let target = wanted.narrow(1, offset, tokens)?;
                offset += tokens;
                // in a single block text and image tokens share a projection
                let text = if joint { pruned.txt_len } else { 0 };
                let spans = [(0, text, text_weight), (text, tokens - text, 1.0)];
                for (start, len, weight) in spans {
                    if len == 0 || weight <= 0.0 {
                        continue;
                    }
                    let span = |t: &Tensor| t.narrow(1, start, len);
                    let (z, x, target) = (span(&step.z)?, span(&step.x)?, span(&target)?);
                    let chosen = batch.rows.tokens(&z)?;
                    let take = |x: &Tensor| subsample::pick(x, None, chosen.as_ref());
                    let wide = |x: &Tensor| x.to_dtype(DType::F32);
                    let (z, gate) = (take(&z)?, wide(&step.gate)?);
                    let (x, target) = (wide(&take(&x)?)?, wide(&take(&target)?)?);
                    let y = wide(&linear.product(&z)?)?;
                    let minus = |x: &Tensor, y: &Tensor, bias, gate: &Tensor| {
                        let gate = Some(&gate.neg()?);
                        ops::gated_residual(&[Branch { x, y, bias, gate }])
                    };
                    let bias = linear.bias().map(wide).transpose()?;
                    let change = minus(&target, &x, None, &gate.ones_like()?)?;
                    let rest = minus(&change, &y, bias.as_ref(), &gate)?;
                    sums.add(&z, &rest, Some(&gate), weight)
                        .with_context(|| format!("block {id}"))?;
                }
            }
            batch.store(&mut self.store, &after, &pruned)?;
            let held_by = |s: &OutputProjection| s.z.elem_count() + s.x.elem_count();
            let values: usize = steps.iter().map(held_by).sum();
            let bytes = (values * self.runtime.dtype.size_in_bytes()) as u64;
            let fits = !steps.is_empty() && bytes <= room;
            room -= if fits { bytes } else { 0 };
            held.push(fits.then_some(steps));
            self.progress.inc(1);
        }
        for (name, linear, sums) in projections {
            let projection = sums
                .solve(&linear, self.fitting.ridge)
                .with_context(|| format!("block {id}, `{name}`"))?;
            block.exchange(name, projection.linear(self.runtime)?)?;
            self.out
                .output_projections
                .insert((Some(id), name), projection);
        }
        for (batch, held) in self.batches.iter_mut().zip(held) {
            let pruned = batch.load_pruned(&mut self.store, &self.runtime.device)?;
            let pruned = match held {
                Some(steps) => block.project(&pruned, &steps)?,
                None => block.forward(&pruned, &batch.conditioning)?,
            };
            batch.store_pruned(&mut self.store, &pruned)?;
        }
        Ok(())
    }

    /// What a squared error of a text token counts behind the single block `index`, where one of an image token counts 1:
    /// only the attention of the blocks that follow sees text tokens, so it falls with their number, to nothing.
    fn text_weight(&self, index: usize) -> f64 {
        let singles = |entries: &[(BlockSpec, Block)]| {
            let single = |(spec, _): &&(BlockSpec, Block)| spec.kind() == BlockKind::Single;
            entries.iter().filter(single).count()
        };
        let entries = self.flux.trunk.entries();
        let (all, later) = (singles(entries), singles(&entries[index + 1..]));
        TEXT_WEIGHT * later as f64 / (all.max(2) - 1) as f64
    }
}
