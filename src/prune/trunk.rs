//! A trunk in parts: the runs of blocks that a plan replaces, pieces that fit on the device, and the trunk with fitted
//! layers in place.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    device::Runtime,
    fit::layers::LayerMap,
    layout::Replacement,
    model::{Flux, ReplacementBlock, Trunk},
};

/// `range` in pieces that go through the batches one after another: a block that is not on the device alone, so that it
/// is read once for all of them, and what lies between such blocks together.
pub(super) fn pieces(trunk: &Trunk, range: Range<usize>) -> Vec<Range<usize>> {
    let stored = |index: usize| {
        trunk
            .entries()
            .get(index)
            .is_some_and(|(_, b)| b.is_offloaded())
    };
    let mut out: Vec<Range<usize>> = Vec::new();
    for index in range {
        match out.last_mut() {
            Some(last) if !stored(index) && !stored(last.end - 1) => last.end = index + 1,
            _ => out.push(index..index + 1),
        }
    }
    out
}

/// A part of `trunk` with its weights on the device.
pub(super) fn resident(trunk: &Trunk, range: Range<usize>) -> Result<Trunk> {
    let entries = trunk.entries().get(range).context("no such blocks")?.iter();
    let entries = entries.map(|(spec, block)| Ok((spec.clone(), block.resident()?)));
    Ok(Trunk::new(entries.collect::<Result<_>>()?))
}

/// The replacements in network order with the trunk entry each starts at.
pub(super) fn runs<'a>(
    trunk: &Trunk,
    replace: &'a [Replacement],
) -> Result<Vec<(usize, &'a Replacement)>> {
    let index = |id| trunk.entries().iter().position(|(spec, _)| spec.id() == id);
    let mut runs = Vec::new();
    for replacement in replace {
        let Some(first) = replacement.replaces.first().and_then(|id| index(*id)) else {
            bail!("the plan names a block that the model does not have");
        };
        for (offset, id) in replacement.replaces.iter().enumerate() {
            ensure!(
                index(*id) == Some(first + offset),
                "the plan replaces {} and {id} by one layer, but they are not neighbours",
                replacement.replaces[0]
            );
        }
        runs.push((first, replacement));
    }
    runs.sort_by_key(|(first, _)| *first);
    Ok(runs)
}

/// The model with fitted layers in place of their blocks; it shares all other weights.
///
/// # Errors
/// When a layer does not fit on the device.
pub(super) fn pruned(
    flux: &Flux,
    replace: &[Replacement],
    layers: &LayerMap,
    runtime: &Runtime,
) -> Result<Flux> {
    let mut out = flux.clone();
    for (first, replacement) in runs(&flux.trunk, replace)? {
        let fitted = replacement
            .replaces
            .first()
            .and_then(|id| layers.get(id))
            .context("a layer was not fitted")?;
        out.trunk = out
            .trunk
            .with_block(first, fitted.block(&runtime.device, runtime.dtype)?)?;
        for later in first + 1..first + replacement.replaces.len() {
            out.trunk = out
                .trunk
                .with_block(later, ReplacementBlock::Remove.into())?;
        }
    }
    Ok(out)
}
