//! Prompts → images as packed latents, several batches at a time, and a check that names the first damaged block.

use anyhow::Result;
use candle::Tensor;
use indicatif::ProgressBar;

use crate::{
    layout::BlockSpec,
    model::{Conditioning, Observer, Stream, ops},
    sample::denoise::{Denoise, Encoded, starting_noise},
};

/// Samples one image for each prompt, `batch` at a time; packed latents (prompts, tokens, channels), f32, on the CPU.
///
/// Image i starts from the noise of seed `seed + i`, whatever the batch. If blocks are read whenever they are run,
/// `together` batches share each reading.
///
/// # Errors
/// When a forward fails or the latents become NaN or infinite.
pub fn sample(
    denoise: &Denoise,
    prompts: &Encoded,
    channels: usize,
    batch: usize,
    together: usize,
    seed: u64,
    progress: &ProgressBar,
) -> Result<Tensor> {
    let trunk = &denoise.flux.trunk;
    let stored = trunk.has_offloaded(0..trunk.len());
    let together = if stored { together.max(1) } else { 1 };
    let starts: Vec<usize> = (0..prompts.len()).step_by(batch).collect();
    let mut images = Vec::new();
    for some in starts.chunks(together) {
        let given = some.iter().map(|start| {
            let range = *start..(start + batch).min(prompts.len());
            let noise = range
                .clone()
                .map(|i| starting_noise(seed.wrapping_add(i as u64), 1, channels, denoise.size));
            let noise = Tensor::cat(&noise.collect::<Result<Vec<_>>>()?, 0)?;
            Ok((noise, prompts.range(range)?))
        });
        let given: Vec<(Tensor, Encoded)> = given.collect::<Result<_>>()?;
        for latents in denoise.run_each(&given, &mut || progress.inc(1))? {
            images.push(latents.to_device(&candle::Device::Cpu)?);
        }
    }
    Ok(Tensor::cat(&images, 0)?)
}

/// Fails at the first block whose output is NaN or infinite, and names it.
#[derive(Debug)]
pub(super) struct FiniteCheck;

impl Observer for FiniteCheck {
    fn block(
        &mut self,
        _: usize,
        spec: &BlockSpec,
        conditioning: &Conditioning,
        _: &Stream,
        output: &Stream,
    ) -> candle::Result<()> {
        let sum = ops::total(&output.tokens.to_dtype(candle::DType::F32)?)?;
        if !sum.to_scalar::<f32>()?.is_finite() {
            let times = conditioning.timestep.to_dtype(candle::DType::F32)?;
            let t = times.flatten_all()?.to_vec1::<f32>()?;
            let hint = match output.tokens.dtype() {
                candle::DType::F32 => "",
                _ => "try --dtype f32; if that does not help, ",
            };
            candle::bail!(
                "block {}: activations are NaN or infinite at timestep {:.3}\nhint: {hint}fetch the transformer's files again",
                spec.id(),
                t.first().copied().unwrap_or_default()
            );
        }
        Ok(())
    }
}
