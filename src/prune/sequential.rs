//! Fits every replacement of a plan, in network order, and then what is kept behind them.
//!
//! Sequentially (the default), each layer sees what the already pruned prefix puts out and aims at what the original
//! model has after the replaced blocks, so that later layers correct the errors of earlier ones; otherwise every layer
//! is fitted on the original's own activations. Output projections of kept blocks and head are always fitted on the
//! pruned model's activations, that of the block right ahead of a replaced one together with the layer (`ahead`).

mod ahead;
mod kept;

use std::ops::Range;

use anyhow::{Context, Result};
use candle::{DType, Device, Tensor};
use indicatif::ProgressBar;

use super::{
    activations::{FitSplit, PairedActivations},
    fitting::Fitting,
    projections::{self, OutputProjectionSums, OutputProjections, RefitProjections},
    replacement::Sums,
    stream_store::{Place, StreamStore},
    trunk::{pieces, resident, runs},
};
use crate::{
    calibrate::{noised::NoisedLatents, subsample},
    device::Runtime,
    fit::layers::LayerMap,
    layout::Replacement,
    model::{Block, Conditioning, Flux, Stream, Trunk},
};

/// What was fitted.
#[derive(Clone, Debug, Default)]
pub struct Fits {
    /// What stands for the replaced blocks.
    pub layers: LayerMap,
    /// New output projections of what is kept.
    pub output_projections: OutputProjections,
}

/// The noised latents of one image in eight are left out of a layer's fit to choose its ridge, and used after that.
const LEFT_OUT: u32 = 8;
/// Bytes of token streams that may stay on a device of its own memory in any case; more are held in the host's and visit
/// the device a batch at a time.
const ON_DEVICE: u64 = 2 << 30;

/// Where the original's streams are when a layer is fitted, seen from the blocks it replaces.
#[derive(Clone, Copy, PartialEq)]
enum Original {
    Before,
    Behind,
}

/// Both models on their way through the network.
struct SequentialFit<'a> {
    flux: &'a Flux,
    fitting: Fitting<'a>,
    runtime: &'a Runtime,
    batches: Vec<PairedActivations>,
    /// Where streams wait between blocks.
    store: StreamStore,
    /// What a replacement that looks at its inputs again has put there.
    inputs: Vec<Place>,
    /// The trunk entry ahead.
    at: usize,
    out: Fits,
    progress: &'a ProgressBar,
}

/// Fits `replace` on `noised`, and the outputs of what is kept as `fitting` says. Without replacements nothing is.
///
/// # Errors
/// When a replacement's blocks are not neighbours, activations are NaN or infinite, or a forward fails.
pub fn fit_layers(
    flux: &Flux,
    noised: &NoisedLatents,
    replace: &[Replacement],
    fitting: Fitting<'_>,
    runtime: &Runtime,
    progress: &ProgressBar,
) -> Result<Fits> {
    let runs = runs(&flux.trunk, replace)?;
    if runs.is_empty() {
        return Ok(Fits::default());
    }
    let mut fit = SequentialFit::new(flux, noised, fitting, runtime, progress)?;
    for (first, replacement) in runs {
        if ahead::is_refitted(&flux.trunk, &fitting, fit.at, first, replacement) {
            fit.to(first - 1)?;
            fit.ahead(replacement)?;
            fit.replace(replacement, Original::Behind)?;
        } else {
            fit.to(first)?;
            fit.replace(replacement, Original::Before)?;
        }
    }
    if fitting.refit_projections != RefitProjections::None {
        fit.to(flux.trunk.len())?;
        fit.head()?;
    }
    Ok(fit.out)
}

/// Steps of `progress` that [`fit_layers`] takes.
pub fn steps(
    trunk: &Trunk,
    batches: usize,
    replace: &[Replacement],
    fitting: &Fitting<'_>,
) -> usize {
    let runs = runs(trunk, replace).unwrap_or_default();
    let refit = fitting.refit_projections;
    let refits = |yes: bool, entries: usize| if yes { entries } else { 0 };
    let (mut at, mut passes) = (0, 0);
    for (first, replacement) in &runs {
        let ahead = ahead::is_refitted(trunk, fitting, at, *first, replacement);
        // behind the first replacement all that is kept is refitted
        passes += if at > 0 && refit == RefitProjections::All {
            first - at
        } else {
            refits(ahead, 1)
        };
        passes += 1 + refits(ahead, 1);
        at = first + replacement.replaces.len();
    }
    let replaced = !runs.is_empty();
    passes += refits(replaced && refit == RefitProjections::All, trunk.len() - at);
    (passes + refits(replaced && refit != RefitProjections::None, 1)) * batches
}

impl<'a> SequentialFit<'a> {
    fn new(
        flux: &'a Flux,
        noised: &NoisedLatents,
        fitting: Fitting<'a>,
        runtime: &'a Runtime,
        progress: &'a ProgressBar,
    ) -> Result<Self> {
        let mut batches: Vec<PairedActivations> = Vec::new();
        let mut store = StreamStore::new(Device::Cpu, Some(fitting.in_memory), fitting.scratch);
        for (index, range) in noised.batches(fitting.batch).enumerate() {
            let (mut fit, mut left_out) = (Vec::new(), Vec::new());
            for (sample, image) in (0u32..).zip(noised.images(range.clone())) {
                let part = if image % LEFT_OUT == LEFT_OUT - 1 {
                    &mut left_out
                } else {
                    &mut fit
                };
                part.push(sample);
            }
            let place = |samples: Vec<u32>| {
                let len = samples.len();
                let placed = Tensor::from_vec(samples, len, &Device::Cpu)?;
                // an empty one is looked at by its size only, and not every GPU has room for nothing
                if len == 0 {
                    return Ok(placed);
                }
                placed.to_device(&runtime.device)
            };
            let rows = FitSplit {
                parts: [place(fit)?, place(left_out)?],
                batch: index,
                limit: fitting.tokens,
            };
            let batch = noised.batch(range, &runtime.device, runtime.dtype)?;
            let (stream, mut conditioning) = flux.embed(&batch.inputs())?;
            if let Some(first) = batches.first() {
                // all images have one size: one table of megabytes for all batches
                conditioning.rope = first.conditioning.rope.clone();
            } else if !runtime.device.is_cpu() {
                let bytes = stream.tokens.elem_count() * stream.tokens.dtype().size_in_bytes();
                let all = 2 * bytes * noised.batches(fitting.batch).len();
                if all as u64 <= fitting.on_device.max(ON_DEVICE) {
                    store = StreamStore::new(runtime.device.clone(), None, fitting.scratch);
                }
            }
            batches.push(PairedActivations::new(
                &mut store,
                &stream,
                conditioning,
                rows,
            )?);
        }
        Ok(Self {
            flux,
            fitting,
            runtime,
            batches,
            store,
            inputs: Vec::new(),
            at: 0,
            out: Fits::default(),
            progress,
        })
    }

    /// Up to the trunk entry `index`, which is ahead.
    fn to(&mut self, index: usize) -> Result<()> {
        if self.fitting.refit_projections == RefitProjections::All && !self.out.layers.is_empty() {
            for kept in self.at..index {
                self.kept(kept, None)?;
            }
        } else {
            let trunk = &self.flux.trunk;
            for range in pieces(trunk, self.at..index) {
                let trunk = resident(trunk, range.clone())?;
                for batch in &mut self.batches {
                    let (original, pruned) = batch.load(&mut self.store, &self.runtime.device)?;
                    // the same stream until something is replaced
                    let run =
                        |s| trunk.forward_range(0..range.len(), s, &batch.conditioning, &mut ());
                    let after = run(&original)?;
                    let pruned = if self.out.layers.is_empty() {
                        after.clone()
                    } else {
                        run(&pruned)?
                    };
                    batch.store(&mut self.store, &after, &pruned)?;
                }
            }
        }
        self.at = index;
        Ok(())
    }

    /// Fits the layer of `replacement`, whose blocks are ahead, and goes behind them. `original` says where the original's
    /// streams are.
    fn replace(&mut self, replacement: &Replacement, original: Original) -> Result<()> {
        let (first, end) = (self.at, self.at + replacement.replaces.len());
        let id = *replacement
            .replaces
            .first()
            .context("a replacement of no block")?;
        let block = self.block(first)?;
        let mut sums = Sums::new(replacement, block)?;
        let run = match original {
            Original::Before => self.run(first..end)?,
            Original::Behind => Trunk::new(Vec::new()),
        };
        for (index, batch) in self.batches.iter_mut().enumerate() {
            let (before, pruned) = batch.load(&mut self.store, &self.runtime.device)?;
            let conditioning = &batch.conditioning;
            let after = run.forward_range(0..run.len(), &before, conditioning, &mut ())?;
            let input = if self.fitting.sequential {
                &pruned
            } else {
                &before
            };
            sums.add(input, &after, conditioning, &batch.rows)
                .with_context(|| format!("block {id}"))?;
            if sums.revisits() {
                match self.inputs.get_mut(index) {
                    Some(place) => self.store.replace(place, input)?,
                    None => self.inputs.push(self.store.put(input)?),
                }
            }
            batch.store(&mut self.store, &after, &pruned)?;
            self.progress.inc(1);
        }
        let mut revisit =
            |visit: &mut dyn FnMut(&Stream, &Conditioning, &FitSplit) -> Result<()>| {
                let mut pairs = self.inputs.iter().zip(&self.batches);
                pairs.try_for_each(|(input, batch)| {
                    let input = self.store.load(input, &self.runtime.device)?;
                    visit(&input, &batch.conditioning, &batch.rows)
                })
            };
        let layers = sums
            .solve(self.fitting.ridge, &mut revisit)
            .with_context(|| format!("block {id}"))?;
        self.pass(&layers.block(&self.runtime.device, self.runtime.dtype)?)?;
        self.out.layers.insert(id, layers);
        self.at = end;
        Ok(())
    }

    /// Fits the head's projection: the trunk is behind.
    fn head(&mut self) -> Result<()> {
        let mut flux = self.flux.clone();
        let linear = flux.head_linear_mut().clone();
        let mut sums = OutputProjectionSums::default();
        for batch in &self.batches {
            let (original, pruned) = batch.load(&mut self.store, &self.runtime.device)?;
            let wide = |t: Tensor| t.to_dtype(DType::F32);
            let velocity = wide(self.flux.head(&original, &batch.conditioning)?)?;
            let z = self.flux.head_input(&pruned, &batch.conditioning)?;
            let rest = (velocity - wide(linear.forward(&z)?)?)?;
            let chosen = batch.rows.tokens(&z)?;
            let take = |x: &Tensor| subsample::pick(x, None, chosen.as_ref());
            sums.add(&take(&z)?, &take(&rest)?, None, 1.0)
                .context("head")?;
            self.progress.inc(1);
        }
        let projection = sums.solve(&linear, self.fitting.ridge).context("head")?;
        self.out
            .output_projections
            .insert((None, projections::HEAD), projection);
        Ok(())
    }

    /// The original's entries `range`, on the device if they fit there together.
    fn run(&self, range: Range<usize>) -> Result<Trunk> {
        let trunk = &self.flux.trunk;
        match pieces(trunk, range.clone()).as_slice() {
            [one] => resident(trunk, one.clone()),
            // too many: read for each batch
            _ => Ok(Trunk::new(trunk.entries()[range].to_vec())),
        }
    }

    fn block(&self, index: usize) -> Result<&'a Block> {
        let entry = self.flux.trunk.entries().get(index);
        entry.map(|(_, block)| block).context("no such block")
    }

    /// The pruned model's streams through `block`.
    fn pass(&mut self, block: &Block) -> Result<()> {
        for batch in &mut self.batches {
            let pruned = batch.load_pruned(&mut self.store, &self.runtime.device)?;
            let pruned = block.forward(&pruned, &batch.conditioning)?;
            batch.store_pruned(&mut self.store, &pruned)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
