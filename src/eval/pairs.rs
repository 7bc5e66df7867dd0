//! Compares each model's image of a prompt with the baseline's, and with the prompt.

use anyhow::{Context, Result};
use candle::{DType, Tensor};

use super::{
    EvalOptions, metrics,
    report::{Pair, PairOfModel},
    scenes::{self, Scene},
};
use crate::sample::png::Image;

/// One pair for each prompt. `latents` (images, tokens, 4 · channels), `images` and `clip` scores are the baseline's and
/// then each model's.
pub(super) fn compare(
    options: &EvalOptions,
    latents: &[&Tensor],
    images: &[Vec<Image>],
    clip: Option<&[Vec<f64>]>,
) -> Result<Vec<Pair>> {
    let (base_latents, latents) = latents.split_first().context("nothing was sampled")?;
    let (base, rest) = images.split_first().context("nothing was sampled")?;
    let mean_squares = |latents: &&Tensor| -> Result<Vec<f64>> {
        let difference = (*latents - *base_latents)?;
        let means = difference.sqr()?.flatten_from(1)?.mean(1)?;
        Ok(means.to_dtype(DType::F64)?.to_vec1()?)
    };
    let latents: Vec<Vec<f64>> = latents.iter().map(mean_squares).collect::<Result<_>>()?;
    let mut out = Vec::new();
    for (i, prompt) in options.prompts.iter().enumerate() {
        // scenes are square; a caption of the grammar in another format is just a prompt
        let scene = Scene::parse(prompt).filter(|_| base[i].width == base[i].height);
        let judge = |image: &Image| {
            scene
                .as_ref()
                .map(|scene| scenes::judge(scene, image))
                .transpose()
        };
        let clip = |model: usize| clip.map(|all| all[model][i]);
        let mut models = Vec::new();
        for (model, (latents, images)) in latents.iter().zip(rest).enumerate() {
            models.push(PairOfModel {
                latent_mse: latents[i],
                psnr: metrics::psnr(&base[i], &images[i])?,
                ssim: metrics::ssim(&base[i], &images[i])?,
                verdict: judge(&images[i])?,
                clip: clip(model + 1),
            });
        }
        out.push(Pair {
            prompt: prompt.clone(),
            seed: options.seed.wrapping_add(i as u64),
            baseline: judge(&base[i])?,
            baseline_clip: clip(0),
            models,
        });
    }
    Ok(out)
}
