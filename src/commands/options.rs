//! Flags → the options of the stages: the recipe, and flags over it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    calibrate::{options::CalibrationOptions, recipe::LatentSource},
    cli::{
        CalibrationArgs, GoalArgs, MemoryArgs, ModelArgs, PipelineArgs, PruneArgs, RunArgs,
        StatsArgs, TrainArgs,
    },
    device::Runtime,
    pipeline::{
        ModelChoice, Pipeline,
        placement::{MemoryBudget, MemoryLimit},
        prompts,
    },
    prune::{goal::GoalOptions, options::PruneOptions, recipe::PruneRecipe},
    train::{options::TrainOptions, recipe::SandwichRecipe},
    ui::Reporter,
};

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
    let recipe = recipe_for(&args.calibration, &args.goal)?;
    Ok(PruneOptions {
        calibration: calibration(&args.calibration, Some(&args.stats), &recipe),
        recipe,
        goal: goal(&args.goal, args.plan.clone()),
        output: args.output.path.clone(),
        force: args.output.force,
        layout: args.layout.layout,
        patch: args.pipeline.model.patch.writes(),
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
    recipe.lora.rank = args.rank.or(recipe.lora.rank).filter(|_| !args.no_lora);
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
