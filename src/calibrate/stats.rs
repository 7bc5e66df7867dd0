//! The sums that every score and every least-squares fit follows from, gathered in one pass without storing
//! activations. `fit` solves with them.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use candle::{DType, Device, Tensor};

use super::{
    on_gpu::{Pending, Place, Share},
    subsample::TokenSubset,
    token_sums::{self, SampleSums},
};
use crate::{
    checkpoint::Source,
    fit::gram::{Gram, product_dtype, with_ones},
    layout::{BlockId, BlockSpec},
    model::{Conditioning, Observer, Stream},
};

/// Timestep buckets of the scalar sums: \[0, 0.1), \[0.1, 0.2), … of the noise level.
pub const BUCKETS: usize = 10;

/// The bucket of noise level `t`.
pub fn bucket(t: f32) -> usize {
    ((t * BUCKETS as f32) as usize).min(BUCKETS - 1)
}

/// Scalar sums over tokens of one stream of one block; x is the block's input, y its output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Number of tokens.
    pub tokens: f64,
    /// Σ ‖x‖².
    pub input_sq: f64,
    /// Σ ‖y − x‖².
    pub change_sq: f64,
    /// Σ cos(x, y).
    pub cosine: f64,
}

impl Moments {
    /// Adds another share of the same sums.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.input_sq += other.input_sq;
        self.change_sq += other.change_sq;
        self.cosine += other.cosine;
    }
}

/// A [`Gram`] that lies in a file and is read when it is needed: those of all blocks of a wide model take gigabytes.
#[derive(Clone, Debug)]
pub struct WaitingGram {
    /// ZᵀZ, (k, k).
    pub gram: Source,
    /// ZᵀR, (k, d).
    pub cross: Source,
    /// Σ ‖R‖².
    pub target_sq: f64,
}

impl WaitingGram {
    /// The sums over the rows of both, added up when they are read.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            gram: self.gram.plus(&other.gram)?,
            cross: self.cross.plus(&other.cross)?,
            target_sq: self.target_sq + other.target_sq,
        })
    }

    /// Reads it.
    ///
    /// # Errors
    /// When memory is short.
    pub fn read(&self, device: &Device) -> Result<Gram> {
        Ok(Gram {
            gram: self.gram.tensor(device)?,
            cross: self.cross.tensor(device)?,
            target_sq: self.target_sq,
        })
    }
}

/// Everything gathered of one stream (text or image tokens) of one block.
#[derive(Clone, Debug, Default)]
pub struct StreamStats {
    /// Scalar sums over all tokens, by [`bucket`] of their timestep.
    pub buckets: [Moments; BUCKETS],
    /// Sums for the fit; `None` until tokens were seen, or where only scalars were asked for.
    pub gram: Option<Gram>,
    /// The same where they have not been read from their file.
    pub waiting: Option<WaitingGram>,
    /// Tokens in [`Self::gram`]: all, or those that subsampling chose.
    pub rows: f64,
}

impl StreamStats {
    /// Scalar sums over all tokens, whatever their timestep.
    pub fn moments(&self) -> Moments {
        let mut all = Moments::default();
        self.buckets.iter().for_each(|share| all.add(share));
        all
    }

    /// Adds another share of the same sums.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (sum, share) in self.buckets.iter_mut().zip(&other.buckets) {
            sum.add(share);
        }
        self.rows += other.rows;
        if self.gram.is_none() && other.gram.is_none() {
            // both lie in files, and so does their sum
            self.waiting = match (self.waiting.take(), other.waiting) {
                (Some(sum), Some(share)) => Some(sum.plus(&share)?),
                (sum, share) => sum.or(share),
            };
            return Ok(());
        }
        let (sum, share) = (self.sums()?, other.sums()?);
        (self.gram, self.waiting) = (sum, None);
        share.map_or(Ok(()), |gram| gram.add_to(&mut self.gram))
    }

    /// Whether there are sums for the fit.
    pub fn has_sums(&self) -> bool {
        self.gram.is_some() || self.waiting.is_some()
    }

    /// The sums for the fit, read from their file where they wait there.
    ///
    /// # Errors
    /// When memory is short.
    pub fn sums(&self) -> Result<Option<Gram>> {
        match (&self.gram, &self.waiting) {
            (None, Some(waiting)) => waiting.read(&Device::Cpu).map(Some),
            (gram, _) => Ok(gram.clone()),
        }
    }

    /// Adds the tokens `x` → `y`, both (batch, tokens, d), of samples at `times`.
    fn see(&mut self, x: &Tensor, y: &Tensor, times: &[f32]) -> Result<()> {
        self.count(&token_sums::sample_sums(x, y)?, x.dim(1)?, times)
    }

    /// Adds the scalars of samples of `tokens` tokens each at `times`.
    fn count(&mut self, samples: &[SampleSums], tokens: usize, times: &[f32]) -> Result<()> {
        for ([input_sq, change_sq, cosine], t) in samples.iter().zip(times) {
            if !(input_sq.is_finite() && change_sq.is_finite()) {
                bail!("activations are NaN or infinite at timestep {t:.3}");
            }
            self.buckets[bucket(*t)].add(&Moments {
                tokens: tokens as f64,
                input_sq: *input_sq,
                change_sq: *change_sq,
                cosine: *cosine,
            });
        }
        Ok(())
    }

    /// Adds the products of the tokens `x` → `y`, both (batch, tokens, d), or of at most `limit` of them.
    fn multiply(&mut self, x: &Tensor, y: &Tensor, choice: TokenSubset) -> Result<()> {
        let width = x.dim(candle::D::Minus1)?;
        let product = product_dtype(x.device());
        let (x, y) = (x.reshape(((), width))?, y.reshape(((), width))?);
        let (x, y) = match choice.of(x.dim(0)?) {
            None => (x, y),
            Some(rows) => {
                let rows = Tensor::new(rows, x.device())?;
                (x.index_select(&rows, 0)?, y.index_select(&rows, 0)?)
            }
        };
        self.rows += x.dim(0)? as f64;
        let (x, y) = (x.to_dtype(product)?, y.to_dtype(product)?);
        Gram::of(&with_ones(&x)?, &(y - &x)?)?.add_to(&mut self.gram)
    }
}

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

    /// Adds the tokens `x` → `y` of a stream, where a GPU does so without being waited for.
    fn add_on_gpu(
        &mut self,
        place: Place,
        x: &Tensor,
        y: &Tensor,
        timestep: &Tensor,
    ) -> Result<bool> {
        let Some(mut share) = Share::of(x, y)? else {
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
            let chosen = self.rows.of(x.dim(0)? * x.dim(1)?);
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

    /// Fewest tokens in the products of any stream of any block, 0 where none were gathered.
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
