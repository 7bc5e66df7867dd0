//! Statistics of blocks behind a trunk of which some are replaced: its activations are the inputs, the original's the
//! targets.

use anyhow::Result;
use indicatif::ProgressBar;

use super::{noised::NoisedLatents, stats::CalibrationStats};
use crate::{
    device::Runtime,
    model::{Block, Conditioning, Flux, Observer, Stream, Trunk},
};

/// Adds to `stats` what blocks look like behind `pruned`, a trunk of which some entries are replaced: its activations are
/// the inputs and the original's the targets.
///
/// # Errors
/// When a forward fails or activations are NaN or infinite (the message names the block).
pub fn gather_behind(
    flux: &Flux,
    pruned: &Trunk,
    mut stats: CalibrationStats,
    noised: &NoisedLatents,
    batch: usize,
    runtime: &Runtime,
    progress: &ProgressBar,
) -> Result<CalibrationStats> {
    for (forward, range) in noised.batches(batch).enumerate() {
        stats.start_forward(2 * forward as u64); // the first entry, if it is kept, counts one on
        let batch = noised.batch(range, &runtime.device, runtime.dtype)?;
        let (stream, conditioning) = flux.embed(&batch.inputs())?;
        pairs(flux, pruned, stream, &conditioning, &mut stats)?;
        progress.inc(1);
    }
    stats.settle()?;
    Ok(stats)
}

/// One batch through both trunks at once; a replaced entry counts for nothing.
fn pairs(
    flux: &Flux,
    pruned: &Trunk,
    stream: Stream,
    conditioning: &Conditioning,
    stats: &mut CalibrationStats,
) -> Result<()> {
    let (mut original, mut student) = (stream.clone(), stream);
    for (index, (spec, _)) in flux.trunk.entries().iter().enumerate() {
        let step = index..index + 1;
        original = flux
            .trunk
            .forward_range(step.clone(), &original, conditioning, &mut ())?;
        let replaced = matches!(
            pruned.entries().get(index),
            Some((_, Block::Replacement(_)))
        );
        if !replaced {
            stats.block(index, spec, conditioning, &student, &original)?;
        }
        student = pruned.forward_range(step, &student, conditioning, &mut ())?;
    }
    Ok(())
}
