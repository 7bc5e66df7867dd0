//! The streams of one batch on their way through both models, and which of their tokens count. `sequential` fits.

use anyhow::Result;
use candle::{Device, Tensor};

use super::stream_store::{Place, StreamStore};
use crate::{
    calibrate::subsample,
    model::{Conditioning, Stream},
};

/// The streams of one batch, both just before the block at hand.
pub(super) struct PairedActivations {
    original: Place,
    /// `None` until something is replaced: the same as the original's.
    pruned: Option<Place>,
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
    /// The tokens of `x` (b, n, …) that sums are made of; all if `None`.
    pub(super) fn tokens(&self, x: &Tensor) -> Result<Option<Tensor>> {
        subsample::from_samples(x.dim(0)?, x.dim(1)?, self.limit, self.batch, x.device())
    }
}

impl PairedActivations {
    /// Both models' `stream` before the first block.
    ///
    /// # Errors
    /// When there is no room for it.
    pub(super) fn new(
        store: &mut StreamStore,
        stream: &Stream,
        conditioning: Conditioning,
        rows: FitSplit,
    ) -> Result<Self> {
        Ok(Self {
            original: store.put(stream)?,
            pruned: None,
            conditioning,
            rows,
        })
    }

    /// Both streams, the original's first, on the device; one tensor until something is replaced.
    pub(super) fn load(
        &self,
        store: &mut StreamStore,
        device: &Device,
    ) -> Result<(Stream, Stream)> {
        let original = store.load(&self.original, device)?;
        let pruned = match &self.pruned {
            Some(pruned) => store.load(pruned, device)?,
            None => original.clone(),
        };
        Ok((original, pruned))
    }

    /// The pruned model's stream alone.
    pub(super) fn load_pruned(&self, store: &mut StreamStore, device: &Device) -> Result<Stream> {
        store.load(self.pruned.as_ref().unwrap_or(&self.original), device)
    }

    /// Puts both back.
    pub(super) fn store(
        &mut self,
        store: &mut StreamStore,
        original: &Stream,
        pruned: &Stream,
    ) -> Result<()> {
        // before the original's place is taken
        if self.pruned.is_some() || original.tokens.id() != pruned.tokens.id() {
            self.store_pruned(store, pruned)?;
        }
        store.replace(&mut self.original, original)
    }

    /// Puts the pruned model's stream back.
    pub(super) fn store_pruned(&mut self, store: &mut StreamStore, pruned: &Stream) -> Result<()> {
        match &mut self.pruned {
            Some(place) => store.replace(place, pruned),
            None => {
                self.pruned = Some(store.put(pruned)?);
                Ok(())
            }
        }
    }
}
