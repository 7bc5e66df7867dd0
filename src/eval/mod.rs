//! One evaluation: the same prompts and noise through a baseline and the models made from it; numbers, images, and a page
//! that shows them.

use std::{cell::RefCell, path::PathBuf, time::Duration};

use anyhow::{Context, Result};

use crate::{
    bench::timing::{self, Effort, Machine},
    checkpoint::record,
    model::cost,
    pipeline::{Pipeline, decoder::Decoder, load, placement::MemoryBudget},
    sample::{png::Image, size::ImageSize},
    ui,
};

mod card;
pub mod clip;
pub mod export;
mod html;
pub mod lpips;
mod measure;
pub mod metrics;
mod output;
mod pairs;
pub mod prompts;
mod references;
pub mod report;
pub mod scenes;
mod suites;
mod table;
pub mod unfinished;
pub mod velocity;

pub use measure::check_family;

use clip::ClipFiles;
use lpips::LpipsFiles;
use measure::{Measured, Task};
use metrics::Summary;
use report::{Distances, ModelReport, PromptFollowing, Report, Settings};
use unfinished::Unfinished;

/// Bytes of weights up to which all models are loaded together to be timed.
const MAX_BYTES_TOGETHER: usize = 1 << 30;
/// How often decoding is timed.
const DECODING: Effort = Effort {
    warm_up: 1,
    min_runs: 2,
    max_runs: 10,
    seconds: 0.5,
};

/// What all models are given.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// One for each image.
    pub prompts: Vec<String>,
    /// Where the prompts are from, for the report.
    pub prompts_from: String,
    /// Size of the images.
    pub size: ImageSize,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Image i starts from the noise of `seed` + i.
    pub seed: u64,
    /// Rows of pixels to decode at a time; 0: all of them; `None`: all of them if they fit.
    pub vae_tile: Option<usize>,
    /// The folder that the report will be in; sampled images are kept next to it while it is unfinished.
    pub output: PathBuf,
    /// How often they are saved.
    pub save_every: Duration,
}

impl EvalOptions {
    /// Unfinished work of the same models with the same options.
    fn unfinished(
        &self,
        models: &[&Pipeline],
        cfg_scale: f64,
        budget: &MemoryBudget,
    ) -> Result<Unfinished> {
        let fingerprints = models.iter().map(|m| record::fingerprint(&m.transformer));
        let settings = serde_json::json!({
            "models": fingerprints.collect::<Result<Vec<_>>>()?,
            "schedules": models.first().map(|model| model.scheduler.clone()),
            "prompts": self.prompts,
            "size": [self.size.width, self.size.height],
            "steps": self.steps,
            "guidance": self.guidance,
            "cfg_scale": cfg_scale,
            "seed": self.seed,
            "runtime": budget.runtime().to_string(),
        });
        let (settings, every) = (settings.to_string(), self.save_every);
        Unfinished::open(&self.output, settings, every, budget.reporter())
    }
}

/// Models that judge images.
#[derive(Clone, Debug, Default)]
pub struct Scorers {
    /// How well they fit their prompts.
    pub clip: Option<ClipFiles>,
    /// How far they are from the baseline's.
    pub lpips: Option<LpipsFiles>,
}

/// What an evaluation found.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The numbers.
    pub report: Report,
    /// The baseline's images and then each model's, in the order of the prompts.
    pub images: Vec<Vec<Image>>,
}

impl Evaluation {
    /// Puts each model's results into its card, if fastflux wrote one next to its weights.
    pub fn publish(&self, baseline: &Pipeline, models: &[Pipeline]) {
        card::publish(&self.report, baseline, models);
    }
}

/// Checks all that headers and small files tell of what [`run`] will need.
///
/// # Errors
/// When a model takes other inputs than a prompt, or a part of the baseline's pipeline is missing, damaged or does not fit;
/// the message names the file and the flag.
pub fn check(baseline: &Pipeline, models: &[Pipeline], options: &EvalOptions) -> Result<()> {
    baseline.check_parts(true)?;
    for model in models {
        model.check_inputs()?;
    }
    load::schedule(baseline)?
        .sigmas(options.steps, options.size.tokens())
        .with_context(|| baseline.scheduler_name.clone())?;
    Ok(())
}

/// Samples with the baseline and with each model, and compares what comes out.
///
/// # Errors
/// When a component cannot be loaded or does not fit into memory, or an image is not finite.
pub fn run(
    baseline: &Pipeline,
    models: &[Pipeline],
    options: &EvalOptions,
    scorers: &Scorers,
    budget: &MemoryBudget,
) -> Result<Evaluation> {
    let runtime = budget.runtime();
    let vae_files = baseline.vae_files()?;
    let all: Vec<&Pipeline> = std::iter::once(baseline).chain(models).collect();
    let bytes = |p: &&Pipeline| p.transformer.bytes_loaded(runtime.dtype);
    let bytes: usize = all.iter().map(bytes).sum();
    let cfg_scale = baseline.cfg_scale(options.guidance);
    let unfinished = RefCell::new(options.unfinished(&all, cfg_scale, budget)?);
    let task = Task {
        runtime,
        budget,
        encoded: load::encode_prompts(baseline, &options.prompts, None, runtime)?,
        schedule: load::schedule(baseline)?,
        size: options.size,
        steps: options.steps,
        guidance: options.guidance,
        cfg_scale,
        unfinished,
        seed: options.seed,
        together: bytes <= MAX_BYTES_TOGETHER && !budget.is_short_of(2 * bytes as u64),
    };
    let measured = task.all(baseline, models)?;
    let decoder = budget.decoder(
        &vae_files,
        options.size.latent(baseline.config.family),
        options.vae_tile,
    )?;
    let (images, decode_seconds) = decode(&decoder, &measured, budget)?;
    let again = measured[0]
        .again
        .as_ref()
        .context("the baseline draws some prompts twice")?;
    let images_again = decoder.images(again)?;
    let mut two_seeds = pairs::two_seeds(&measured[0].latents, &images[0], again, &images_again)?;
    drop(decoder);
    let lpips = scorers.lpips.as_ref();
    let distances = lpips
        .map(|lpips| lpips.distances(&images, runtime))
        .transpose()?;
    if let Some(lpips) = lpips {
        let same = images[0][..images_again.len()].to_vec();
        let distances = lpips.distances(&[same, images_again], runtime)?;
        two_seeds.lpips = distances.first().map(|all| Summary::from_values(all));
    }
    let clip = scorers.clip.as_ref();
    let clip_scores = clip
        .map(|clip| clip.scores(&options.prompts, &images, runtime))
        .transpose()?;
    let latents: Vec<_> = measured.iter().map(|m| &m.latents).collect();
    let pairs = pairs::compare(
        options,
        &latents,
        &images,
        (clip_scores.as_deref(), distances.as_deref()),
    )?;
    let text_tokens = task.encoded.txt.dim(1)?;
    let mut models = Vec::new();
    let before = &measured[0];
    let names = all.iter().map(|pipeline| pipeline.name.as_str());
    let names = ui::short_names(&names.collect::<Vec<_>>());
    for (i, (pipeline, measured)) in all.iter().zip(&measured).enumerate() {
        let config = &pipeline.config;
        let against = i.checked_sub(1).map(|index| {
            let velocity = before.velocities.error_of(&measured.velocities)?;
            anyhow::Ok(Distances::new(&pairs, index, velocity))
        });
        let verdicts: Vec<_> = pairs.iter().filter_map(|pair| pair.verdict(i)).collect();
        models.push(ModelReport {
            name: names[i].clone(),
            fingerprint: record::fingerprint(&pipeline.transformer)?,
            blocks: config.original_ids().count(),
            replaced: report::replaced(&config.layout),
            parameters: pipeline.transformer.parameters(),
            bytes: pipeline.transformer.bytes(),
            flops_per_step: cost::model(config, options.size.tokens(), text_tokens).flops(),
            step: measured.step,
            image_seconds: options.steps as f64 * measured.step.median + decode_seconds,
            speed_up: (i > 0).then(|| before.step.median / measured.step.median),
            peak_memory: measured.memory,
            against_baseline: against.transpose()?,
            prompt_following: PromptFollowing::from_verdicts(&verdicts),
            clip_score: clip_scores
                .as_ref()
                .map(|all| Summary::from_values(&all[i])),
            recipe: pipeline.record.as_ref().map(|r| r.recipe.clone()),
        });
    }
    let settings = Settings {
        prompts: options.prompts_from.clone(),
        images: options.prompts.len(),
        seed: options.seed,
        steps: options.steps,
        guidance: options.guidance,
        true_cfg: baseline.shown_true_cfg(Some(options.guidance)),
        width: options.size.width,
        height: options.size.height,
        image_tokens: options.size.tokens(),
        text_tokens,
        runtime: runtime.to_string(),
        clip: clip.map(|clip| clip.name.clone()),
        lpips: lpips.map(|lpips| lpips.name.clone()),
        timed: if task.together {
            "models in turn".to_owned()
        } else {
            "models one after another".to_owned()
        },
    };
    let scenes = pairs.iter().any(|pair| pair.baseline.is_some());
    let report = Report {
        tool: record::software(),
        metrics: references::of_settings(&settings, scenes),
        settings,
        machine: Machine::this(),
        two_seeds,
        baseline: models.remove(0),
        models,
        pairs,
    };
    Ok(Evaluation { report, images })
}

/// All images, and how long one of them takes in seconds.
fn decode(
    decoder: &Decoder,
    measured: &[Measured],
    budget: &MemoryBudget,
) -> Result<(Vec<Vec<Image>>, f64)> {
    let one = measured[0].latents.narrow(0, 0, 1)?;
    let work = &mut || {
        decoder.images(&one)?;
        Ok(())
    };
    let device = &budget.runtime().device;
    let seconds = timing::measure(device, DECODING, &mut [work])?[0].median;
    let count = measured[0].latents.dim(0)?;
    let progress = budget
        .reporter()
        .progress(measured.len() * count, "decoding");
    let mut images = Vec::new();
    for measured in measured {
        images.push(decoder.images(&measured.latents)?);
        progress.inc(count as u64);
    }
    budget.reporter().done(
        &progress,
        format!("decoded {}", ui::counted(images.len() * count, "image")),
    );
    Ok((images, seconds))
}
