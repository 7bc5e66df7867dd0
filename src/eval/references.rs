//! What each number of a report is computed as, and the implementation that the same values were compared with.

use super::report::{MetricReference, Settings};

/// Every number of a report with these settings; `scenes`: whether prompts are captions whose images can be read.
pub(super) fn of_settings(settings: &Settings, scenes: bool) -> Vec<MetricReference> {
    let mut out = vec![
        (
            "velocity error",
            "fastflux itself: ‖v − v₀‖² / ‖v₀‖² over all noised latents, v and v₀ being what diffusers' FluxTransformer2DModel or Flux2Transformer2DModel returns".to_owned(),
        ),
        ("latent MSE", "torch.nn.functional.mse_loss of the packed latents".to_owned()),
        (
            "PSNR",
            "skimage.metrics.peak_signal_noise_ratio(data_range=255); equal images count as 120 dB".to_owned(),
        ),
        (
            "SSIM",
            "skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)".to_owned(),
        ),
    ];
    if scenes {
        out.push((
            "prompts followed",
            "scripts/scenes.py of fastflux; the intervals are Wilson's score intervals".to_owned(),
        ));
    }
    if let Some(clip) = &settings.clip {
        out.push((
            "CLIP score",
            format!("transformers.CLIPModel and CLIPImageProcessor (Pillow) with {clip}: 100 · cosine of image_embeds and text_embeds"),
        ));
    }
    if let Some(lpips) = &settings.lpips {
        out.push((
            "LPIPS",
            format!("lpips.LPIPS of the package lpips 0.1.4, version=\"0.1\", with {lpips}"),
        ));
    }
    let named = out.into_iter();
    named
        .map(|(metric, reference)| MetricReference { metric, reference })
        .collect()
}
