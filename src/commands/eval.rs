//! `eval`: the same prompts and noise through several models; numbers, pictures and a page that shows them.

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use candle::{DType, Tensor};

use super::{
    eval_clip::ClipFiles,
    eval_output,
    measure::{self, Measured, Task},
    planned::Planned,
};
use crate::{
    checkpoint::{
        record,
        target::{self, OutputFolder},
    },
    cli::EvalArgs,
    eval::{
        detect,
        latency::{self, Effort, Machine},
        metrics::{self, Summary},
        report::{Distances, ModelReport, Pair, PairOfModel, PromptFollowing, Report, Settings},
        scene::Scene,
    },
    files::BUNDLED,
    layout::BlockSpec,
    model::cost,
    pipeline::{ModelChoice, Pipeline, load, placement::MemoryBudget, prompts},
    sample::png::Picture,
    ui,
};

/// Pictures that each model draws unless asked otherwise.
const PICTURES: usize = 128;
/// The same where pictures have many tokens.
const PICTURES_LARGE: usize = 8;
/// Bytes of weights up to which all models are loaded together to be timed.
const TOGETHER: usize = 1 << 30;
/// Beyond this a number is a slip of the finger.
const MAX_IMAGES: usize = 10_000;
/// Seed of the first image's noise unless asked otherwise.
const SEED: u64 = 10_000;
/// Seed of the captions that are drawn for the bundled model.
const CAPTIONS: u64 = 1;

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    let given = args
        .prompts
        .prompts
        .as_deref()
        .map(|path| prompts::read("--prompts", path))
        .transpose()?;
    target::check_folder(&args.output.path, args.output.force)?;
    let runtime = super::runtime(args.run)?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime);
    let (baseline, mut models) = open(args)?;
    let plans: Vec<Planned> = args
        .plan
        .iter()
        .map(|path| Planned::read(path, args.recipe.recipe.as_deref(), &baseline))
        .collect::<Result<_>>()?;
    let vae_files = baseline.vae_files()?;
    let clip = args.clip.as_deref().map(ClipFiles::find).transpose()?;
    let size = baseline.image_size(args.size.width, args.size.height)?;
    let usual = if size.is_large() {
        PICTURES_LARGE
    } else {
        PICTURES
    };
    let (source, prompts) = prompts(args, given, &baseline, usual);
    target::check_writable(&args.output.path)?;
    for plan in plans {
        let place = place.clone().of(&baseline);
        models.push(plan.carry_out(&baseline, &runtime, &place, &args.output.path)?);
    }

    let all: Vec<&Pipeline> = std::iter::once(&baseline).chain(&models).collect();
    let bytes = |p: &&Pipeline| p.transformer.bytes_loaded(runtime.dtype);
    let bytes: usize = all.iter().map(bytes).sum();
    let task = Task {
        runtime: &runtime,
        place: &place,
        encoded: load::encode_prompts(&baseline, &prompts, None, &runtime)?,
        schedule: load::schedule(&baseline)?,
        size,
        steps: args
            .sampling
            .steps
            .unwrap_or_else(|| baseline.default_steps()),
        guidance: args
            .sampling
            .guidance
            .unwrap_or_else(|| baseline.default_guidance()),
        seed: args.seed.seed.unwrap_or(SEED),
        together: bytes <= TOGETHER && !place.is_short_of(2 * bytes as u64),
    };
    let text_tokens = task.encoded.txt.dim(1)?;
    let (mut before, states) = task.baseline(&baseline)?;
    let mut after = Vec::new();
    for model in &models {
        after.push(task.model(model, &states)?);
    }
    if task.together {
        let timings = task.in_turn(&all, &states)?;
        let measured = std::iter::once(&mut before).chain(&mut after);
        for (measured, timing) in measured.zip(timings) {
            measured.step = timing;
        }
    }

    let decoder = place.decoder(&vae_files, size.latent(), args.decode.vae_tile)?;
    let decode_seconds = {
        let one = before.latents.narrow(0, 0, 1)?;
        let effort = Effort {
            warm_up: 1,
            least: 2,
            most: 10,
            seconds: 0.5,
        };
        let work = &mut || {
            decoder.pictures(&one)?;
            Ok(())
        };
        latency::measure(&runtime.device, effort, &mut [work])?[0].median
    };
    let progress = ui::progress((1 + models.len()) * prompts.len(), "decoding");
    let mut drawn = Vec::new();
    for measured in std::iter::once(&before).chain(&after) {
        drawn.push(decoder.pictures(&measured.latents)?);
        progress.inc(prompts.len() as u64);
    }
    ui::done(
        &progress,
        format!("decoded {} pictures", drawn.len() * prompts.len()),
    );
    drop(decoder);
    let clip_scores = clip
        .as_ref()
        .map(|clip| clip.scores(&prompts, &drawn, &runtime))
        .transpose()?;

    let pairs = pairs(
        &prompts,
        args.seed.seed.unwrap_or(SEED),
        &before,
        &after,
        &drawn,
        clip_scores.as_deref(),
    )?;
    let describe =
        |pipeline: &Pipeline, measured: &Measured, index: Option<usize>| -> Result<ModelReport> {
            let (config, step) = (&pipeline.config, measured.step);
            let verdicts: Vec<_> = pairs
                .iter()
                .filter_map(|pair| match index {
                    None => pair.baseline,
                    Some(index) => pair.models.get(index)?.verdict,
                })
                .collect();
            let against = index.map(|index| {
                let velocity = before.velocities.error_of(&measured.velocities)?;
                anyhow::Ok(Distances::of(&pairs, index, velocity))
            });
            Ok(ModelReport {
                name: pipeline.name.clone(),
                fingerprint: record::fingerprint(&pipeline.transformer)?,
                blocks: config.original_ids().count(),
                replaced: replaced(&config.layout),
                parameters: pipeline.transformer.parameters(),
                bytes: pipeline.transformer.bytes(),
                flops_per_step: cost::model(config, size.tokens(), text_tokens).flops(),
                step,
                picture_seconds: task.steps as f64 * step.median + decode_seconds,
                speed_up: index.map(|_| before.step.median / step.median),
                peak_memory: measured.memory,
                against_baseline: against.transpose()?,
                prompt_following: PromptFollowing::of(&verdicts),
                clip_score: clip_scores.as_ref().map(|all| {
                    let model = index.map_or(0, |index| index + 1);
                    Summary::of(&all[model])
                }),
                recipe: pipeline.record.as_ref().map(|r| r.recipe.clone()),
            })
        };
    let mut reports = Vec::new();
    for (index, (model, measured)) in models.iter().zip(&after).enumerate() {
        reports.push(describe(model, measured, Some(index))?);
    }
    let report = Report {
        tool: record::software(),
        settings: Settings {
            prompts: source,
            pictures: prompts.len(),
            seed: args.seed.seed.unwrap_or(SEED),
            steps: task.steps,
            guidance: task.guidance,
            width: size.width,
            height: size.height,
            image_tokens: size.tokens(),
            text_tokens,
            runtime: runtime.to_string(),
            clip: clip.map(|clip| clip.name),
            timed: if task.together {
                "models in turn".to_owned()
            } else {
                "models one after another".to_owned()
            },
        },
        machine: Machine::this(),
        baseline: describe(&baseline, &before, None)?,
        models: reports,
        pairs,
    };
    let output = OutputFolder::create(&args.output.path, args.output.force)?;
    eval_output::write(output.path(), &report, &models, &drawn)?;
    output.finish()?;
    if args.output.print.json {
        ui::json(&report)?;
    } else {
        ui::data(eval_output::table(&report))?;
    }
    ui::note(format!(
        "wrote `{}`: report.html, report.json, pictures.png",
        args.output.path.display()
    ));
    Ok(())
}

/// The baseline and the models, all of one family.
fn open(args: &EvalArgs) -> Result<(Pipeline, Vec<Pipeline>)> {
    let choice = |model: &str| ModelChoice {
        model: Some(model.to_owned()),
        config: args.config.config.clone(),
        text_encoders: args.parts.text_encoders.clone(),
        vae: args.parts.vae.clone(),
    };
    let models: Vec<Pipeline> = args
        .model
        .iter()
        .map(|model| Pipeline::open(&choice(model)))
        .collect::<Result<_>>()?;
    let baseline = match (&args.baseline, models.first()) {
        (Some(baseline), model) => {
            let record = model.and_then(|model| model.record.as_ref());
            Pipeline::open_original(&choice(baseline), record).context("--baseline")?
        }
        (None, Some(model)) if model.record.is_some() => model.base_with(&choice(""))?,
        (None, Some(model)) => bail!(
            "`{}` does not say what it was made from\nhint: name the model to compare it with by --baseline",
            model.name
        ),
        (None, None) if !args.plan.is_empty() => Pipeline::open(&choice(BUNDLED))?,
        (None, None) => bail!(
            "--model is missing: eval compares a pruned model with the one it was made from\nhint: `fastflux prune --output pruned` prunes the bundled model; then `fastflux eval --model pruned`"
        ),
    };
    for model in &models {
        measure::check_family(&baseline, model)?;
    }
    Ok((baseline, models))
}

/// Where prompts are from, and as many as are wanted.
fn prompts(
    args: &EvalArgs,
    given: Option<Vec<String>>,
    baseline: &Pipeline,
    usual: usize,
) -> (String, Vec<String>) {
    let (source, list, count) = match (&args.prompts.prompts, given) {
        (Some(path), Some(list)) => {
            let count = args
                .prompts
                .num_prompts
                .unwrap_or(list.len())
                .min(MAX_IMAGES);
            (format!("`{}`", path.display()), list, count)
        }
        _ if prompts::knows_only_scenes(baseline) => {
            let count = args.prompts.num_prompts.unwrap_or(usual);
            let known: HashSet<&str> = prompts::SCENES.lines().collect();
            // half of all captions with one object are known, and a quarter of the others
            let captions = Scene::draw(4 * count + 16, CAPTIONS).map(|scene| scene.to_string());
            let fresh = captions.filter(|caption| !known.contains(caption.as_str()));
            let source = "captions of random scenes, none of the calibration list";
            (source.to_owned(), fresh.collect(), count)
        }
        _ => {
            let list = include_str!("../../configs/prompts/eval.txt").lines();
            let source = "configs/prompts/eval.txt, none of the calibration list";
            let list: Vec<String> = list.map(str::to_owned).collect();
            (
                source.to_owned(),
                list,
                args.prompts.num_prompts.unwrap_or(usual),
            )
        }
    };
    (source, list.iter().cycle().take(count).cloned().collect())
}

/// The blocks that are not what they were.
fn replaced(layout: &[BlockSpec]) -> Vec<String> {
    let entries = layout.iter().filter_map(|spec| match spec {
        BlockSpec::Original(_) => None,
        BlockSpec::Replaced(r) => Some(r.replaces.iter().map(ToString::to_string)),
    });
    entries.flatten().collect()
}

fn pairs(
    prompts: &[String],
    seed: u64,
    before: &Measured,
    after: &[Measured],
    drawn: &[Vec<Picture>],
    clip: Option<&[Vec<f64>]>,
) -> Result<Vec<Pair>> {
    let mean_squares = |measured: &Measured| -> Result<Vec<f64>> {
        let difference: Tensor = (&measured.latents - &before.latents)?;
        let means = difference.sqr()?.flatten_from(1)?.mean(1)?;
        Ok(means.to_dtype(DType::F64)?.to_vec1()?)
    };
    let latents: Vec<Vec<f64>> = after.iter().map(mean_squares).collect::<Result<_>>()?;
    let (base, rest) = drawn.split_first().context("nothing was drawn")?;
    let mut out = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        // scenes are square; a caption of the grammar in another format is just a prompt
        let scene = Scene::parse(prompt).filter(|_| base[i].width == base[i].height);
        let judge = |picture: &Picture| {
            scene
                .as_ref()
                .map(|scene| detect::judge(scene, picture))
                .transpose()
        };
        let mut models = Vec::new();
        let clip = |model: usize| clip.map(|all| all[model][i]);
        for (model, (latents, pictures)) in latents.iter().zip(rest).enumerate() {
            models.push(PairOfModel {
                latent_mse: latents[i],
                psnr: metrics::psnr(&base[i], &pictures[i])?,
                ssim: metrics::ssim(&base[i], &pictures[i])?,
                verdict: judge(&pictures[i])?,
                clip: clip(model + 1),
            });
        }
        out.push(Pair {
            prompt: prompt.clone(),
            seed: seed.wrapping_add(i as u64),
            baseline: judge(&base[i])?,
            baseline_clip: clip(0),
            models,
        });
    }
    Ok(out)
}
