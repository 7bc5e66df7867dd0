//! Given images with captions: read from a folder, encoded to latents.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle::{Device, Tensor};

use crate::{
    device::Runtime,
    pipeline::{Pipeline, load},
    sample::{encoded::References, image, latents, size::ImageSize},
    ui,
};

/// The images of a folder in the order of their names, with the captions next to them.
pub(super) fn captioned(folder: &Path) -> Result<(Vec<String>, Vec<PathBuf>)> {
    let name = folder.display();
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("--images: cannot read `{name}`"))?;
    let mut images = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("--images: cannot read `{name}`"))?
            .path();
        let ending = path.extension().and_then(|e| e.to_str());
        let ending = ending.map(str::to_ascii_lowercase).unwrap_or_default();
        if image::EXTENSIONS.contains(&ending.as_str()) {
            images.push(path);
        }
    }
    ensure!(
        !images.is_empty(),
        "--images: `{name}` holds no image ({})",
        image::EXTENSIONS.join(", ")
    );
    images.sort();
    let caption = |path: &PathBuf| -> Result<String> {
        let text = path.with_extension("txt");
        let caption = crate::files::read_small(&text, 1 << 20).with_context(|| {
            format!(
                "--images: `{}` has no caption: cannot read `{}`",
                path.display(),
                text.display()
            )
        })?;
        let caption = String::from_utf8(caption)
            .ok()
            .with_context(|| format!("--images: `{}` is not UTF-8 text", text.display()))?;
        Ok(caption.trim().to_owned())
    };
    let captions = images.iter().map(caption).collect::<Result<_>>()?;
    Ok((captions, images))
}

/// Reference images of `prompts` prompts, at the size of the images themselves: one for each, from the first again if
/// there are fewer.
pub(super) fn references(
    pipeline: &Pipeline,
    runtime: &Runtime,
    size: ImageSize,
    paths: &[PathBuf],
    prompts: usize,
) -> Result<References> {
    let each = encode_as("--image", pipeline, runtime, size, paths)?;
    let turns: Vec<u32> = (0..prompts).map(|i| (i % paths.len()) as u32).collect();
    let family = pipeline.config.family;
    let latent = size.latent(family);
    let (number, axes) = (family.reference_step, family.position_axes);
    Ok(References {
        tokens: each.index_select(&Tensor::new(turns, &Device::Cpu)?, 0)?,
        ids: latents::img_ids(number, latent.height, latent.width, axes, &Device::Cpu)?,
    })
}

/// Image files → packed latents (images, tokens, 4 · channels), f32 on the CPU; one image in memory at a time.
pub(super) fn encode(
    pipeline: &Pipeline,
    runtime: &Runtime,
    size: ImageSize,
    images: &[PathBuf],
) -> Result<Tensor> {
    encode_as("--images", pipeline, runtime, size, images)
}

/// The same of images that `flag` names.
fn encode_as(
    flag: &'static str,
    pipeline: &Pipeline,
    runtime: &Runtime,
    size: ImageSize,
    images: &[PathBuf],
) -> Result<Tensor> {
    let vae = load::vae(&pipeline.vae_files()?, runtime)?;
    let progress = pipeline.reporter.progress(images.len(), "encoding images");
    let mut out = Vec::new();
    for path in images {
        let image = image::read(path).context(flag)?;
        let image = image::covering(&image, size.width, size.height)?.unsqueeze(0)?;
        let image = image.to_device(&runtime.device)?;
        let latents = vae.encode(&image.to_dtype(runtime.dtype)?)?;
        let packed = latents::pack(&latents.to_dtype(candle::DType::F32)?)?;
        out.push(packed.to_device(&candle::Device::Cpu)?);
        progress.inc(1);
    }
    pipeline.reporter.done(
        &progress,
        format!("encoded {}", ui::counted(images.len(), "image")),
    );
    Ok(Tensor::cat(&out, 0)?)
}
