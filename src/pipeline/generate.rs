//! Prompts → latents of images, in batches that fit into memory.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use candle::Tensor;
use serde::Serialize;

use super::{
    Pipeline, VaeFiles, load,
    placement::{Activity, MemoryBudget},
};
use crate::{
    checkpoint::record,
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        png::Image,
        size::ImageSize,
    },
    ui,
};

/// Tokens in one forward: small images go through the model several at a time.
const TOKENS_PER_FORWARD: usize = 1024;
/// How long latents wait for the VAE to take the transformer's place: reading 24 GB again may take most of a minute.
const WRITE_EVERY: Duration = Duration::from_secs(600);

/// One image to generate.
#[derive(Clone, Debug, Serialize)]
pub struct ImageJob {
    /// The file.
    pub path: PathBuf,
    /// What is on it.
    pub prompt: String,
    /// Seed of the noise: the image's own, so that it can be drawn alone.
    pub seed: u64,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; `None` for a model that takes none.
    pub guidance: Option<f64>,
    /// Scale of the negative prompt, where a FLUX.1 is guided by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub true_cfg: Option<f64>,
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Which prompt of the list.
    #[serde(skip)]
    pub prompt_index: usize,
    /// Which image of the prompt.
    #[serde(rename = "image")]
    pub image_index: usize,
}

impl ImageJob {
    /// Writes the image with its settings as text.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, image: &Image, pipeline: &Pipeline) -> Result<()> {
        let size = format!("{}x{}", self.width, self.height);
        let mut text = vec![
            ("prompt", self.prompt.clone()),
            ("seed", self.seed.to_string()),
            ("image", self.image_index.to_string()),
            ("steps", self.steps.to_string()),
            ("guidance", self.guidance.unwrap_or_default().to_string()),
            ("size", size),
            ("model", pipeline.public_name()),
            ("Software", record::software()),
        ];
        if !pipeline.lora.is_empty() {
            text.push(("lora", pipeline.lora_names()));
        }
        if let Some(scale) = self.true_cfg {
            text.push(("true_cfg", scale.to_string()));
        }
        if !pipeline.negative_prompt.is_empty() {
            text.push(("negative_prompt", pipeline.negative_prompt.clone()));
        }
        let text: Vec<(&str, &str)> = text.iter().map(|(k, v)| (*k, v.as_str())).collect();
        image.save(&self.path, &text)
    }
}

/// Makes the folders of all images.
///
/// # Errors
/// When one cannot be made.
fn create_folders(jobs: &[ImageJob]) -> Result<()> {
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

/// What `generate` made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    /// How the model is called.
    pub model: String,
    /// The images, in the order of the prompts.
    pub images: Vec<ImageJob>,
}

/// Loads the transformer, denoises images in batches and frees it again; packed latents (images, tokens, 4 · channels) of
/// the first jobs: of all, unless a batch ends later than `patience` after the start. So images can be written long before
/// the last of many is drawn.
///
/// # Errors
/// When the model takes images as input, does not fit into memory, or values become NaN or infinite.
pub fn latents(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    jobs: &[ImageJob],
    encoded: &Encoded,
    size: ImageSize,
    patience: Duration,
) -> Result<Tensor> {
    let start = Instant::now();
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
    let latent = size.latent(pipeline.config.family);
    let denoise = Denoise {
        flux: &flux,
        dtype: budget.runtime().dtype,
        device: &budget.runtime().device,
        schedule: &schedule,
        steps: first.steps,
        guidance: first.guidance.unwrap_or_default(),
        cfg_scale: pipeline.cfg_scale(first.guidance.unwrap_or_default()),
        size: latent,
    };
    let channels = pipeline.config.out_channels / 4;
    pipeline.check_inputs()?;
    let progress = pipeline
        .reporter
        .progress(jobs.len().div_ceil(batch) * denoise.steps, "generating");
    let mut latents = Vec::new();
    for jobs in jobs.chunks(batch) {
        let indices: Vec<u32> = jobs.iter().map(|job| job.prompt_index as u32).collect();
        let prompts = encoded.select(&indices)?;
        let noises = jobs
            .iter()
            .map(|job| starting_noise(job.seed, 1, channels, latent));
        let noise = Tensor::cat(&noises.collect::<Result<Vec<_>>>()?, 0)?;
        let drawn = denoise.run(&noise, &prompts, &mut (), &mut || progress.inc(1));
        latents.push(drawn.with_context(|| format!("`{}`", pipeline.name))?);
        if start.elapsed() > patience {
            break;
        }
    }
    let latents = Tensor::cat(&latents, 0)?;
    let drawn = match latents.dim(0)? {
        all if all == jobs.len() => ui::counted(all, "image"),
        some => format!("{some} of {}", ui::counted(jobs.len(), "image")),
    };
    drop(flux);
    pipeline.reporter.done(
        &progress,
        format!("generated {drawn} and freed the transformer"),
    );
    Ok(latents)
}

/// Draws all images, writes them by a VAE (with its `--vae-tile`), and tells of each. What is drawn is written every few
/// minutes, so that a run that is stopped has not worked for nothing.
///
/// # Errors
/// As [`latents`], and when a file cannot be written.
pub fn draw(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    jobs: &[ImageJob],
    encoded: &Encoded,
    (vae, tile): (&VaeFiles, Option<usize>),
    written: &mut dyn FnMut(&ImageJob) -> Result<()>,
) -> Result<()> {
    let mut rest = jobs;
    while let Some(first) = rest.first() {
        let size = ImageSize {
            width: first.width,
            height: first.height,
        };
        let latents = latents(pipeline, budget, rest, encoded, size, WRITE_EVERY)?;
        let decoder = budget.decoder(vae, size.latent(pipeline.config.family), tile)?;
        let (drawn, left) = rest.split_at(latents.dim(0)?);
        rest = left;
        create_folders(drawn)?;
        for (i, job) in drawn.iter().enumerate() {
            let image = decoder.images(&latents.narrow(0, i, 1)?)?;
            let image = image.first().context("the VAE gave no image")?;
            job.save(image, pipeline)?;
            written(job)?;
        }
    }
    Ok(())
}

/// What an image's file is called by.
#[derive(Clone, Copy, Debug)]
pub struct ImageName<'a> {
    /// What is on it.
    pub prompt: &'a str,
    /// Its own seed.
    pub seed: u64,
    /// Which prompt of the list.
    pub prompt_index: usize,
    /// Which image of the prompt.
    pub image_index: usize,
    /// Whether the run makes several images.
    pub several: bool,
}

/// Most characters of a prompt in a file's name.
const MAX_SLUG: usize = 60;

impl ImageName<'_> {
    /// The file in `output`: a pattern is filled in, a .png name is taken (numbered if there are several), anything else
    /// is a folder.
    ///
    /// # Errors
    /// When a pattern has unknown fields, or the name is of another kind of file.
    pub fn path(&self, output: &Path) -> Result<PathBuf> {
        let text = output.to_str().context("--output is not UTF-8")?;
        let (prompt, image) = (self.prompt_index, self.image_index);
        let is_png = output
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("png"));
        if text.contains('{') && is_png {
            let filled = text
                .replace("{prompt}", &slug(self.prompt))
                .replace("{number}", &format!("{prompt:03}"))
                .replace("{image}", &format!("{image:02}"))
                .replace("{seed}", &self.seed.to_string());
            ensure!(
                !filled.contains('{'),
                "--output `{text}`: only {{prompt}}, {{number}}, {{image}} and {{seed}} are filled in"
            );
            return Ok(PathBuf::from(filled));
        }
        if is_png && !self.several {
            return Ok(output.to_path_buf());
        }
        if is_png {
            let stem = output.file_stem().and_then(|s| s.to_str());
            let stem = stem.unwrap_or("image");
            return Ok(output.with_file_name(format!("{stem}-{prompt:03}-{image:02}.png")));
        }
        ensure!(
            output.extension().is_none() || output.is_dir(),
            "--output `{text}`: images are written as .png, or name a folder"
        );
        Ok(output.join(format!("{prompt:03}-{image:02}-seed{}.png", self.seed)))
    }
}

/// A prompt as part of a file's name: its words joined by hyphens, without anything a file system might refuse.
fn slug(prompt: &str) -> String {
    let words = prompt.split(|c: char| !c.is_alphanumeric());
    let words: Vec<String> = words
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
        .collect();
    let slug: String = words.join("-").chars().take(MAX_SLUG).collect();
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() {
        "image".to_owned()
    } else {
        slug.to_owned()
    }
}

/// `path`, or with `-2`, `-3`, … before its ending if a file is there (unless it may be replaced) or the run has used
/// the name.
pub fn free_path(path: PathBuf, replace: bool, taken: &mut BTreeSet<PathBuf>) -> PathBuf {
    let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or("image");
    let numbered = (2..).map(|n| path.with_file_name(format!("{stem}-{n}.png")));
    let free =
        |path: &PathBuf| !taken.contains(path) && (replace || path.symlink_metadata().is_err());
    let free = std::iter::once(path.clone()).chain(numbered).find(free);
    let free = free.unwrap_or_else(|| path.clone());
    taken.insert(free.clone());
    free
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device};

    use super::*;
    use crate::{
        device::Runtime,
        pipeline::{ModelChoice, placement::MemoryLimit},
    };

    #[test]
    fn images_that_are_drawn_bit_by_bit_are_the_same() {
        let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
        let runtime = Runtime {
            device: Device::Cpu,
            dtype: DType::F32,
        };
        let budget = MemoryBudget::new(MemoryLimit::default(), &runtime, &pipeline.reporter);
        let prompts = ["a red circle".to_owned()];
        let encoded = load::encode_prompts(&pipeline, &prompts, None, &runtime).unwrap();
        let size = ImageSize {
            width: 64,
            height: 64,
        };
        // more than go through the model at a time
        let jobs: Vec<_> = (0..=TOKENS_PER_FORWARD as u64 / 16)
            .map(|seed| ImageJob {
                path: PathBuf::new(),
                prompt: prompts[0].clone(),
                seed,
                steps: 1,
                guidance: Some(3.5),
                true_cfg: None,
                width: size.width,
                height: size.height,
                prompt_index: 0,
                image_index: 0,
            })
            .collect();
        let drawn = |jobs: &[ImageJob], patience: Duration| {
            latents(&pipeline, &budget, jobs, &encoded, size, patience).unwrap()
        };
        let whole = drawn(&jobs, Duration::MAX);
        assert_eq!(whole.dim(0).unwrap(), jobs.len());
        let (mut rest, mut parts) = (&jobs[..], Vec::new());
        while !rest.is_empty() {
            let part = drawn(rest, Duration::ZERO);
            rest = &rest[part.dim(0).unwrap()..];
            parts.push(part);
        }
        assert!(parts.len() > 1);
        let values = |latents: &Tensor| latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&Tensor::cat(&parts, 0).unwrap()), values(&whole));
    }

    #[test]
    fn prompts_become_names_of_files() {
        assert_eq!(slug("A fox, in the snow!"), "a-fox-in-the-snow");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("??"), "image");
        assert!(slug(&"long ".repeat(100)).chars().count() <= MAX_SLUG);
    }

    #[test]
    fn names_that_are_taken_are_numbered_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let mut taken = BTreeSet::new();
        let mut next = |replace| free_path(path.clone(), replace, &mut taken);
        assert_eq!(next(false), path);
        assert_eq!(next(false), folder.path().join("a-2.png"));
        std::fs::write(folder.path().join("a-3.png"), []).unwrap();
        assert_eq!(next(false), folder.path().join("a-4.png"));
        assert_eq!(next(true), folder.path().join("a-3.png"));
    }
}
