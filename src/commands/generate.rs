//! `generate`: prompts → PNG files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle::Tensor;
use serde::Serialize;

use crate::{
    checkpoint::{record, target},
    cli::GenerateArgs,
    device::Runtime,
    pipeline::{
        Pipeline, load,
        placement::{Activity, MemoryBudget},
        prompts,
    },
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        png::Image,
        size::ImageSize,
    },
    ui,
};

/// Tokens in one forward: small pictures are drawn several at a time.
const TOKENS_PER_FORWARD: usize = 1024;

/// Pictures of one run: all latents are kept until the VAE takes the transformer's place.
const MOST_PICTURES: usize = 100_000;

/// One picture to draw.
#[derive(Clone, Debug, Serialize)]
struct Job {
    path: PathBuf,
    prompt: String,
    seed: u64,
    steps: usize,
    /// `None` for a model that takes none.
    guidance: Option<f64>,
    width: usize,
    height: usize,
    /// Which prompt of the list.
    #[serde(skip)]
    prompt_index: usize,
    /// Which picture of the prompt: its place in the noise drawn from the seed.
    #[serde(rename = "image")]
    image_index: usize,
}

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.prompt_file {
        prompts.extend(prompts::read("--prompt-file", path)?);
    }
    let pictures = prompts.len().saturating_mul(args.images_per_prompt);
    ensure!(
        pictures <= MOST_PICTURES,
        "--images-per-prompt {} of {} prompts: {pictures} pictures, but one run draws at most {MOST_PICTURES}\nhint: lower --images-per-prompt, or give fewer prompts at a time",
        args.images_per_prompt,
        prompts.len()
    );
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let size = pipeline.image_size(args.size.width, args.size.height)?;
    if args.sampling.guidance.is_some() && !pipeline.config.guidance_embed {
        ui::note(format!(
            "`{}` has no guidance embedding: --guidance has no effect",
            pipeline.name
        ));
    }
    let jobs = jobs(args, &pipeline, &prompts, size)?;
    for job in &jobs {
        target::check_file(&job.path, args.output.force)?;
    }
    create_folders(&jobs)?;
    let vae_files = pipeline.vae_files()?;
    let steps = jobs.first().map_or(1, |job| job.steps);
    load::schedule(&pipeline)?
        .sigmas(steps, size.tokens())
        .with_context(|| pipeline.scheduler_name.clone())?;
    let encoded = load::encode_prompts(&pipeline, &prompts, args.max_sequence_length, &runtime)?;
    let latents = denoise(&pipeline, &runtime, &place, &jobs, &encoded, size)?;
    let decoder = place.decoder(&vae_files, size.latent(), args.decode.vae_tile)?;
    for (i, job) in jobs.iter().enumerate() {
        let picture = decoder.pictures(&latents.narrow(0, i, 1)?)?;
        let picture = picture.first().context("the VAE gave no picture")?;
        write(job, picture, &pipeline)?;
        if !args.output.print.json {
            ui::data(job.path.display().to_string())?;
        }
    }
    if args.output.print.json {
        ui::json(&serde_json::json!({ "model": pipeline.name, "images": jobs }))?;
    }
    Ok(())
}

/// All pictures with their paths; two may not share one.
fn jobs(
    args: &GenerateArgs,
    pipeline: &Pipeline,
    prompts: &[String],
    size: ImageSize,
) -> Result<Vec<Job>> {
    let several = prompts.len() * args.images_per_prompt > 1;
    let seed = args.seed.seed.unwrap_or_default();
    let mut jobs = Vec::new();
    for (prompt_index, prompt) in prompts.iter().enumerate() {
        for image_index in 0..args.images_per_prompt {
            jobs.push(Job {
                path: path(&args.output.path, seed, prompt_index, image_index, several)?,
                prompt: prompt.clone(),
                seed,
                steps: args
                    .sampling
                    .steps
                    .unwrap_or_else(|| pipeline.default_steps()),
                guidance: pipeline.config.guidance_embed.then(|| {
                    args.sampling
                        .guidance
                        .unwrap_or_else(|| pipeline.default_guidance())
                }),
                width: size.width,
                height: size.height,
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

/// The file of one picture: a pattern is filled in, a .png name is taken (numbered where there are several), anything
/// else is a folder.
fn path(output: &Path, seed: u64, prompt: usize, image: usize, several: bool) -> Result<PathBuf> {
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
        "--output `{text}`: pictures are written as .png, or name a folder"
    );
    Ok(output.join(format!("{prompt:03}-{image:02}-seed{seed}.png")))
}

fn create_folders(jobs: &[Job]) -> Result<()> {
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

/// Loads the transformer, denoises all pictures in batches and frees it again; packed latents, one for each job.
fn denoise(
    pipeline: &Pipeline,
    runtime: &Runtime,
    place: &MemoryBudget,
    jobs: &[Job],
    encoded: &Encoded,
    size: ImageSize,
) -> Result<Tensor> {
    let Some(first) = jobs.first() else {
        bail!("nothing to draw")
    };
    let tokens = size.tokens() + encoded.txt.dim(1)?;
    let usual = TOKENS_PER_FORWARD / tokens;
    let batch = place.batch(&pipeline.config, tokens, usual.min(jobs.len()));
    let need = Activity {
        batch,
        tokens,
        extra_bytes: 0,
    };
    let flux = place.flux(pipeline, need)?;
    let schedule = load::schedule(pipeline)?;
    let denoise = Denoise {
        flux: &flux,
        dtype: runtime.dtype,
        device: &runtime.device,
        schedule: &schedule,
        steps: first.steps,
        guidance: first.guidance.unwrap_or_default(),
        size: size.latent(),
    };
    let channels = pipeline.config.out_channels / 4;
    ensure!(
        pipeline.config.in_channels == pipeline.config.out_channels,
        "`{}` takes {} input channels but predicts {}: models that take a picture as input (Fill, Canny, Depth) cannot draw from a prompt alone",
        pipeline.name,
        pipeline.config.in_channels,
        pipeline.config.out_channels
    );
    // diffusers draws all pictures of a prompt from one generator
    let images = jobs
        .iter()
        .map(|job| job.image_index + 1)
        .max()
        .unwrap_or(1);
    let noise = starting_noise(first.seed, images, channels, denoise.size)?;
    let progress = ui::progress(jobs.len().div_ceil(batch) * denoise.steps, "drawing");
    let mut latents = Vec::new();
    for jobs in jobs.chunks(batch) {
        let pick = |f: fn(&Job) -> usize| -> Result<Tensor> {
            let indices: Vec<u32> = jobs.iter().map(|job| f(job) as u32).collect();
            Ok(Tensor::new(indices, &candle::Device::Cpu)?)
        };
        let prompts = pick(|job| job.prompt_index)?.to_device(encoded.txt.device())?;
        let prompts = Encoded {
            txt: encoded.txt.index_select(&prompts, 0)?,
            vec: encoded.vec.index_select(&prompts, 0)?,
        };
        let noise = noise.index_select(&pick(|job| job.image_index)?, 0)?;
        let drawn = denoise.run(&noise, &prompts, &mut (), &mut || progress.inc(1));
        latents.push(drawn.with_context(|| format!("`{}`", pipeline.name))?);
    }
    let latents = Tensor::cat(&latents, 0)?;
    drop(flux);
    ui::done(
        &progress,
        format!(
            "drew {} picture{} and freed the transformer",
            jobs.len(),
            if jobs.len() == 1 { "" } else { "s" }
        ),
    );
    Ok(latents)
}

fn write(job: &Job, picture: &Image, pipeline: &Pipeline) -> Result<()> {
    let size = format!("{}x{}", job.width, job.height);
    let text = [
        ("prompt", job.prompt.as_str()),
        ("seed", &job.seed.to_string()),
        ("image", &job.image_index.to_string()),
        ("steps", &job.steps.to_string()),
        ("guidance", &job.guidance.unwrap_or_default().to_string()),
        ("size", &size),
        ("model", &pipeline.locator),
        ("Software", &record::software()),
    ];
    picture.save(&job.path, &text)
}
