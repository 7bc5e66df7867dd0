//! The streams of one batch on their way through both models, and which of their tokens count. `sequential` fits.

use anyhow::Result;
use candle::{Device, Tensor};

use crate::{
    calibrate::subsample,
    model::{Conditioning, Stream},
};

/// The streams of one batch, both just before the block at hand.
pub(super) struct PairedActivations {
    pub(super) original: Stream,
    pub(super) pruned: Stream,
    pub(super) conditioning: Conditioning,
    pub(super) rows: FitSplit,
}

/// Which rows of a batch go where.
pub(super) struct FitSplit {
    /// Samples to fit on, and those left out to choose the ridge.
    pub(super) parts: [Tensor; 2],
    /// Number of the batch.
    pub(super) batch: usize,
    /// Tokens of one forward that sums are made of.
    pub(super) limit: Option<usize>,
}

impl FitSplit {
    /// The parts that have samples, and whether they are left out.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&Tensor, bool)> {
        let parts = self.parts.iter().zip([false, true]);
        parts.filter(|(part, _)| part.elem_count() > 0)
    }

    /// The tokens of `x` (b, n, …) that sums are made of; all if `None`.
    pub(super) fn tokens(&self, x: &Tensor) -> Result<Option<Tensor>> {
        subsample::from_samples(x.dim(0)?, x.dim(1)?, self.limit, self.batch, x.device())
    }
}

impl PairedActivations {
    /// Both streams, the original's first, on the device.
    pub(super) fn load(&self, device: &Device) -> Result<(Stream, Stream)> {
        both(&self.original, &self.pruned, device)
    }

    /// Puts both where they wait.
    pub(super) fn store(
        &mut self,
        original: &Stream,
        pruned: &Stream,
        offload_device: &Device,
    ) -> Result<()> {
        (self.original, self.pruned) = both(original, pruned, offload_device)?;
        Ok(())
    }
}

/// Both on `device`; moved once if they are one stream, as they are until something is replaced.
fn both(original: &Stream, pruned: &Stream, device: &Device) -> Result<(Stream, Stream)> {
    let moved_original = moved(original, device)?;
    if original.tokens.id() == pruned.tokens.id() {
        return Ok((moved_original.clone(), moved_original));
    }
    Ok((moved_original, moved(pruned, device)?))
}

/// `stream` on `device`.
pub(super) fn moved(stream: &Stream, device: &Device) -> Result<Stream> {
    Ok(Stream {
        tokens: stream.tokens.to_device(device)?,
        txt_len: stream.txt_len,
    })
}
