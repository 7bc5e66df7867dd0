//! `generate`: prompts → PNG files.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::options;
use crate::{
    checkpoint::target,
    cli::GenerateArgs,
    eval::scenes::Scene,
    files::BUNDLED,
    pipeline::{
        Pipeline,
        generate::{self, GenerateReport, ImageJob, ImageName},
        load, prompts,
    },
    sample::size::ImageSize,
    ui::{self, Reporter},
};

/// Images of one run.
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
    let size = pipeline.size_of_edit(args.size.width, args.size.height, &references)?;
    pipeline.set_true_cfg(args.sampling.cfg.true_cfg)?;
    let negative = args.negative_prompt.as_deref();
    let guidance = pipeline.guide(args.sampling.guidance, negative)?;
    pipeline.note_guesses(args.sampling.steps);
    let jobs = jobs(args, &pipeline, &prompts, (size, guidance))?;
    for job in &jobs {
        target::check_file(&job.path, args.output.force)?;
    }
    pipeline.check_parts(true)?;
    say_what_is_drawn(&jobs, &pipeline);
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
    let vae = (&vae_files, args.decode.vae_tile);
    generate::draw(&pipeline, &budget, &jobs, &encoded, vae, &mut |job| {
        if args.output.print.json {
            return Ok(());
        }
        ui::data(job.path.display().to_string())
    })?;
    if args.output.print.json {
        ui::json(&GenerateReport {
            model: pipeline.name,
            images: jobs,
        })?;
    }
    Ok(())
}

/// All images with their paths: names that are taken are numbered on.
fn jobs(
    args: &GenerateArgs,
    pipeline: &Pipeline,
    prompts: &[String],
    (size, guidance): (ImageSize, Option<f64>),
) -> Result<Vec<ImageJob>> {
    let several = prompts.len() * args.images_per_prompt > 1;
    let seed = args.seed.seed.unwrap_or_default();
    let (mut jobs, mut taken) = (Vec::new(), BTreeSet::new());
    for (prompt_index, prompt) in prompts.iter().enumerate() {
        for image_index in 0..args.images_per_prompt {
            // an image's own seed: it can be drawn alone
            let seed = seed.wrapping_add(image_index as u64);
            let name = ImageName {
                prompt,
                seed,
                prompt_index,
                image_index,
                several,
            };
            let path = name.path(&args.output.path)?;
            jobs.push(ImageJob {
                path: generate::free_path(path, args.output.force, &mut taken),
                prompt: prompt.clone(),
                seed,
                steps: args
                    .sampling
                    .steps
                    .unwrap_or_else(|| pipeline.default_steps()),
                guidance,
                true_cfg: pipeline.shown_true_cfg(guidance),
                width: size.width,
                height: size.height,
                prompt_index,
                image_index,
            });
        }
    }
    Ok(jobs)
}

/// One line with what the images are drawn with, and a warning if the bundled model does not know the words.
fn say_what_is_drawn(jobs: &[ImageJob], pipeline: &Pipeline) {
    let Some(first) = jobs.first() else { return };
    let guidance = first
        .guidance
        .map_or_else(String::new, |g| format!(", guidance {g}"));
    pipeline.reporter.note(format!(
        "{}×{}, {}{guidance}, seed {}",
        first.width,
        first.height,
        ui::counted(first.steps, "step"),
        first.seed
    ));
    let base = pipeline.record.as_ref().map(|record| record.base.as_str());
    let is_bundled = [Some(pipeline.model_ref.as_str()), base].contains(&Some(BUNDLED));
    let unknown = jobs.iter().find(|job| Scene::parse(&job.prompt).is_none());
    if let Some(job) = unknown.filter(|_| is_bundled) {
        pipeline.reporter.warn(format!(
            "the bundled model knows captions of coloured shapes only, such as \"a red circle left of a blue square on a white background\", and nothing of \"{}\"",
            job.prompt
        ));
    }
}
