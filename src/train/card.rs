//! `plan --for`: what a card can run, how large images are there, and the time and memory of the commands that get there.

use anyhow::{Context, Result};
use candle::{DType, Device};

use super::{
    options::TrainOptions, pair::Pair, recipe::SandwichRecipe, report::DryRunReport,
    setup::TrainSetup, strategy::MemoryRequest,
};
use crate::{
    calibrate::{
        memory::{CalibrationEstimate, Refits},
        options::{CalibrationOptions, ResolvedOptions},
        pass::Shard,
    },
    device::Runtime,
    layout::FluxConfig,
    pipeline::{
        Pipeline,
        placement::{Activity, MemoryBudget, MemoryLimit},
        prompts,
    },
    prune::{
        card::{CardReport, CommandCosts, USABLE, some_plan, within},
        goal,
        recipe::FitRecipe,
    },
    ui::Reporter,
};

/// Sides of images that are tried where the model's own are too large.
const SMALLER: [usize; 3] = [768, 512, 256];
/// Share of the blocks that is pruned in the estimates of the commands.
const RATIO: f64 = 0.2;
/// Steps between two saves: no part of an estimate.
const SAVE_EVERY: usize = 100;

/// A card, and what was measured here.
#[derive(Clone, Copy, Debug)]
pub struct Card<'a> {
    /// Bytes of its memory.
    pub bytes: u64,
    /// Operations per second.
    pub flops_per_second: f64,
    /// The flags that name the model and its parts as commands repeat them, or nothing.
    pub model_flags: &'a str,
}

/// What `card` can run of a model, with the largest images that fit.
///
/// # Errors
/// When no image fits, or a part of the model is missing.
pub fn report(
    pipeline: &Pipeline,
    calibration: &CalibrationOptions,
    card: Card,
) -> Result<CardReport> {
    let runtime = Runtime {
        device: Device::Cpu,
        dtype: DType::BF16,
    };
    let mut quiet = pipeline.clone();
    quiet.reporter = Reporter::silent();
    let pipeline = &quiet;
    let config = &pipeline.config;
    let (mut calibration, mut resized) = (calibration.clone(), false);
    let mut resolved = ResolvedOptions::new(pipeline, &calibration)?;
    let budget_of = |bytes| {
        let limit = MemoryLimit {
            offload: false,
            max_bytes: Some(bytes),
        };
        MemoryBudget::new(limit, &runtime, &quiet.reporter).for_pipeline(pipeline)
    };
    let placed = |budget: &MemoryBudget, options: &ResolvedOptions| {
        let activity = Activity {
            batch: 1,
            tokens: options.tokens(),
            extra_bytes: 0,
        };
        budget.offload_plan(config, activity)
    };
    // a model that needs no --max-vram has what programs get of a card
    let all = (USABLE * card.bytes as f64) as u64;
    let is_whole = placed(&budget_of(all), &resolved).is_ok_and(|plan| plan.is_all());
    let usable = if is_whole { all } else { within(card.bytes) };
    let budget = budget_of(usable);
    let fits = |options: &ResolvedOptions| placed(&budget, options).map(drop);
    let own = resolved.size.width.min(resolved.size.height);
    let asked = calibration.recipe.width.or(calibration.recipe.height);
    for side in SMALLER.into_iter().filter(|side| *side < own) {
        if asked.is_some() || fits(&resolved).is_ok() {
            break;
        }
        resized = true;
        (calibration.recipe.width, calibration.recipe.height) = (Some(side), Some(side));
        resolved = ResolvedOptions::new(pipeline, &calibration)?;
    }
    fits(&resolved).context("--for: the card is too small")?;
    let count = (RATIO * config.kept_ids().len() as f64).round() as usize;
    let refits = FitRecipe::default().refits(config);
    let estimate = |fitting: Option<Refits>| {
        let of = |options: &ResolvedOptions| {
            CalibrationEstimate::new(pipeline, &budget, options, Shard::WHOLE, None, fitting)
        };
        of(&resolved).or_else(|_| {
            let mut alone = calibration.clone();
            alone.recipe.batch = Some(1);
            of(&ResolvedOptions::new(pipeline, &alone)?)
        })
    };
    let (sums, fitted) = (estimate(None)?, estimate(Some(refits))?.with_scoring(count));
    let f = &fitted.flops;
    let size = (resolved.size.width, resolved.size.height);
    // training takes more than all else: where it does not fit, smaller images may
    let smaller = SMALLER
        .into_iter()
        .filter(|side| asked.is_none() && *side < size.0.min(size.1));
    let mut sizes = [size].into_iter().chain(smaller.map(|side| (side, side)));
    let train = sizes.find_map(|size| {
        let dry = training(pipeline, count, size, usable, &runtime).ok()?;
        Some((size, dry))
    });
    let costs = CommandCosts {
        costs: [
            Some((f.sampling + f.statistics + f.products, sums.bytes.device)),
            Some((f.scoring, fitted.bytes.device)),
            Some((f.fits, fitted.bytes.device)),
            train
                .as_ref()
                .map(|(_, dry)| (dry.flops, dry.peak_bytes as u64)),
        ],
        trained_on: train.as_ref().map(|(size, _)| *size),
        steps: pipeline.default_steps(),
        flops_per_second: Some(card.flops_per_second),
    };
    let mut workload = goal::workload(pipeline, &runtime, &resolved);
    workload.weight_bytes = pipeline.bytes_of_a_weight(DType::BF16);
    Ok(CardReport::new(
        &pipeline.name,
        config,
        workload,
        size,
        card.bytes,
        card.model_flags,
        (resized, costs),
    ))
}

/// What `train-sandwich` takes after `count` blocks were replaced.
fn training(
    pipeline: &Pipeline,
    count: usize,
    (width, height): (usize, usize),
    usable: u64,
    runtime: &Runtime,
) -> Result<DryRunReport> {
    let config = FluxConfig {
        layout: some_plan(&pipeline.config, count).layout(&pipeline.config),
        ..pipeline.config.clone()
    };
    let pair = Pair::example(pipeline.clone(), config)?;
    let mut recipe = SandwichRecipe::default();
    (recipe.data.width, recipe.data.height) = (Some(width), Some(height));
    let options = TrainOptions::new(recipe, &prompts::bundled(pipeline), pipeline, SAVE_EVERY)?;
    let setup = TrainSetup::new(pair, options, runtime.clone())?;
    let strategy = setup.strategy(MemoryRequest {
        max_bytes: Some(usable),
        dry_run: true,
        ..MemoryRequest::default()
    })?;
    Ok(DryRunReport::new(&setup, strategy))
}
