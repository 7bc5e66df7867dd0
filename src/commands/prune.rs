//! `prune`: calibrate, score, plan, fit, write, and draw before and after.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    calibrate,
    choose::{self, Wanted},
    demand::Demand,
    gather, score,
    select::Selection,
    session::Session,
};
use crate::{
    calibrate::{file::Calibration, pass::Shard},
    checkpoint::{
        Checkpoint, convert, output, record,
        target::{self, OutputFolder},
    },
    cli::PruneArgs,
    layout::{BlockId, FluxConfig},
    model::{Flux, cost},
    pipeline::placement::MemoryBudget,
    prune::{
        apply,
        layers::Layers,
        outputs::{self, Refit},
        plan::{self, PruningPlan},
        recipe::PruneRecipe,
        refit::{self, Fits, Fitting},
    },
    score::{BlockScore, Metric, Scores, ablation::HeldOut},
    ui,
};

/// Prompts drawn before and after, from the calibration list's end.
const PICTURES: usize = 8;
/// Larger pictures take minutes each on small machines: draw fewer.
const PICTURES_LARGE: usize = 2;

/// The pictures of both.
const PICTURE: &str = "before-after.png";

/// What a run found.
struct Found {
    /// `None` where the plan was given, so that no block was scored.
    selection: Option<Selection>,
    plan: PruningPlan,
    fits: Fits,
    /// The model with the layers in place.
    pruned: Flux,
    /// Relative mean squared error of its velocity on held-out states.
    velocity_error: f64,
}

pub(super) fn run(args: &PruneArgs) -> Result<()> {
    if args.dry_run.dry_run {
        return dry_run(args);
    }
    let (report, text) = make(args)?;
    if args.output.print.json {
        ui::json(&report)?;
    } else {
        ui::data(text)?;
    }
    ui::note(format!("wrote `{}`", args.output.path.display()));
    Ok(())
}

/// Says what it will take, and does nothing.
fn dry_run(args: &PruneArgs) -> Result<()> {
    let mut recipe = recipe(args)?;
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let (settings, _) = calibrate::settings(
        &args.calibration,
        args.stats.stats.as_deref(),
        &mut recipe,
        &pipeline,
    )?;
    let demand = Demand {
        shard: Shard::WHOLE,
        sums: args.calibration.stats_memory,
        fitting: true,
    };
    demand.say(&pipeline, &place, &settings, args.output.print.json)
}

/// Does everything but print; returns what to print.
pub(super) fn make(args: &PruneArgs) -> Result<(serde_json::Value, String)> {
    let mut recipe = recipe(args)?;
    target::check_folder(&args.output.path, args.output.force)?;
    let given = args.plan.as_deref().map(PruningPlan::read).transpose()?;
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let usual = Refit::usual(pipeline.config.hidden_size);
    recipe.fit.refit.get_or_insert(usual);
    let wanted = Wanted::new(&args.goal, &recipe, &pipeline, given)?;
    let (settings, images) = calibrate::settings(
        &args.calibration,
        args.stats.stats.as_deref(),
        &mut recipe,
        &pipeline,
    )?;
    let situation = choose::situation(&pipeline, &runtime, &settings);
    if let Wanted::Choose { goal, protect } = &wanted {
        choose::budget(&pipeline, situation, &recipe, *goal, protect)?; // before the long part
    }
    target::check_writable(&args.output.path)?;

    let sums = matches!(wanted, Wanted::Choose { .. });
    let memory = if sums {
        args.calibration.stats_memory
    } else {
        Some(0)
    };
    let session = Session::open(
        &pipeline,
        &runtime,
        &place,
        settings,
        images.as_deref(),
        memory,
    )?;
    let gathering = calibrate::gathering(&args.calibration, &args.output.path, sums);
    let calibration = gather::obtain(&session, args.stats.stats.as_deref(), &gathering)?;
    let found = find(&session, &recipe, calibration, wanted)?;
    let (mut checkpoint, config) = apply::apply(
        &pipeline.transformer,
        &pipeline.config,
        &found.plan,
        &found.fits.layers,
    )?;
    apply::put_outputs(&mut checkpoint, &config, &found.fits.outputs)?;
    let (checkpoint, widened) = convert::for_safetensors(&checkpoint);
    if widened > 0 {
        ui::note(format!(
            "{widened} tensors that are GGML blocks in `{}` are written in bf16 (`fastflux convert` packs them again)",
            pipeline.name
        ));
    }
    let record = pipeline.record_of(&config, json!({ "prune": recipe, "plan": found.plan }))?;
    let output = OutputFolder::create(&args.output.path, args.output.force)?;
    output::write(
        output.path(),
        &checkpoint,
        &config,
        Some(&record),
        args.layout.layout,
    )?;
    write(&session, output.path(), &found)?;
    let mut report = report(&session, &recipe, &found, &config, &checkpoint, args);
    let text = text(&session, &found, &report);
    let drawn = draw_before_and_after(session, found, &place, args.decode.vae_tile, output.path())?;
    report["picture"] = json!(drawn.then_some(PICTURE));
    output.finish()?;
    calibrate::remove_partial(&gathering.partial)?;
    Ok((report, text))
}

/// The recipe with flags laid over it.
fn recipe(args: &PruneArgs) -> Result<PruneRecipe> {
    let mut recipe = calibrate::recipe(&args.calibration)?;
    recipe.ratio = args.goal.ratio.unwrap_or(recipe.ratio);
    recipe.fit.form = args.goal.form.unwrap_or(recipe.fit.form);
    recipe.validate()?;
    Ok(recipe)
}

/// Calibrates, scores, chooses and fits.
fn find(
    session: &Session,
    recipe: &PruneRecipe,
    calibration: Calibration,
    wanted: Wanted,
) -> Result<Found> {
    let states = session.states(&calibration)?;
    let (device, dtype) = (&session.runtime.device, session.runtime.dtype);
    let held_out = HeldOut::new(
        &session.flux,
        &states.held_out,
        session.settings.batch,
        device,
        dtype,
    )?;
    let f = &recipe.fit;
    let (selection, plan) = match wanted {
        Wanted::Plan(plan) => (None, plan),
        Wanted::Choose { goal, protect } => {
            let situation = choose::situation(session.pipeline, session.runtime, &session.settings);
            let budget = choose::budget(session.pipeline, situation, recipe, goal, &protect)?;
            let stats = calibration.stats;
            let (selection, plan) = choose::choose(
                session, recipe, stats, &states, &held_out, &budget, &protect,
            )?;
            (Some(selection), plan)
        }
    };
    let refit = f.refit.context("what to refit is resolved")?;
    let fitting = Fitting {
        ridge: f.ridge,
        sequential: f.sequential,
        refit,
        batch: session.settings.batch,
        tokens: session.settings.recipe.tokens_per_forward,
        // there were sums of calibration, which are gone now
        on_device: gather::bytes_of_kept(&session.pipeline.config, session.sums),
    };
    let batches = states.fit.batches(session.settings.batch).len();
    let steps = refit::steps(&session.flux.trunk, batches, &plan.replace, refit);
    let progress = ui::progress(steps, "fitting");
    let fits = refit::fit_layers(
        &session.flux,
        &states.fit,
        &plan.replace,
        fitting,
        session.runtime,
        &progress,
    )?;
    ui::done(
        &progress,
        format!("fitted {} on the pruned prefix", layers(plan.replace.len())),
    );
    let mut pruned = refit::pruned(&session.flux, &plan.replace, &fits.layers, session.runtime)?;
    outputs::put(&mut pruned, &fits.outputs, session.runtime)?;
    let velocity_error = held_out.error(&pruned, &pruned.trunk)?;
    ensure!(
        velocity_error.is_finite(),
        "the pruned model's velocity is NaN or infinite"
    );
    Ok(Found {
        selection,
        plan,
        fits,
        pruned,
        velocity_error,
    })
}

/// Draws the last prompts with both models into `before-after.png`: unpruned above, pruned below. The models are gone
/// when the VAE comes.
fn draw_before_and_after(
    session: Session,
    found: Found,
    place: &MemoryBudget,
    vae_tile: Option<usize>,
    folder: &Path,
) -> Result<bool> {
    let files = match session.pipeline.vae_files() {
        Ok(files) => files,
        Err(error) => {
            ui::note(format!("no picture before and after: {error}"));
            return Ok(false);
        }
    };
    let count = if session.settings.large() {
        PICTURES_LARGE
    } else {
        PICTURES
    };
    let (latents, prompts) = session.draw(&[&session.flux, &found.pruned], count)?;
    let prompts = prompts.join("\n");
    let title = format!(
        "above: {}; below: {} of {} blocks replaced",
        session.pipeline.name,
        found.plan.blocks().count(),
        session.pipeline.config.original_ids().count()
    );
    let size = session.settings.size.latent();
    drop((session, found));
    let decoder = place.decoder(&files, size, vae_tile)?;
    let rows: Result<Vec<_>> = latents.iter().map(|x| decoder.pictures(x)).collect();
    let grid = crate::sample::grid::grid(&rows?)?;
    let text = [
        ("Title", title.as_str()),
        ("prompts", &prompts),
        ("Software", &record::software()),
    ];
    grid.save(&folder.join(PICTURE), &text)?;
    Ok(true)
}

/// Writes plan, scores and their chart.
fn write(session: &Session, folder: &Path, found: &Found) -> Result<()> {
    output::write_json(
        &folder.join("plan.json"),
        &serde_json::to_value(&found.plan)?,
    )?;
    let Some(selection) = &found.selection else {
        return Ok(());
    };
    let scores = Scores {
        model: session.pipeline.name.clone(),
        source: found.plan.source.clone(),
        metric: Metric::Ablation,
        blocks: scores(selection),
    };
    let path = folder.join("scores.json");
    score::write(&scores, &path, &path.with_extension("svg"))
}

/// All that is known of every block.
fn scores(selection: &Selection) -> Vec<BlockScore> {
    let measured = BTreeMap::from([(Metric::Ablation, selection.greedy.alone.clone())]);
    score::of_blocks(&selection.stats, &selection.fits, &measured)
}

fn layers(count: usize) -> String {
    format!("{count} layer{}", if count == 1 { "" } else { "s" })
}

/// The numbers of the run, as `--json` prints them.
fn report(
    session: &Session,
    recipe: &PruneRecipe,
    found: &Found,
    pruned: &FluxConfig,
    written: &Checkpoint,
    args: &PruneArgs,
) -> serde_json::Value {
    let pipeline = session.pipeline;
    let (image, text) = (session.settings.size.tokens(), session.settings.text_tokens);
    let side = |config: &FluxConfig, checkpoint: &Checkpoint| {
        json!({
            "parameters": checkpoint.parameters(),
            "bytes": checkpoint.bytes(),
            "flops_per_step": cost::model(config, image, text).flops(),
        })
    };
    let layers: Vec<_> = found
        .plan
        .replace
        .iter()
        .map(|r| {
            let fits = r
                .replaces
                .first()
                .and_then(|id| found.fits.layers.get(id))
                .and_then(Layers::fits);
            json!({
                "replaces": r.replaces,
                "form": r.form,
                "fit_error": fits.map(|[txt, img]| json!({ "txt": txt.error, "img": img.error })),
                "ridge": fits.map(|[txt, img]| json!({ "txt": txt.ridge, "img": img.ridge })),
            })
        })
        .collect();
    json!({
        "output": args.output.path.display().to_string(),
        "model": pipeline.name,
        "replaced": found.plan.blocks().collect::<Vec<_>>(),
        "velocity_error": found.velocity_error,
        "before": side(&pipeline.config, &pipeline.transformer),
        "after": side(pruned, written),
        "layers": layers,
        "blocks": found.selection.as_ref().map(scores),
        "picture": null,
        "recipe": recipe,
    })
}

/// The same as tables.
fn text(session: &Session, found: &Found, report: &serde_json::Value) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    let fit_error = |id: BlockId| {
        let run = found.plan.replace.iter().find(|r| r.replaces.contains(&id));
        let fits = run
            .and_then(|r| r.replaces.first())
            .and_then(|first| found.fits.layers.get(first));
        let [txt, img] = fits.and_then(Layers::fits)?;
        Some(format!("{:.3} / {:.3}", txt.error, img.error))
    };
    let state = |id: BlockId| {
        let run = found.plan.replace.iter().find(|r| r.replaces.contains(&id));
        run.map_or_else(|| "kept".to_owned(), |r| r.form.to_string())
    };
    let scored = found.selection.as_ref().map(scores).unwrap_or_default();
    let rows: Vec<Vec<String>> = plan::originals(&session.pipeline.config)
        .into_iter()
        .map(|id| {
            let name = id.to_string();
            let score = scored.iter().find(|s| s.block == id);
            let value = |metric| score.and_then(|s| s.scores.get(&metric).copied());
            vec![
                name,
                number(value(Metric::Ablation)),
                number(value(Metric::RelativeChange)),
                state(id),
                fit_error(id).unwrap_or_default(),
            ]
        })
        .collect();
    let header = [
        "block",
        "importance",
        "‖y−x‖/‖x‖",
        "",
        "fit error, text / image",
    ];
    let mut out = ui::table(&header, &rows, &[1, 2]);
    let get = |side: &str, what: &str| report[side][what].as_f64().unwrap_or_default();
    let row = |what: &str, key: &str, unit: fn(f64) -> String| {
        let (before, after) = (get("before", key), get("after", key));
        let change = format!("{:+.1} %", 100.0 * (after / before - 1.0));
        vec![what.to_owned(), unit(before), unit(after), change]
    };
    let totals = [
        row("parameters", "parameters", ui::count),
        row("bytes", "bytes", ui::bytes),
        row("per step", "flops_per_step", ui::flops),
    ];
    out.push_str("\n\n");
    out.push_str(&ui::table(
        &["", "before", "after", ""],
        &totals,
        &[1, 2, 3],
    ));
    out.push_str(&format!(
        "\n\n{} of {} blocks replaced; the velocity of the pruned model is off by {:.4} (relative MSE, held-out states)",
        found.plan.blocks().count(),
        session.pipeline.config.original_ids().count(),
        found.velocity_error
    ));
    out
}
