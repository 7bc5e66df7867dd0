//! Compares each model's image of a prompt with the baseline's, and with the prompt.

use anyhow::{Context, Result};
use candle::{DType, Tensor};

use super::{
    EvalOptions, metrics,
    metrics::Summary,
    report::{Pair, PairOfModel, TwoSeeds},
    scenes::{self, Scene},
};
use crate::sample::png::Image;

/// Numbers of each model's images, if they were measured.
type Scores<'a> = Option<&'a [Vec<f64>]>;

/// One pair for each prompt. `latents` (images, tokens, 4 · channels), `images` and `clip` scores are the baseline's and
/// then each model's; `lpips` are distances of the models' images.
pub(super) fn compare(
    options: &EvalOptions,
    latents: &[&Tensor],
    images: &[Vec<Image>],
    (clip, lpips): (Scores, Scores),
) -> Result<Vec<Pair>> {
    let (base_latents, latents) = latents.split_first().context("nothing was sampled")?;
    let (base, rest) = images.split_first().context("nothing was sampled")?;
    let latents: Vec<Vec<f64>> = latents
        .iter()
        .map(|latents| mean_squares(latents, base_latents))
        .collect::<Result<_>>()?;
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
                lpips: lpips.map(|all| all[model][i]),
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

/// The images of one model from two seeds: `latents` (images, tokens, 4 · channels), and the same prompts' `again`.
pub(super) fn two_seeds(
    latents: &Tensor,
    images: &[Image],
    again: &Tensor,
    images_again: &[Image],
) -> Result<TwoSeeds> {
    let first = latents.narrow(0, 0, images_again.len())?;
    let pairs = || images.iter().zip(images_again);
    let psnr: Vec<f64> = pairs()
        .map(|(a, b)| metrics::psnr(a, b))
        .collect::<Result<_>>()?;
    let ssim: Vec<f64> = pairs()
        .map(|(a, b)| metrics::ssim(a, b))
        .collect::<Result<_>>()?;
    Ok(TwoSeeds {
        prompts: images_again.len(),
        latent_mse: Summary::from_values(&mean_squares(again, &first)?),
        psnr: Summary::from_values(&psnr),
        ssim: Summary::from_values(&ssim),
        lpips: None,
    })
}

/// Mean squared difference of each image's latents, (images, tokens, 4 · channels).
fn mean_squares(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    let means = (a - b)?.sqr()?.flatten_from(1)?.mean(1)?;
    Ok(means.to_dtype(DType::F64)?.to_vec1()?)
}
