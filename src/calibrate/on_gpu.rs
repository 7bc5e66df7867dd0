//! Statistics on a GPU that multiplies 16-bit numbers: the host waits for it only at the end of a forward. Scalars stay on the
//! device until then; products add up there.

use anyhow::{Context, Result};
use candle::{DType, Tensor};

use super::sums::StreamStats;
use crate::{fit::gram::Gram, layout::BlockId, model::ops};

/// What the GPU has of one forward.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    /// The noise level of each sample, (batch).
    timestep: Option<Tensor>,
    shares: Vec<(Place, Share)>,
}

/// A stream of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) id: BlockId,
    pub(super) txt: bool,
}

/// Scalars of one stream of one block.
#[derive(Clone, Debug)]
pub(super) struct Share {
    tokens: usize,
    /// `SampleSums` of each sample, (batch, 3), f64.
    sums: Tensor,
    /// Σ ‖y − x‖² of the tokens that entered the products, if any did; of one number, f64.
    target_sq: Option<Tensor>,
}

/// A [`Share`] that has been read.
pub(super) struct Known {
    pub(super) place: Place,
    pub(super) tokens: usize,
    pub(super) samples: Vec<[f64; 3]>,
    pub(super) target_sq: f64,
}

impl Share {
    /// The scalars of the tokens `x` → `y`, both (batch, tokens, d). Nothing if another way has to be taken.
    pub(super) fn new(x: &Tensor, y: &Tensor) -> Result<Option<Self>> {
        let Some(each) = ops::token_sums(x, y)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            tokens: x.dim(1)?,
            sums: each.to_dtype(DType::F64)?.sum(2)?,
            target_sq: None,
        }))
    }

    /// Adds the products of the tokens `x` → `y` to `stats`: of all, or of the `chosen` rows. False if another way has
    /// to be taken, and nothing was added.
    pub(super) fn multiply(
        &mut self,
        stats: &mut StreamStats,
        x: &Tensor,
        y: &Tensor,
        chosen: Option<Vec<u32>>,
    ) -> Result<bool> {
        let (x, y, change) = match chosen {
            None => (x.clone(), y.clone(), self.sums.narrow(1, 1, 1)?),
            Some(rows) => {
                let rows = Tensor::new(rows, x.device())?;
                let pick = |t: &Tensor| t.flatten_to(1)?.index_select(&rows, 0)?.unsqueeze(0);
                let (x, y) = (pick(x)?, pick(y)?);
                let Some(share) = Self::new(&x, &y)? else {
                    return Ok(false);
                };
                (x, y, share.sums.narrow(1, 1, 1)?)
            }
        };
        let before = stats.gram.as_ref();
        let sums = before.map(|sums| (&sums.gram, &sums.cross));
        let Some((gram, cross)) = ops::add_products(&x, &y, sums)? else {
            return Ok(false);
        };
        stats.gram = Some(Gram {
            gram,
            cross,
            target_sq: before.map_or(0.0, |sums| sums.target_sq),
        });
        stats.rows += (x.dim(0)? * x.dim(1)?) as f64;
        self.target_sq = Some(change.contiguous()?.sum_all()?);
        Ok(true)
    }
}

impl Pending {
    /// Whether this is of a forward at other noise levels than `timestep`: every forward has a tensor of its own.
    pub(super) fn is_of_another(&self, timestep: &Tensor) -> bool {
        let own = self.timestep.as_ref();
        own.is_some_and(|own| own.id() != timestep.id())
    }

    pub(super) fn push(&mut self, timestep: &Tensor, place: Place, share: Share) {
        self.timestep = Some(timestep.clone());
        self.shares.push((place, share));
    }

    /// Waits for the GPU: the noise levels, and what there is. Nothing is left.
    pub(super) fn read(&mut self) -> Result<(Vec<f32>, Vec<Known>)> {
        let Self { timestep, shares } = std::mem::take(self);
        let Some(timestep) = timestep else {
            return Ok((vec![], vec![]));
        };
        let mut numbers = Vec::new();
        for (_, share) in &shares {
            numbers.push(share.sums.flatten_all()?);
            if let Some(target) = &share.target_sq {
                numbers.push(target.flatten_all()?);
            }
        }
        let numbers = Tensor::cat(&numbers, 0)?.to_vec1::<f64>()?;
        let mut numbers = numbers.into_iter();
        let mut next = || numbers.next().context("fewer sums than were asked for");
        let times = timestep.to_dtype(DType::F32)?.to_vec1()?;
        let mut known = Vec::new();
        for (place, share) in shares {
            let samples = times.iter().map(|_| Ok([next()?, next()?, next()?]));
            known.push(Known {
                place,
                tokens: share.tokens,
                samples: samples.collect::<Result<_>>()?,
                target_sq: share.target_sq.map_or(Ok(0.0), |_| next())?,
            });
        }
        Ok((times, known))
    }
}

#[cfg(test)]
mod tests;
