//! `generate`: prompts → PNG files.

use anyhow::{Context, Result, ensure};

use super::options;
use crate::{
    checkpoint::{record, target},
    cli::GenerateArgs,
    layout::Family,
    pipeline::{
        Pipeline,
        generate::{self, GenerateReport, ImageJob, JobOptions},
        load, prompts,
    },
    sample::png::Image,
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
    let (mut pipeline, budget) =
        options::open_within(&args.pipeline, args.run, args.memory, reporter)?;
    let references = load::reference_images(&pipeline, &args.image)?;
    // FLUX.2 draws an image of the size of the first reference image, as diffusers does
    let first = references.first();
    let first = first.filter(|_| pipeline.config.family == Family::FLUX2);
    let size = pipeline.image_size(
        args.size.width.or(first.map(|image| image.width as usize)),
        args.size
            .height
            .or(first.map(|image| image.height as usize)),
    )?;
    let jobs = generate::jobs(&JobOptions {
        output: &args.output.path,
        prompts: &prompts,
        images_per_prompt: args.images_per_prompt,
        seed: args.seed.seed.unwrap_or_default(),
        steps: (args.sampling.steps).unwrap_or_else(|| pipeline.default_steps()),
        guidance: guidance(args, &mut pipeline)?,
        size,
    })?;
    for job in &jobs {
        target::check_file(&job.path, args.output.force)?;
    }
    generate::create_folders(&jobs)?;
    let vae_files = pipeline.vae_files()?;
    let steps = jobs.first().map_or(1, |job| job.steps);
    load::schedule(&pipeline)?
        .sigmas(steps, size.tokens())
        .with_context(|| pipeline.scheduler_name.clone())?;
    let (length, runtime) = (args.max_sequence_length, budget.runtime());
    let mut encoded = load::encode_prompts(&pipeline, &prompts, length, runtime)?;
    if !references.is_empty() {
        encoded.references = Some(load::references(&pipeline, &references, runtime)?);
    }
    let latents = generate::latents(&pipeline, &budget, &jobs, &encoded, size)?;
    let decoder = budget.decoder(
        &vae_files,
        size.latent(pipeline.config.family),
        args.decode.vae_tile,
    )?;
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

/// The guidance that images are drawn with, and what the flags say about it that has no effect.
fn guidance(args: &GenerateArgs, pipeline: &mut Pipeline) -> Result<Option<f64>> {
    let name = &pipeline.name;
    ensure!(
        args.negative_prompt.is_none() || pipeline.takes_negative_prompt(),
        "--negative-prompt: `{name}` takes none: only FLUX.2 as long as it was not distilled is guided by one"
    );
    if !pipeline.takes_guidance() {
        if args.sampling.guidance.is_some() {
            pipeline.reporter.note(format!(
                "`{name}` takes no guidance (it has no embedding of it, or was distilled): --guidance has no effect"
            ));
        }
        return Ok(None);
    }
    if let Some(negative) = &args.negative_prompt {
        pipeline.negative_prompt.clone_from(negative);
    }
    let own = pipeline.default_guidance();
    Ok(Some(args.sampling.guidance.unwrap_or(own)))
}

fn write(job: &ImageJob, image: &Image, pipeline: &Pipeline) -> Result<()> {
    let size = format!("{}x{}", job.width, job.height);
    let text = [
        ("prompt", job.prompt.as_str()),
        ("seed", &job.seed.to_string()),
        ("image", &job.image_index.to_string()),
        ("steps", &job.steps.to_string()),
        ("guidance", &job.guidance.unwrap_or_default().to_string()),
        ("size", &size),
        ("model", &pipeline.model_ref),
        ("Software", &record::software()),
    ];
    image.save(&job.path, &text)
}
