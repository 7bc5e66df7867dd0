//! Importance and statistics → a plan, fitted layers, and the pruned checkpoint.
//!
//! Choosing blocks is `score`'s business, running the model `calibrate`'s; files are written by `commands`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle::{DType, Device};
use indicatif::ProgressBar;

use crate::{
    calibrate::{states::States, stats::StreamStats},
    device::Runtime,
    layout::{BlockId, BlockSpec},
    model::{Block, Flux, Linear, ReplacementBlock, Stream},
};

pub mod apply;
pub mod fit;
pub mod plan;
pub mod recipe;

use apply::Layers;

/// The fitted layers as a block of the model.
///
/// # Errors
/// When they do not fit on the device.
pub fn block(layers: &Layers, device: &Device, dtype: DType) -> Result<Block> {
    let linear = |affine: &fit::Affine| -> Result<Linear> {
        let place = |t: &candle::Tensor| -> Result<candle::Tensor> {
            Ok(t.to_dtype(dtype)?.to_device(device)?)
        };
        Ok(Linear::new(
            place(&affine.weight)?,
            Some(place(&affine.bias)?),
        )?)
    };
    Ok(Block::Replacement(ReplacementBlock::Streams {
        txt: linear(&layers.txt)?,
        img: linear(&layers.img)?,
    }))
}

/// Fits the blocks `replace` in network order on the activations of the already pruned prefix; the target stays the
/// original's output, so errors of earlier layers are corrected by later ones instead of adding up.
///
/// # Errors
/// When a forward or a fit fails.
pub fn fit_sequentially(
    flux: &Flux,
    states: &States,
    batch: usize,
    replace: &[BlockId],
    ridge: f64,
    runtime: &Runtime,
    progress: &ProgressBar,
) -> Result<BTreeMap<BlockId, Layers>> {
    let mut out = BTreeMap::new();
    let mut trunk = flux.trunk.clone();
    let indices: Vec<(usize, BlockId)> = trunk
        .entries()
        .iter()
        .enumerate()
        .filter_map(|(index, (spec, _))| match spec {
            BlockSpec::Original(id) if replace.contains(id) => Some((index, *id)),
            _ => None,
        })
        .collect();
    // the streams of the original and of the pruned model, both just before block `at`
    let mut streams = Vec::new();
    for range in states.batches(batch) {
        let (stream, conditioning) = flux.embed(
            &states
                .batch(range, &runtime.device, runtime.dtype)?
                .inputs(),
        )?;
        streams.push((stream.clone(), stream, conditioning));
    }
    let mut at = 0;
    for (index, id) in indices {
        let (mut txt, mut img) = (StreamStats::default(), StreamStats::default());
        for (teacher, student, conditioning) in &mut streams {
            *teacher = flux
                .trunk
                .forward_range(at..index + 1, teacher, conditioning, &mut ())?;
            *student = trunk.forward_range(at..index, student, conditioning, &mut ())?;
            add(&mut txt, &mut img, student, teacher).with_context(|| format!("block {id}"))?;
            progress.inc(1);
        }
        let layers = Layers {
            txt: fit::fit(&txt, ridge)?,
            img: fit::fit(&img, ridge)?,
        };
        let block = block(&layers, &runtime.device, runtime.dtype)?;
        for (_, student, conditioning) in &mut streams {
            *student = block.forward(student, conditioning)?;
        }
        trunk = trunk.with_block(index, block)?;
        out.insert(id, layers);
        at = index + 1;
    }
    Ok(out)
}

fn add(
    txt: &mut StreamStats,
    img: &mut StreamStats,
    input: &Stream,
    output: &Stream,
) -> Result<()> {
    txt.add(&input.txt()?, &output.txt()?, true)?;
    img.add(&input.img()?, &output.img()?, true)
}
