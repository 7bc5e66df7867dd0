//! `prune` from a model to a folder: calibrate, choose, carry out, write, and images before and after.

use std::path::Path;

use anyhow::{Result, ensure};

use super::{
    Pruned, card,
    goal::{self, PruneTarget},
    options::PruneOptions,
    prune,
    recipe::PruneRecipe,
    report::{PruneReport, scores_of},
    select::{self, GreedySelection},
};
use crate::{
    calibrate::{Calibrator, file::Calibration, options::ResolvedOptions, run::RunOptions},
    checkpoint::{
        convert, output, patch, record, save,
        target::{self, OutputFolder},
    },
    layout::{BlockSpec, FluxConfig},
    model::{Flux, cost},
    pipeline::{
        Pipeline,
        card::{CardFacts, write as write_card},
        placement::MemoryBudget,
        whole::WholePipeline,
    },
    sample::grid,
    score::{Metric, Scores},
};

/// Prompts that images before and after are generated of, from the calibration list's end.
const IMAGES: usize = 8;
/// Large images take minutes each on small machines: fewer of them.
const IMAGES_LARGE: usize = 2;

/// The images of both.
const IMAGE: &str = "before-after.png";

/// Prunes `pipeline` into the folder `options.output`.
///
/// # Errors
/// When the folder is there (without `force`), the goal cannot be reached, something is damaged or does not fit into
/// memory, or a disk is full; nothing of a folder is left then but unfinished calibration, to go on from.
pub fn run(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    options: &PruneOptions,
) -> Result<PruneReport> {
    let mut recipe = options.recipe.clone();
    let target = PruneTarget::new(&options.goal, &recipe, pipeline)?;
    let resolved = ResolvedOptions::new(pipeline, &options.calibration)?;
    recipe.resolve(pipeline, &resolved);
    if let PruneTarget::Goal { goal, protect } = &target {
        let workload = goal::workload(pipeline, budget.runtime(), &resolved);
        goal::budget(pipeline, workload, &recipe, *goal, protect)?; // before the long part
    }
    target::check_writable(&options.output)?;
    let whole = options.whole.map(|how| pipeline.whole(how)).transpose()?;
    target::check_space(&options.output, bytes_written(pipeline, options)?)?;
    let mut run = RunOptions::for_output(&options.output, options.calibration.save_every);
    run.sums = matches!(target, PruneTarget::Goal { .. });
    let stats_memory = if run.sums {
        options.calibration.stats_memory
    } else {
        Some(0)
    };
    let calibrator = Calibrator::open(pipeline, budget, resolved, stats_memory)?;
    let calibration = calibrator.load_or_run(&run)?;
    let found = find(&calibrator, &recipe, calibration, target, &run)?;
    let report = write(
        calibrator,
        &recipe,
        found,
        budget,
        (options, whole.as_ref()),
    )?;
    run.remove_partial()?;
    Ok(report)
}

/// Bytes of the folder that a run writes, about.
///
/// # Errors
/// When the goal makes no sense for this model, or a part of its pipeline is missing.
pub fn bytes_written(pipeline: &Pipeline, options: &PruneOptions) -> Result<u64> {
    let config = &pipeline.config;
    let plan = match PruneTarget::new(&options.goal, &options.recipe, pipeline)? {
        PruneTarget::Plan(plan) => plan,
        PruneTarget::Goal { .. } => {
            let rounds = options.goal.rounds(&options.recipe, pipeline)?;
            card::some_plan(config, rounds)
        }
    };
    let of = |config: &FluxConfig| cost::model(config, 1, 1).parameters as f64;
    let layout = plan.layout(config);
    let pruned = FluxConfig {
        layout: layout.clone(),
        ..config.clone()
    };
    let kept = layout.into_iter();
    let kept = kept.filter(|spec| matches!(spec, BlockSpec::Original(_)));
    let kept = FluxConfig {
        layout: kept.collect(),
        ..config.clone()
    };
    let parameters = if options.patch {
        of(&pruned) - of(&kept)
    } else {
        of(&pruned)
    };
    let (plain, _) = convert::for_safetensors(&pipeline.transformer);
    let each = plain.bytes() as f64 / plain.parameters().max(1) as f64;
    let whole = options.whole.map(|how| pipeline.whole(how)).transpose()?;
    let parts = whole.map_or(Ok(0), |whole| whole.bytes())?;
    Ok((parameters * each) as u64 + parts)
}

/// What a run found.
struct Found {
    /// `None` if the plan was given, so that no block was scored.
    selection: Option<GreedySelection>,
    pruned: Pruned,
    /// The model with the layers in place.
    flux: Flux,
    /// Relative mean squared error of its velocity on held-out noised latents.
    velocity_error: f64,
}

/// Scores, chooses and fits.
fn find(
    calibrator: &Calibrator,
    recipe: &PruneRecipe,
    calibration: Calibration,
    target: PruneTarget,
    run: &RunOptions,
) -> Result<Found> {
    let noised = calibrator.noised(&calibration)?;
    let (selection, plan) = match target {
        PruneTarget::Plan(plan) => (None, plan),
        PruneTarget::Goal { goal, protect } => {
            let pipeline = calibrator.pipeline;
            let workload = goal::workload(pipeline, calibrator.runtime, &calibrator.options);
            let budget = goal::budget(pipeline, workload, recipe, goal, &protect)?;
            let settings = recipe.comparison(&budget, &protect)?;
            let compared = calibrator.compared_in(run, &noised, &settings)?;
            let stats = calibration.stats;
            let (selection, plan) = select::by_model(
                calibrator, recipe, stats, &noised, &compared, &budget, &protect,
            )?;
            (Some(selection), plan)
        }
    };
    let pruned = prune(calibrator, recipe, plan, &noised, run.folder())?;
    let flux = pruned.flux(calibrator)?;
    let held_out = calibrator.held_out(&noised)?;
    let velocity_error = held_out.error(&flux, &flux.trunk)?;
    ensure!(
        velocity_error.is_finite(),
        "the pruned model's velocity is NaN or infinite"
    );
    Ok(Found {
        selection,
        pruned,
        flux,
        velocity_error,
    })
}

/// Writes the checkpoint, plan, scores and images.
fn write(
    calibrator: Calibrator,
    recipe: &PruneRecipe,
    found: Found,
    budget: &MemoryBudget,
    (options, whole): (&PruneOptions, Option<&WholePipeline>),
) -> Result<PruneReport> {
    let Found {
        selection,
        pruned,
        flux,
        velocity_error,
    } = found;
    let (checkpoint, dequantized) = convert::for_safetensors(&pruned.checkpoint);
    if dequantized > 0 {
        calibrator.pipeline.reporter.note(format!(
            "{dequantized} tensors that are GGML blocks in `{}` are written in bf16 (`fastflux convert` quantizes them again)",
            calibrator.pipeline.name
        ));
    }
    let output = OutputFolder::create(&options.output, options.force)?;
    let folder = output.path();
    let record = Some(&pruned.record);
    if options.patch {
        let (base, record) = (calibrator.pipeline.base()?, pruned.record.clone());
        let level = base.difference(&pruned.checkpoint.name, &checkpoint, record, None)?;
        save::write(&patch::patch(vec![level])?, &folder.join(patch::PATCH_FILE))?;
    } else {
        output::write(folder, &checkpoint, &pruned.config, record, options.layout)?;
        whole.map_or(Ok(()), |whole| whole.write(folder))?;
    }
    let plan = serde_json::to_value(&pruned.plan)?;
    output::write_json(&folder.join("plan.json"), &plan)?;
    if let Some(selection) = &selection {
        let scores = Scores {
            model: calibrator.pipeline.name.clone(),
            source: pruned.plan.source.clone(),
            metric: Metric::Ablation,
            blocks: scores_of(selection),
        };
        let path = folder.join("scores.json");
        scores.write(&path, &path.with_extension("svg"))?;
    }
    let mut report = PruneReport::new(&calibrator, recipe, &pruned, &checkpoint, &options.output);
    report.velocity_error = velocity_error;
    report.blocks = selection.as_ref().map(scores_of);
    let is_first = calibrator.pipeline.config.replaced().next().is_none();
    let unpruned = if is_first {
        report.before.parameters
    } else {
        cost::model(&calibrator.pipeline.config.unpruned(), 1, 1).parameters as usize
    };
    let facts = CardFacts {
        layout: options.layout,
        whole: whole.is_some(),
        parameters: [unpruned, report.after.parameters],
        bytes: report.after.bytes,
        quantized: false,
        patch: options.patch,
        family: calibrator.pipeline.family(),
        results: vec![format!(
            "velocity error {velocity_error:.4}: relative mean squared error against {}, on noised latents that no fit has seen",
            if is_first {
                "the unpruned model".to_owned()
            } else {
                format!(
                    "`{}`, which was pruned before",
                    calibrator.pipeline.public_name()
                )
            }
        )],
    };
    write_card(folder, &pruned.record, &facts)?;
    let title = format!(
        "above: {}; below: {} of {} blocks replaced",
        calibrator.pipeline.name,
        pruned.plan.blocks().count(),
        calibrator.pipeline.config.original_ids().count()
    );
    drop((pruned, selection));
    let tile = options.vae_tile;
    let drawn = before_and_after(calibrator, flux, &title, budget, tile, folder)?;
    report.image = drawn.then(|| IMAGE.to_owned());
    output.finish()?;
    Ok(report)
}

/// Generates the last prompts with both models into `before-after.png`: unpruned above, pruned below. Both models are
/// dropped before the VAE is loaded. Whether there is a VAE.
fn before_and_after(
    calibrator: Calibrator,
    pruned: Flux,
    title: &str,
    budget: &MemoryBudget,
    vae_tile: Option<usize>,
    folder: &Path,
) -> Result<bool> {
    let files = match calibrator.pipeline.vae_files() {
        Ok(files) => files,
        Err(error) => {
            calibrator
                .pipeline
                .reporter
                .note(format!("no image before and after: {error}"));
            return Ok(false);
        }
    };
    let size = calibrator.options.size;
    let count = if size.is_large() {
        IMAGES_LARGE
    } else {
        IMAGES
    };
    let (latents, prompts) = calibrator.draw(&[&calibrator.flux, &pruned], count)?;
    let prompts = prompts.join("\n");
    let family = calibrator.pipeline.config.family;
    drop((calibrator, pruned));
    let decoder = budget.decoder(&files, size.latent(family), vae_tile)?;
    let rows: Result<Vec<_>> = latents.iter().map(|x| decoder.images(x)).collect();
    let text = [
        ("Title", title),
        ("prompts", &prompts),
        ("Software", &record::software()),
    ];
    grid::grid(&rows?)?.save(&folder.join(IMAGE), &text)?;
    Ok(true)
}
