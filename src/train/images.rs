//! The teacher's own images, which are trained on: sampled once, and kept next to a run so that it can resume.

use std::path::Path;

use anyhow::{Context, Result};
use candle::{Device, Tensor};
use serde_json::json;

use super::{data::Images, setup::TrainSetup, state::IMAGES_STEM, strategy::MemoryStrategy};
use crate::{
    calibrate::{self, NoiseLevels},
    checkpoint::{Checkpoint, Source, save, with_hint},
    files::Files,
    model::Flux,
    pipeline::load,
    sample::{
        denoise::{Denoise, Encoded},
        schedule::Schedule,
        size::TOKENS_PER_FORWARD,
    },
    ui,
};

/// From the run's seed to that of the noise of its first image. Calibration takes `seed`, `seed + 1`, … for the same
/// lists of prompts: without a distance the held-out images of training could be those that `prune` was fitted to.
/// Only the lower 32 bits of a seed count in drawing noise, so this is as far as two seeds can be apart.
const NOISE_OF_TRAINING: u64 = 1 << 31;
/// The metadata key of what the teacher's images depend on.
const IMAGES_KEY: &str = "fastflux-images";

/// The teacher and its images of all prompts: as saved in `folder` by a run of the same settings, or sampled and saved
/// there.
pub(super) fn sample_or_load(
    folder: &Path,
    setup: &TrainSetup,
    strategy: MemoryStrategy,
) -> Result<(Flux, Images)> {
    let TrainSetup {
        pair,
        options,
        runtime,
        ..
    } = setup;
    let plan = strategy.offload.then(|| setup.offload_plan(strategy));
    let flux = || pair.flux(plan.as_ref(), runtime);
    let data = &options.recipe.data;
    let guidance = data.guidance.context("guidance is resolved")?;
    let steps = data.steps.context("steps are resolved")?;
    let levels = NoiseLevels::of_model(&pair.teacher, options.size, steps)?;
    let latent = options.size.latent(pair.teacher.config.family);
    let new = |latents: Tensor, prompts: Encoded| {
        let images = Images::new(latents, prompts, latent, guidance, runtime)?;
        anyhow::Ok(images.with_levels(levels.clone()))
    };
    let seed = seed_of_images(options.recipe.seed);
    // what the images depend on, and nothing else
    let key = json!({
        "teacher": pair.fingerprints[1],
        "prompts": options.prompts_hash(),
        "runtime": runtime.to_string(),
        "seed": seed,
        "steps": data.steps,
        "guidance": guidance,
        "size": [options.size.width, options.size.height],
    })
    .to_string();
    let files = Files::folder(folder);
    let path = folder.join(format!("{IMAGES_STEM}.safetensors"));
    if path.exists()
        && let Some(found) = with_hint(
            Checkpoint::open_if_present(&files, IMAGES_STEM),
            "delete the file to sample the images again, or start over with --restart",
        )?
        && found.metadata.get(IMAGES_KEY) == Some(&key)
    {
        let tensor = |name: &str| -> Result<Tensor> {
            Ok(found.expect(name)?.tensor(&Device::Cpu)?.copy()?)
        };
        let prompts = Encoded::new(tensor("txt")?, tensor("vec")?);
        return Ok((flux()?, new(tensor("latents")?, prompts)?));
    }
    let teacher = &pair.teacher;
    let encoded = load::encode_prompts(teacher, &options.prompts, None, runtime)?;
    let flux = flux()?;
    let schedule: Schedule = load::schedule(teacher)?;
    let denoise = Denoise {
        flux: &flux,
        dtype: runtime.dtype,
        device: &runtime.device,
        schedule: &schedule,
        steps,
        guidance,
        cfg_scale: teacher.cfg_scale(guidance),
        size: latent,
    };
    let tokens = options.size.tokens() + encoded.txt.dim(1)?;
    let batch = (TOKENS_PER_FORWARD / tokens).max(1);
    let progress = setup
        .pair
        .pruned
        .reporter
        .progress(encoded.len().div_ceil(batch) * denoise.steps, "sampling");
    let channels = teacher.config.out_channels / 4;
    let latents = calibrate::sample(
        &denoise,
        &encoded,
        channels,
        batch,
        strategy.batches_per_load,
        seed,
        &progress,
    )?;
    setup.pair.pruned.reporter.done(
        &progress,
        format!("sampled {}", ui::counted(encoded.len(), "image")),
    );
    let mut checkpoint = Checkpoint::default();
    for (name, tensor) in [
        ("latents", &latents),
        ("txt", &encoded.txt),
        ("vec", &encoded.vec),
    ] {
        checkpoint.insert(name, Source::dense(&tensor.to_device(&Device::Cpu)?)?);
    }
    checkpoint.metadata.insert(IMAGES_KEY.to_owned(), key);
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create `{}`", folder.display()))?;
    save::write(&checkpoint, &path)?;
    Ok((flux, new(latents, encoded)?))
}

/// The seed of the first image's noise; image i has that of `+ i`.
fn seed_of_images(seed: u64) -> u64 {
    seed.wrapping_add(NOISE_OF_TRAINING)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::noise::Generator;

    #[test]
    fn images_of_training_are_not_those_of_calibration() -> Result<()> {
        let noise = |seed| -> Result<Vec<f32>> {
            Ok(Generator::new(seed).randn(8, &Device::Cpu)?.to_vec1()?)
        };
        for seed in [0, 7, (1 << 31) - 1, u64::from(u32::MAX), u64::MAX] {
            let ours = noise(seed_of_images(seed))?;
            // either list may be longer than the other
            for image in [0, 1, 639, 100_000] {
                let other = |from: u64| noise(from.wrapping_add(image));
                assert_ne!(ours, other(seed)?, "{seed} {image}");
                let later = seed_of_images(seed).wrapping_add(image);
                assert_ne!(noise(later)?, noise(seed)?, "{seed} {image}");
            }
            // what is compared would show it: a whole turn of 32 bits is the same noise
            assert_eq!(noise(seed)?, noise(seed.wrapping_add(1 << 32))?);
        }
        Ok(())
    }
}
