//! Prompts → images as packed latents, several batches at a time.

use std::ops::Range;

use anyhow::Result;
use candle::Tensor;
use indicatif::ProgressBar;

use crate::sample::denoise::{Denoise, Encoded, starting_noise};

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
    let all = 0..prompts.len();
    let images = sample_range(
        denoise,
        prompts,
        channels,
        batch,
        together,
        seed,
        all,
        progress,
        &mut |_| (),
    )?;
    Ok(Tensor::cat(&images, 0)?)
}

/// The same of the prompts of `range`, which begins with a whole batch: the images of each batch. `done` is given those of
/// the range so far, after each of them.
///
/// # Errors
/// As [`sample`].
#[expect(clippy::too_many_arguments, reason = "each is of another type")]
pub fn sample_range(
    denoise: &Denoise,
    prompts: &Encoded,
    channels: usize,
    batch: usize,
    together: usize,
    seed: u64,
    range: Range<usize>,
    progress: &ProgressBar,
    done: &mut dyn FnMut(&[Tensor]),
) -> Result<Vec<Tensor>> {
    let trunk = &denoise.flux.trunk;
    let stored = trunk.has_offloaded(0..trunk.len());
    let together = if stored { together.max(1) } else { 1 };
    let starts: Vec<usize> = range.clone().step_by(batch).collect();
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
        done(&images);
    }
    Ok(images)
}
