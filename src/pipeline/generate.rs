//! Prompts → latents of images, in batches that fit into memory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle::Tensor;
use serde::Serialize;

use super::{
    Pipeline, load,
    placement::{Activity, MemoryBudget},
};
use crate::sample::{
    denoise::{Denoise, Encoded, starting_noise},
    size::ImageSize,
};

/// Tokens in one forward: small images go through the model several at a time.
const TOKENS_PER_FORWARD: usize = 1024;

/// One image to generate.
#[derive(Clone, Debug, Serialize)]
pub struct ImageJob {
    /// The file.
    pub path: PathBuf,
    /// What is on it.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: u64,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; `None` for a model that takes none.
    pub guidance: Option<f64>,
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Which prompt of the list.
    #[serde(skip)]
    pub prompt_index: usize,
    /// Which image of the prompt: its place in the noise drawn from the seed.
    #[serde(rename = "image")]
    pub image_index: usize,
}

/// What `generate` made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    /// How the model is called.
    pub model: String,
    /// The images, in the order of the prompts.
    pub images: Vec<ImageJob>,
}

/// Loads the transformer, denoises all images in batches and frees it again; packed latents (jobs, tokens, 4 · channels).
///
/// # Errors
/// When the model takes images as input, does not fit into memory, or values become NaN or infinite.
pub fn latents(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    jobs: &[ImageJob],
    encoded: &Encoded,
    size: ImageSize,
) -> Result<Tensor> {
    let Some(first) = jobs.first() else {
        bail!("nothing to generate")
    };
    let tokens = size.tokens() + encoded.tokens();
    let default = TOKENS_PER_FORWARD / tokens;
    let batch = budget.batch(&pipeline.config, tokens, default.min(jobs.len()));
    let need = Activity {
        batch,
        tokens,
        extra_bytes: 0,
    };
    let flux = budget.flux(pipeline, need)?;
    let schedule = load::schedule(pipeline)?;
    let denoise = Denoise {
        flux: &flux,
        dtype: budget.runtime().dtype,
        device: &budget.runtime().device,
        schedule: &schedule,
        steps: first.steps,
        guidance: first.guidance.unwrap_or_default(),
        size: size.latent(pipeline.config.family),
    };
    let channels = pipeline.config.out_channels / 4;
    ensure!(
        pipeline.config.in_channels == pipeline.config.out_channels,
        "`{}` takes {} input channels but predicts {}: models that take an image as input (Fill, Canny, Depth) cannot generate from a prompt alone",
        pipeline.name,
        pipeline.config.in_channels,
        pipeline.config.out_channels
    );
    // diffusers draws the noise of all images of a prompt from one generator
    let images = jobs
        .iter()
        .map(|job| job.image_index + 1)
        .max()
        .unwrap_or(1);
    let noise = starting_noise(first.seed, images, channels, denoise.size)?;
    let progress = pipeline
        .reporter
        .progress(jobs.len().div_ceil(batch) * denoise.steps, "generating");
    let mut latents = Vec::new();
    for jobs in jobs.chunks(batch) {
        let pick = |f: fn(&ImageJob) -> usize| -> Vec<u32> {
            jobs.iter().map(|job| f(job) as u32).collect()
        };
        let prompts = encoded.select(&pick(|job| job.prompt_index))?;
        let images = Tensor::new(pick(|job| job.image_index), &candle::Device::Cpu)?;
        let noise = noise.index_select(&images, 0)?;
        let drawn = denoise.run(&noise, &prompts, &mut (), &mut || progress.inc(1));
        latents.push(drawn.with_context(|| format!("`{}`", pipeline.name))?);
    }
    let latents = Tensor::cat(&latents, 0)?;
    drop(flux);
    pipeline.reporter.done(
        &progress,
        format!(
            "generated {} image{} and freed the transformer",
            jobs.len(),
            if jobs.len() == 1 { "" } else { "s" }
        ),
    );
    Ok(latents)
}

/// Which images to generate.
#[derive(Clone, Copy, Debug)]
pub struct JobOptions<'a> {
    /// A file, a pattern or a folder.
    pub output: &'a Path,
    /// What is on the images.
    pub prompts: &'a [String],
    /// Images of each prompt.
    pub images_per_prompt: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; `None` for a model that takes none.
    pub guidance: Option<f64>,
    /// Size of all images.
    pub size: ImageSize,
}

/// All images with their paths; two may not share one.
///
/// # Errors
/// When the output is no name of an image or a folder, or the same for two images.
pub fn jobs(options: &JobOptions) -> Result<Vec<ImageJob>> {
    let several = options.prompts.len() * options.images_per_prompt > 1;
    let (output, seed) = (options.output, options.seed);
    let mut jobs = Vec::new();
    for (prompt_index, prompt) in options.prompts.iter().enumerate() {
        for image_index in 0..options.images_per_prompt {
            jobs.push(ImageJob {
                path: output_path(output, seed, prompt_index, image_index, several)?,
                prompt: prompt.clone(),
                seed,
                steps: options.steps,
                guidance: options.guidance,
                width: options.size.width,
                height: options.size.height,
                prompt_index,
                image_index,
            });
        }
    }
    let mut paths: Vec<&Path> = jobs.iter().map(|job| job.path.as_path()).collect();
    paths.sort();
    if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!(
            "--output `{}` would be written twice\nhint: use a folder, or a pattern with {{prompt}} and {{image}}",
            twice[0].display()
        );
    }
    Ok(jobs)
}

/// Creates the folders that images go into.
///
/// # Errors
/// When one is not writable.
pub fn create_folders(jobs: &[ImageJob]) -> Result<()> {
    for folder in jobs
        .iter()
        .filter_map(|job| job.path.parent())
        .filter(|p| !p.as_os_str().is_empty())
    {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
    }
    Ok(())
}

/// The file of one image: a pattern is filled in, a .png name is taken (numbered where there are several), anything
/// else is a folder.
///
/// # Errors
/// When a pattern has unknown fields, or the name is of another kind of file.
pub fn output_path(
    output: &Path,
    seed: u64,
    prompt: usize,
    image: usize,
    several: bool,
) -> Result<PathBuf> {
    let text = output.to_str().context("--output is not UTF-8")?;
    let is_png = output
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("png"));
    if text.contains('{') && is_png {
        let filled = text
            .replace("{prompt}", &format!("{prompt:03}"))
            .replace("{image}", &format!("{image:02}"));
        let filled = filled.replace("{seed}", &seed.to_string());
        ensure!(
            !filled.contains('{'),
            "--output `{text}`: only {{prompt}}, {{image}} and {{seed}} are filled in"
        );
        return Ok(PathBuf::from(filled));
    }
    if is_png && !several {
        return Ok(output.to_path_buf());
    }
    if is_png {
        let stem = output
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or("image");
        return Ok(output.with_file_name(format!("{stem}-{prompt:03}-{image:02}.png")));
    }
    ensure!(
        output.extension().is_none() || output.is_dir(),
        "--output `{text}`: images are written as .png, or name a folder"
    );
    Ok(output.join(format!("{prompt:03}-{image:02}-seed{seed}.png")))
}
