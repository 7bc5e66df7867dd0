//! Reference images: at which size a model sees them, and where their tokens stand. `vae` encodes them.
//!
//! Sources: [diffusers `Flux2KleinPipeline`][klein] and `Flux2ImageProcessor`; [`FluxKontextPipeline`][kontext].
//!
//! [klein]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux2/pipeline_flux2_klein.py
//! [kontext]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux/pipeline_flux_kontext.py

use anyhow::{Result, ensure};
use candle::{Device, Tensor};

use super::{
    encoded::References,
    image::{cropped, resized},
    latents,
    png::Image,
    size::ImageSize,
    vae::Vae,
};
use crate::layout::{Family, TextModel};

/// Pixels of a token's side.
const STEP: u32 = ImageSize::STEP as u32;
/// Pixels of the largest reference image that FLUX.2 sees.
const MAX_AREA: u64 = 1 << 20;
/// Shortest side, and how much longer the other may be.
const MIN_SIDE: u32 = 64;
const MAX_ASPECT: u32 = 8;
/// The sizes that FLUX.1 Kontext was trained on.
const KONTEXT: [(u32, u32); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];

/// The image at the size that a model of `family` sees it in.
///
/// # Errors
/// When it is too small or too narrow for FLUX.2.
pub fn prepared(image: &Image, family: &Family) -> Result<Image> {
    let (width, height) = (image.width, image.height);
    if family.text == TextModel::ClipAndT5 {
        ensure!(width > 0 && height > 0, "the image is empty");
        // diffusers takes the sides in whole tokens
        let whole = |side: u32| f64::from((side / STEP).max(1));
        let aspect = whole(width) / whole(height);
        let off = |(w, h): &(u32, u32)| (aspect - f64::from(*w) / f64::from(*h)).abs();
        let closest = KONTEXT.iter().min_by(|a, b| off(a).total_cmp(&off(b)));
        let (width, height) = closest.copied().unwrap_or((1024, 1024));
        return resized(image, width, height);
    }
    ensure!(
        width.min(height) >= MIN_SIDE,
        "the image is {width}×{height}: both sides of a reference image must have at least {MIN_SIDE} pixels"
    );
    ensure!(
        width.max(height) <= MAX_ASPECT * width.min(height),
        "the image is {width}×{height}: no side of a reference image may be more than {MAX_ASPECT} times as long as the other"
    );
    let area = u64::from(width) * u64::from(height);
    let image = if area > MAX_AREA {
        let scale = (MAX_AREA as f64 / area as f64).sqrt();
        let side = |side: u32| (f64::from(side) * scale) as u32;
        resized(image, side(width), side(height))?
    } else {
        image.clone()
    };
    let whole = |side: u32| side / STEP * STEP;
    cropped(&image, whole(image.width), whole(image.height))
}

/// Prepared images → their tokens for one prompt, (1, tokens, 4 · channels), and positions.
///
/// # Errors
/// When the VAE holds no encoder, or memory is short.
pub fn encode(vae: &Vae, images: &[Image], family: &Family, device: &Device) -> Result<References> {
    let (mut tokens, mut ids) = (Vec::new(), Vec::new());
    for (i, image) in images.iter().enumerate() {
        let pixels = image.to_tensor()?.unsqueeze(0)?.to_device(device)?;
        let latents = vae.encode(&pixels)?.to_device(&Device::Cpu)?;
        let (_, _, h, w) = latents.dims4()?;
        let number = family.reference_step * (i + 1);
        let axes = family.position_axes;
        ids.push(latents::img_ids(number, h, w, axes, &Device::Cpu)?);
        tokens.push(latents::pack(&latents)?);
    }
    Ok(References {
        tokens: Tensor::cat(&tokens, 1)?,
        ids: Tensor::cat(&ids, 0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: u32, height: u32) -> Image {
        Image {
            width,
            height,
            rgb: vec![90; (3 * width * height) as usize],
        }
    }

    #[test]
    fn images_get_the_sizes_that_diffusers_gives_them() {
        let size = |w, h, family: &Family| {
            let image = prepared(&image(w, h), family).unwrap();
            (image.width, image.height)
        };
        assert_eq!(size(96, 64, &Family::FLUX2), (96, 64));
        assert_eq!(size(111, 79, &Family::FLUX2), (96, 64));
        // int(2000 · √(1024² / 2400000)) = 1321, int(1200 · …) = 793
        assert_eq!(size(2000, 1200, &Family::FLUX2), (1312, 784));
        assert_eq!(size(300, 300, &Family::FLUX1), (1024, 1024));
        assert_eq!(size(64, 192, &Family::FLUX1), (672, 1568));
        // 6 tokens by 4, not 100 pixels by 72
        assert_eq!(size(100, 72, &Family::FLUX1), (1248, 832));
    }

    #[test]
    fn images_that_diffusers_refuses_are_refused() {
        for (w, h, word) in [(63, 200, "64 pixels"), (600, 70, "8 times")] {
            let error = prepared(&image(w, h), &Family::FLUX2).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn the_middle_is_kept() {
        let mut wide = image(82, 64);
        // a white column where diffusers' crop of 80 begins
        for row in 0..64 {
            let at = 3 * (row * 82 + 1);
            wide.rgb[at..at + 3].fill(255);
        }
        let cut = prepared(&wide, &Family::FLUX2).unwrap();
        assert_eq!((cut.width, &cut.rgb[..3]), (80, &[255; 3][..]));
    }
}
