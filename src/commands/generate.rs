//! `generate`: prompts → PNG files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::options;
use crate::{
    checkpoint::{record, target},
    cli::GenerateArgs,
    pipeline::{
        Pipeline,
        generate::{self, GenerateReport, ImageJob},
        load, prompts,
    },
    sample::{png::Image, size::ImageSize},
    ui::{self, Reporter},
};

/// Images of one run: all latents are kept until the VAE takes the transformer's place.
const MAX_IMAGES: usize = 100_000;

pub(super) fn run(args: &GenerateArgs, reporter: &Reporter) -> Result<()> {
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.prompt_file {
        prompts.extend(prompts::read("--prompt-file", path)?);
    }
    let images = prompts.len().saturating_mul(args.images_per_prompt);
    ensure!(
        images <= MAX_IMAGES,
        "--images-per-prompt {} of {} prompts: {images} images, but one run makes at most {MAX_IMAGES}\nhint: lower --images-per-prompt, or give fewer prompts at a time",
        args.images_per_prompt,
        prompts.len()
    );
    let (pipeline, budget) = options::open_within(&args.pipeline, args.run, args.memory, reporter)?;
    let size = pipeline.image_size(args.size.width, args.size.height)?;
    if args.sampling.guidance.is_some() && !pipeline.config.guidance_embed {
        reporter.note(format!(
            "`{}` has no guidance embedding: --guidance has no effect",
            pipeline.name
        ));
    }
    pipeline.note_guesses(args.sampling.steps);
    let jobs = jobs(args, &pipeline, &prompts, size)?;
    for job in &jobs {
        target::check_file(&job.path, args.output.force)?;
    }
    pipeline.check_parts(true)?;
    let vae_files = pipeline.vae_files()?;
    let steps = jobs.first().map_or(1, |job| job.steps);
    load::schedule(&pipeline)?
        .sigmas(steps, size.tokens())
        .with_context(|| pipeline.scheduler_name.clone())?;
    let encoded = load::encode_prompts(
        &pipeline,
        &prompts,
        args.max_sequence_length,
        budget.runtime(),
    )?;
    let latents = generate::latents(&pipeline, &budget, &jobs, &encoded, size)?;
    create_folders(&jobs)?;
    let decoder = budget.decoder(&vae_files, size.latent(), args.decode.vae_tile)?;
    for (i, job) in jobs.iter().enumerate() {
        let image = decoder.images(&latents.narrow(0, i, 1)?)?;
        let image = image.first().context("the VAE gave no image")?;
        write(job, image, &pipeline)?;
        if !args.output.print.json {
            ui::data(job.path.display().to_string())?;
        }
    }
    if args.output.print.json {
        ui::json(&GenerateReport {
            model: pipeline.name,
            images: jobs,
        })?;
    }
    Ok(())
}

/// All images with their paths; two may not share one.
fn jobs(
    args: &GenerateArgs,
    pipeline: &Pipeline,
    prompts: &[String],
    size: ImageSize,
) -> Result<Vec<ImageJob>> {
    let several = prompts.len() * args.images_per_prompt > 1;
    let seed = args.seed.seed.unwrap_or_default();
    let mut jobs = Vec::new();
    for (prompt_index, prompt) in prompts.iter().enumerate() {
        for image_index in 0..args.images_per_prompt {
            jobs.push(ImageJob {
                path: generate::output_path(
                    &args.output.path,
                    seed,
                    prompt_index,
                    image_index,
                    several,
                )?,
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

fn write(job: &ImageJob, image: &Image, pipeline: &Pipeline) -> Result<()> {
    let text = [
        ("prompt", job.prompt.as_str()),
        ("seed", &job.seed.to_string()),
        ("image", &job.image_index.to_string()),
        ("steps", &job.steps.to_string()),
        ("guidance", &job.guidance.unwrap_or_default().to_string()),
        ("size", &format!("{}x{}", job.width, job.height)),
        ("model", &pipeline.public_name()),
        ("Software", &record::software()),
        ("lora", &pipeline.lora_names()),
    ];
    let used = text.len() - usize::from(pipeline.lora.is_empty());
    image.save(&job.path, &text[..used])
}
