//! Flags → the options of the stages: the recipe, and flags over it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    bench::inputs,
    calibrate::{options::CalibrationOptions, recipe::LatentSource},
    cli::{
        CalibrationArgs, EvalArgs, GoalArgs, MemoryArgs, ModelArgs, PipelineArgs, PruneArgs,
        RunArgs, StatsArgs, TrainArgs,
    },
    device::Runtime,
    eval::{self, EvalOptions},
    pipeline::{
        ModelChoice, Pipeline,
        placement::{MemoryBudget, MemoryLimit},
        prompts,
    },
    prune::{self, goal::GoalOptions, options::PruneOptions, recipe::PruneRecipe},
    train::{options::TrainOptions, pair::Pair, recipe::SandwichRecipe},
    ui::Reporter,
};

/// Seed of the first image's noise in an evaluation unless asked otherwise.
pub(super) const EVAL_SEED: u64 = 10_000;

/// The model that flags name, without text encoders and VAE.
pub(super) fn bare_choice(args: &ModelArgs, reporter: &Reporter) -> ModelChoice {
    ModelChoice {
        model: args.model.clone(),
        lora: args.lora.lora.clone(),
        patch: args.patch.choice(),
        config: args.config.config.clone(),
        reporter: reporter.clone(),
        ..ModelChoice::default()
    }
}

/// The model that flags name, with the other components of its pipeline.
pub(super) fn model_choice(args: &PipelineArgs, reporter: &Reporter) -> ModelChoice {
    ModelChoice {
        text_encoders: args.parts.text_encoders.clone(),
        vae: args.parts.vae.clone(),
        fetch_base: args.parts.fetch_base,
        ..bare_choice(&args.model, reporter)
    }
}

/// The device and number format that flags name.
pub(super) fn runtime(args: RunArgs) -> Result<Runtime> {
    Runtime::resolve(args.device.device, args.dtype)
}

/// How much of the device flags allow.
pub(super) fn memory(args: MemoryArgs) -> MemoryLimit {
    MemoryLimit {
        offload: args.offload,
        max_bytes: args.max_vram,
    }
}

/// Opens a model and says so when it is the bundled one.
pub(super) fn open(choice: &ModelChoice) -> Result<Pipeline> {
    if choice.model.is_none() {
        choice.reporter.note(
            "using the bundled tiny model (64×64 images of coloured shapes); name a real one with --model, \
             for example --model black-forest-labs/FLUX.1-schnell",
        );
    }
    Pipeline::open(choice)
}

/// Opens a model, and asks how much of the device its weights may use.
pub(super) fn open_within(
    pipeline: &PipelineArgs,
    run: RunArgs,
    memory_args: MemoryArgs,
    reporter: &Reporter,
) -> Result<(Pipeline, MemoryBudget)> {
    let runtime = runtime(run)?;
    let pipeline = open(&model_choice(pipeline, reporter))?;
    let budget = MemoryBudget::new(memory(memory_args), &runtime, reporter).for_pipeline(&pipeline);
    Ok((pipeline, budget))
}

/// The same for a command that calibrates.
pub(super) fn open_to_calibrate(
    pipeline: &PipelineArgs,
    calibration: &CalibrationArgs,
    run: (RunArgs, MemoryArgs),
    reporter: &Reporter,
) -> Result<(Pipeline, MemoryBudget)> {
    let (mut pipeline, budget) = open_within(pipeline, run.0, run.1, reporter)?;
    pipeline.set_true_cfg_of_data(calibration.cfg.true_cfg)?;
    Ok((pipeline, budget))
}

/// The recipe with the flags of calibration laid over it.
pub(super) fn recipe(args: &CalibrationArgs) -> Result<PruneRecipe> {
    let mut recipe = match &args.recipe.recipe {
        Some(path) => PruneRecipe::read(path)?,
        None => PruneRecipe::default(),
    };
    let c = &mut recipe.calibration;
    if args.images.is_some() {
        c.source = LatentSource::Images;
    }
    c.source = args.source.unwrap_or(c.source);
    ensure!(
        (c.source == LatentSource::Images) == args.images.is_some(),
        "calibrating on images takes --images DIR"
    );
    if !args.image.is_empty() {
        let absolute = args.image.iter().map(std::path::absolute);
        c.reference_images = absolute.collect::<std::io::Result<_>>()?;
    }
    c.num_prompts = args.prompts.num_prompts.or(c.num_prompts);
    c.steps = args.steps.or(c.steps);
    c.width = args.size.width.or(c.width);
    c.height = args.size.height.or(c.height);
    c.seed = args.seed.seed.unwrap_or(c.seed);
    c.tokens_per_forward = args.tokens_per_forward.or(c.tokens_per_forward);
    recipe.validate()?;
    Ok(recipe)
}

/// The recipe with the flags of calibration and goal laid over it.
pub(super) fn recipe_for(args: &CalibrationArgs, goal: &GoalArgs) -> Result<PruneRecipe> {
    let mut recipe = recipe(args)?;
    // of several ratios the largest: the others are on the way to it
    recipe.ratio = goal
        .ratio
        .iter()
        .copied()
        .reduce(f64::max)
        .unwrap_or(recipe.ratio);
    recipe.fit.form = goal.form.unwrap_or(recipe.fit.form);
    recipe.validate()?;
    Ok(recipe)
}

/// What is calibrated on, or which statistics are used instead.
pub(super) fn calibration(
    args: &CalibrationArgs,
    stats: Option<&StatsArgs>,
    recipe: &PruneRecipe,
) -> CalibrationOptions {
    CalibrationOptions {
        recipe: recipe.calibration.clone(),
        held_out: recipe.score.held_out,
        prompts: args.prompts.prompts.clone(),
        images: args.images.clone(),
        stats: stats.and_then(|args| args.stats.clone()),
        stats_memory: args.stats_memory,
        save_every: Duration::from_secs(args.save_every),
    }
}

/// How far to prune.
pub(super) fn goal(args: &GoalArgs, plan: Option<PathBuf>) -> GoalOptions {
    GoalOptions {
        plan,
        blocks: args.blocks.clone(),
        parameters: args.budget_params,
        memory: args.budget_vram,
        speedup: args.target_speedup,
        protect: args.protect.clone(),
    }
}

/// All that `prune` is asked for.
pub(super) fn prune(args: &PruneArgs) -> Result<PruneOptions> {
    ensure!(
        args.goal.ratio.len() < 2,
        "--ratio: one number is expected here\nhint: `fastflux plan` takes several and writes a plan for each"
    );
    let patch = args.pipeline.model.patch.writes();
    ensure!(
        !patch || args.folder.whole.is_none(),
        "--patch and --whole: a patch is no pipeline\nhint: leave one of them out"
    );
    let mut recipe = recipe_for(&args.calibration, &args.goal)?;
    let refit = &mut recipe.fit.refit_projections;
    *refit = args.refit_projections.or(*refit);
    Ok(PruneOptions {
        calibration: calibration(&args.calibration, Some(&args.stats), &recipe),
        recipe,
        goal: goal(&args.goal, args.plan.clone()),
        output: args.output.path.clone(),
        force: args.output.force,
        layout: args.folder.naming(),
        whole: args.folder.whole,
        patch,
        vae_tile: args.decode.vae_tile,
    })
}

/// What `train-sandwich` is asked for.
pub(super) fn train(args: &TrainArgs, teacher: &Pipeline) -> Result<TrainOptions> {
    let mut recipe = match &args.recipe.recipe {
        Some(path) => SandwichRecipe::read(path)?,
        None => SandwichRecipe::default(),
    };
    recipe.seed = args.seed.seed.unwrap_or(recipe.seed);
    recipe.steps = args.steps.unwrap_or(recipe.steps);
    recipe.finetune.steps = args.finetune.unwrap_or(recipe.finetune.steps);
    recipe.optimiser.lr = args.lr.unwrap_or(recipe.optimiser.lr);
    recipe.lora.rank = args.rank.or(recipe.lora.rank);
    if args.no_lora {
        recipe.lora.targets.clear();
    }
    recipe.lora.alpha = args.alpha.or(recipe.lora.alpha);
    let d = &mut recipe.data;
    d.num_prompts = args.prompts.num_prompts.or(d.num_prompts);
    d.batch = args.batch.or(d.batch);
    d.accumulate = args.accumulate.unwrap_or(d.accumulate);
    d.cache = args.cache.unwrap_or(d.cache);
    d.width = args.size.width.or(d.width);
    d.height = args.size.height.or(d.height);
    let prompts = match &args.prompts.prompts {
        Some(path) => prompts::read("--prompts", path)?,
        None => prompts::bundled(teacher),
    };
    TrainOptions::new(recipe, &prompts, teacher, args.save_every)
}

/// The model that flags name and its teacher, or the bundled one; a dry run does not prune that, it takes some blocks.
pub(super) fn pair(args: &TrainArgs, choice: &ModelChoice, folder: &Path) -> Result<Pair> {
    if args.dry_run.dry_run && choice.model.is_none() && !folder.exists() {
        let teacher = Pipeline::open(choice)?;
        let count = (PruneOptions::default().recipe.ratio
            * teacher.config.original_ids().count() as f64)
            .round() as usize;
        let config = inputs::replaced(&teacher.config, count)?;
        choice.reporter.note(format!(
            "the bundled tiny model would be pruned first: this is for {count} of its single blocks, prune chooses others"
        ));
        return Pair::example(teacher, config);
    }
    let pruned = open_pruned(args, choice, folder)?;
    Pair::open(pruned, args.teacher.as_deref(), choice)
}

/// The model that flags name, or the bundled one, pruned into `folder` unless an earlier run has done so.
fn open_pruned(args: &TrainArgs, choice: &ModelChoice, folder: &Path) -> Result<Pipeline> {
    if choice.model.is_some() {
        return Pipeline::open(choice);
    }
    if !folder.exists() {
        choice
            .reporter
            .note("pruning the bundled tiny model at 20 % first; --model names a pruned model");
        let runtime = runtime(args.run)?;
        let pipeline = Pipeline::open(&ModelChoice {
            reporter: choice.reporter.clone(),
            ..ModelChoice::default()
        })?;
        let budget = MemoryBudget::new(memory(args.memory), &runtime, &choice.reporter)
            .for_pipeline(&pipeline);
        let options = PruneOptions {
            output: folder.to_path_buf(),
            ..PruneOptions::default()
        };
        prune::run::run(&pipeline, &budget, &options)?;
    }
    Pipeline::open(&ModelChoice {
        model: Some(folder.display().to_string()),
        ..choice.clone()
    })
}

/// The settings of an evaluation: the baseline's own, and flags over them.
pub(super) fn eval(args: &EvalArgs, baseline: &Pipeline) -> Result<EvalOptions> {
    let size = baseline.image_size(args.size.width, args.size.height)?;
    let (file, count) = (args.prompts.prompts.as_deref(), args.prompts.num_prompts);
    let (prompts_from, prompts) = eval::prompts::choose(file, count, baseline, size)?;
    let sampling = &args.sampling;
    Ok(EvalOptions {
        prompts,
        prompts_from,
        size,
        steps: sampling.steps.unwrap_or_else(|| baseline.default_steps()),
        guidance: baseline.guidance_or_default(sampling.guidance),
        seed: args.seed.seed.unwrap_or(EVAL_SEED),
        vae_tile: args.decode.vae_tile,
        output: args.output.path.clone(),
        save_every: Duration::from_secs(args.save_every),
    })
}
