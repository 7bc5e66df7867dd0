//! The sums that every score and every least-squares fit follows from, gathered in one pass without storing
//! activations. `fit` solves with them.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use candle::{DType, Tensor};

pub use super::sums::{BUCKETS, Moments, StreamStats, WaitingGram, bucket};
use super::{
    on_gpu::{Pending, Place, Share},
    subsample::TokenSubset,
};
use crate::{
    layout::{BlockId, BlockSpec},
    model::{Conditioning, Observer, Stream},
};

/// What was gathered of one block.
#[derive(Clone, Debug)]
pub struct BlockStats {
    /// The block in the original model.
    pub id: BlockId,
    /// Its text tokens.
    pub txt: StreamStats,
    /// Its image tokens.
    pub img: StreamStats,
}

impl BlockStats {
    /// Scalar sums of both streams.
    pub fn moments(&self) -> Moments {
        let mut all = self.txt.moments();
        all.add(&self.img.moments());
        all
    }
}

/// Gathers statistics of every original block: an [`Observer`] for calibration passes.
#[derive(Clone, Debug)]
pub struct CalibrationStats {
    /// One entry for each original block, in network order.
    pub blocks: Vec<BlockStats>,
    /// Blocks whose products are gathered; of others only scalars.
    products: BTreeSet<BlockId>,
    rows: TokenSubset,
    pending: Pending,
}

impl CalibrationStats {
    /// Empty sums for the original blocks of `layout`; with `products` what fits need, otherwise scalars only.
    pub fn new(layout: &[BlockSpec], products: bool) -> Self {
        let ids = layout.iter().filter_map(|spec| match spec {
            BlockSpec::Original(id) => Some(*id),
            BlockSpec::Replaced(_) => None,
        });
        let ids: Vec<BlockId> = ids.collect();
        let blocks = ids.iter().map(|id| BlockStats {
            id: *id,
            txt: StreamStats::default(),
            img: StreamStats::default(),
        });
        Self {
            blocks: blocks.collect(),
            products: ids.iter().copied().filter(|_| products).collect(),
            rows: TokenSubset::default(),
            pending: Pending::default(),
        }
    }

    /// Gathers products of `blocks` only.
    #[must_use]
    pub fn with_products_of(mut self, blocks: impl IntoIterator<Item = BlockId>) -> Self {
        self.products = blocks.into_iter().collect();
        self
    }

    /// Takes at most `limit` tokens of each stream into the products of one forward.
    #[must_use]
    pub fn with_tokens_per_forward(mut self, limit: Option<usize>) -> Self {
        self.rows.limit = limit;
        self
    }

    /// Numbers the forwards from here on, for a choice of tokens that does not depend on how the work is divided.
    pub fn start_forward(&mut self, index: u64) {
        self.rows.forward = index;
    }

    /// The statistics of one block.
    pub fn get(&self, id: BlockId) -> Option<&BlockStats> {
        self.blocks.iter().find(|block| block.id == id)
    }

    /// Adds what a GPU still has of the last forward; to be called behind it, before anything is looked at.
    ///
    /// # Errors
    /// When activations are NaN or infinite (the message names the block).
    pub fn settle(&mut self) -> Result<()> {
        let (times, known) = self.pending.read()?;
        for share in known {
            let Place { id, txt } = share.place;
            let Some(block) = self.blocks.iter_mut().find(|block| block.id == id) else {
                continue;
            };
            let stream = if txt { &mut block.txt } else { &mut block.img };
            let counted = stream.count(&share.samples, share.tokens, &times);
            counted.with_context(|| format!("block {id}"))?;
            if let Some(gram) = &mut stream.gram {
                gram.target_sq += share.target_sq;
            }
        }
        Ok(())
    }

    /// Adds the tokens `x` → `y` of a stream, if a GPU does so without being waited for.
    fn add_on_gpu(
        &mut self,
        place: Place,
        x: &Tensor,
        y: &Tensor,
        timestep: &Tensor,
    ) -> Result<bool> {
        let Some(mut share) = Share::new(x, y)? else {
            return Ok(false);
        };
        let Some(block) = self.blocks.iter_mut().find(|b| b.id == place.id) else {
            return Ok(true);
        };
        let stream = if place.txt {
            &mut block.txt
        } else {
            &mut block.img
        };
        if self.products.contains(&place.id) {
            let chosen = self.rows.indices(x.dim(0)? * x.dim(1)?);
            if !share.multiply(stream, x, y, chosen)? {
                return Ok(false);
            }
        }
        self.pending.push(timestep, place, share);
        Ok(true)
    }

    /// Adds the tokens `x` → `y`, both (batch, tokens, d), of a stream at `timestep`, (batch).
    pub(super) fn add_tokens(
        &mut self,
        place: Place,
        x: &Tensor,
        y: &Tensor,
        timestep: &Tensor,
    ) -> Result<()> {
        if self.add_on_gpu(place, x, y, timestep)? {
            return Ok(());
        }
        let Place { id, txt } = place;
        let Some(block) = self.blocks.iter_mut().find(|block| block.id == id) else {
            return Ok(());
        };
        let stream = if txt { &mut block.txt } else { &mut block.img };
        stream.see(x, y, &timestep.to_dtype(DType::F32)?.to_vec1::<f32>()?)?;
        if self.products.contains(&id) {
            stream.multiply(x, y, self.rows)?;
        }
        Ok(())
    }

    /// Drops all products and keeps the scalars.
    pub fn forget_products(&mut self) {
        for block in &mut self.blocks {
            for stream in [&mut block.txt, &mut block.img] {
                (stream.gram, stream.waiting) = (None, None);
            }
        }
    }

    /// Fewest tokens in the products of any stream of any block, 0 if none were gathered.
    pub fn fewest_rows(&self) -> f64 {
        let blocks = self.blocks.iter().filter(|b| self.products.contains(&b.id));
        let rows = blocks.flat_map(|b| [b.txt.rows, b.img.rows]);
        rows.reduce(f64::min).unwrap_or(0.0)
    }

    /// Adds another share of the same sums.
    ///
    /// # Errors
    /// When they are of other blocks or widths.
    pub fn add(&mut self, other: Self) -> Result<()> {
        if self.blocks.len() != other.blocks.len() {
            bail!(
                "statistics of {} and of {} blocks",
                self.blocks.len(),
                other.blocks.len()
            );
        }
        for (sum, share) in self.blocks.iter_mut().zip(other.blocks) {
            if sum.id != share.id {
                bail!("statistics of {} and of {}", sum.id, share.id);
            }
            sum.txt.add(share.txt)?;
            sum.img.add(share.img)?;
        }
        Ok(())
    }
}

impl Observer for CalibrationStats {
    fn block(
        &mut self,
        index: usize,
        spec: &BlockSpec,
        conditioning: &Conditioning,
        input: &Stream,
        output: &Stream,
    ) -> candle::Result<()> {
        if index == 0 {
            self.rows.forward += 1; // other tokens than in the forward before
        }
        let BlockSpec::Original(id) = spec else {
            return Ok(());
        };
        let timestep = &conditioning.timestep;
        let mut add = || {
            if self.pending.is_of_another(timestep) {
                self.settle()?;
            }
            for (txt, x, y) in [
                (true, input.txt()?, output.txt()?),
                (false, input.img()?, output.img()?),
            ] {
                let added = self.add_tokens(Place { id: *id, txt }, &x, &y, timestep);
                added.with_context(|| format!("block {id}"))?;
            }
            Ok(())
        };
        add().map_err(|e: anyhow::Error| candle::Error::Msg(format!("{e:#}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_noise_levels() {
        assert_eq!([0.0, 0.05, 0.1, 0.95, 1.0].map(bucket), [0, 0, 1, 9, 9]);
    }
}
