//! The sums over the tokens of one stream of one block.

use anyhow::{Result, bail};
use candle::{Device, Tensor};

use super::{
    subsample::TokenSubset,
    token_sums::{self, SampleSums},
};
use crate::{
    checkpoint::Source,
    fit::{
        gram::{Gram, product_dtype, with_ones},
        running::from_rows,
    },
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
    /// Sums for the fit; `None` until tokens were seen, or if only scalars were asked for.
    pub gram: Option<Gram>,
    /// The same if they have not been read from their file.
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

    /// The sums for the fit, read from their file if they wait there.
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
    pub(super) fn see(&mut self, x: &Tensor, y: &Tensor, times: &[f32]) -> Result<()> {
        self.count(&token_sums::sample_sums(x, y)?, x.dim(1)?, times)
    }

    /// Adds the scalars of samples of `tokens` tokens each at `times`.
    pub(super) fn count(
        &mut self,
        samples: &[SampleSums],
        tokens: usize,
        times: &[f32],
    ) -> Result<()> {
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
    pub(super) fn multiply(&mut self, x: &Tensor, y: &Tensor, choice: TokenSubset) -> Result<()> {
        let width = x.dim(candle::D::Minus1)?;
        let product = product_dtype(x.device());
        let (x, y) = (x.reshape(((), width))?, y.reshape(((), width))?);
        let (x, y) = match choice.indices(x.dim(0)?) {
            None => (x, y),
            Some(rows) => {
                let rows = Tensor::new(rows, x.device())?;
                (x.index_select(&rows, 0)?, y.index_select(&rows, 0)?)
            }
        };
        self.rows += x.dim(0)? as f64;
        let (x, y) = (x.to_dtype(product)?, y.to_dtype(product)?);
        from_rows(&with_ones(&x)?, &(y - &x)?)?.add_to(&mut self.gram)
    }
}
