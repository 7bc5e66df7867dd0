//! `prune`: calibrate, score, plan, fit, write, and draw before and after.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    load,
    select::{self, Selection},
    session::Session,
};
use crate::{
    calibrate::stats::{BlockStats, Moments},
    checkpoint::{
        Checkpoint, output,
        record::{self, Record},
        save::{self, OutputFolder},
    },
    cli::PruneArgs,
    device::Runtime,
    layout::{BlockId, FluxConfig},
    model::{Flux, cost},
    pipeline::Pipeline,
    prune::{
        apply,
        layers::Layers,
        outputs,
        plan::{self, PruningPlan},
        recipe::PruneRecipe,
        refit::{self, Fits, Fitting},
    },
    score::ablation::HeldOut,
    ui,
};

/// Prompts drawn before and after, from the calibration list's end.
const PICTURES: usize = 8;
/// Larger pictures take minutes each on small machines: draw fewer.
const PICTURES_LARGE: usize = 2;

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
    let recipe = recipe(args)?;
    save::check_free(&args.output, args.force)?;
    let given = args.plan.as_deref().map(PruningPlan::read).transpose()?;
    let runtime = Runtime::resolve(args.run.device, args.run.dtype)?;
    let pipeline = super::open(&args.pipeline.choice())?;
    let wanted = Wanted::new(args, &recipe, &pipeline, given)?;
    let prompts = match &args.prompts {
        Some(path) => super::read_prompts("--prompts", path)?,
        None => super::bundled_prompts(&pipeline),
    };
    save::check_writable(&args.output)?;

    let session = Session::open(&pipeline, &runtime, recipe, prompts)?;
    let found = find(&session, wanted)?;
    let (mut checkpoint, config) = apply::apply(
        &pipeline.transformer,
        &pipeline.config,
        &found.plan,
        &found.fits.layers,
    )?;
    apply::put_outputs(&mut checkpoint, &config, &found.fits.outputs)?;
    let record = record(&session, &found, &config)?;
    let output = OutputFolder::create(&args.output, args.force)?;
    output::write(
        output.path(),
        &checkpoint,
        &config,
        Some(&record),
        args.format,
    )?;
    write(output.path(), &found)?;
    let drawn = draw_before_and_after(&session, &found, output.path())?;
    let report = report(&session, &found, &config, &checkpoint, args, drawn)?;
    output.finish()?;
    if args.json {
        ui::json(&report)?;
    } else {
        ui::data(text(&session, &found, &report))?;
    }
    ui::note(format!("wrote `{}`", args.output.display()));
    Ok(())
}

/// The recipe with flags laid over it.
fn recipe(args: &PruneArgs) -> Result<PruneRecipe> {
    let mut recipe = match &args.recipe {
        Some(path) => PruneRecipe::read(path)?,
        None => PruneRecipe::default(),
    };
    let c = &mut recipe.calibration;
    c.samples = args.samples.or(c.samples);
    c.steps = args.steps.or(c.steps);
    c.width = args.width.or(c.width);
    c.height = args.height.or(c.height);
    c.seed = args.seed.unwrap_or(c.seed);
    recipe.ratio = args.ratio.unwrap_or(recipe.ratio);
    recipe.fit.form = args.form.unwrap_or(recipe.fit.form);
    recipe.validate()?;
    Ok(recipe)
}

/// What to replace: a plan, or a number of blocks to choose.
enum Wanted {
    Plan(PruningPlan),
    Choose { count: usize, protect: Vec<BlockId> },
}

impl Wanted {
    fn new(
        args: &PruneArgs,
        recipe: &PruneRecipe,
        pipeline: &Pipeline,
        given: Option<PruningPlan>,
    ) -> Result<Self> {
        let config = &pipeline.config;
        let source = || record::fingerprint(&pipeline.transformer);
        if let Some(plan) = given {
            plan.validate(config)?;
            let found = source()?;
            ensure!(
                plan.source.is_empty() || plan.source == found,
                "--plan: the plan was made for another model (fingerprint {}, this one has {found})\nhint: empty its `source` to use it all the same",
                plan.source
            );
            return Ok(Self::Plan(PruningPlan {
                source: found,
                ..plan
            }));
        }
        if let Some(text) = &args.blocks {
            let blocks = plan::parse_blocks("--blocks", text, config)?;
            let f = &recipe.fit;
            let reason = format!("--blocks {text}");
            let plan = PruningPlan::new(
                config,
                source()?,
                blocks,
                f.form,
                f.joint,
                f.collapse,
                reason,
            );
            plan.validate(config)?;
            return Ok(Self::Plan(plan));
        }
        let count = plan::blocks_of_ratio(recipe.ratio, config)?;
        let protect = args
            .protect
            .as_deref()
            .map(|text| plan::parse_blocks("--protect", text, config));
        let protect = protect.transpose()?.unwrap_or_default();
        let free = plan::originals(config)
            .iter()
            .filter(|id| !protect.contains(id))
            .count();
        ensure!(
            count <= free,
            "--ratio {} asks for {count} blocks, but --protect leaves {free} to choose from",
            recipe.ratio
        );
        Ok(Self::Choose { count, protect })
    }
}

/// Calibrates, scores, chooses and fits.
fn find(session: &Session, wanted: Wanted) -> Result<Found> {
    let states = session.states()?;
    let (device, dtype) = (&session.runtime.device, session.runtime.dtype);
    let held_out = HeldOut::new(
        &session.flux,
        &states.held_out,
        session.batch,
        device,
        dtype,
    )?;
    let f = &session.recipe.fit;
    let (selection, plan) = match wanted {
        Wanted::Plan(plan) => (None, plan),
        Wanted::Choose { count, protect } => {
            let selection = select::select(session, &states, &held_out, count, &protect)?;
            let chosen: Vec<BlockId> = selection.greedy.choices.iter().map(|c| c.block).collect();
            let config = &session.pipeline.config;
            let reason = format!(
                "greedy: {} of {} blocks, each the one whose replacement by its linear fit costs the final velocity least",
                chosen.len(),
                config.original_ids().count()
            );
            let source = record::fingerprint(&session.pipeline.transformer)?;
            let plan =
                PruningPlan::new(config, source, chosen, f.form, f.joint, f.collapse, reason);
            (Some(selection), plan)
        }
    };
    let refit = f.refit.context("what to refit is resolved")?;
    let fitting = Fitting {
        ridge: f.ridge,
        sequential: f.sequential,
        refit,
        batch: session.batch,
        tokens: None,
    };
    let batches = states.fit.batches(session.batch).len();
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
        format!("fitted {} layers on the pruned prefix", plan.replace.len()),
    );
    let mut pruned = refit::pruned(&session.flux, &plan.replace, &fits.layers, session.runtime)?;
    outputs::put(&mut pruned, &fits.outputs, session.runtime)?;
    let velocity_error = held_out.error(&session.flux, &pruned.trunk)?;
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

fn record(session: &Session, found: &Found, config: &FluxConfig) -> Result<Record> {
    let pipeline = session.pipeline;
    let before = pipeline.record.as_ref();
    Ok(Record {
        version: record::VERSION,
        tool: load::software(),
        base: before.map_or_else(|| pipeline.locator.clone(), |r| r.base.clone()),
        base_fingerprint: before
            .map_or_else(|| found.plan.source.clone(), |r| r.base_fingerprint.clone()),
        layout: config.layout.clone(),
        axes_dims: config.axes_dims.clone(),
        theta: config.theta,
        scheduler: pipeline.scheduler.clone(),
        defaults: serde_json::to_value(&pipeline.defaults)?,
        recipe: json!({ "prune": session.recipe, "plan": found.plan }),
    })
}

/// Draws the last prompts with both models into `before-after.png`: unpruned above, pruned below.
fn draw_before_and_after(session: &Session, found: &Found, folder: &Path) -> Result<bool> {
    let files = match session.pipeline.vae_files() {
        Ok(files) => files,
        Err(error) => {
            ui::note(format!("no picture before and after: {error}"));
            return Ok(false);
        }
    };
    let vae = load::vae(&files, session.runtime)?;
    let count = if session.large() {
        PICTURES_LARGE
    } else {
        PICTURES
    };
    let (rows, prompts) = session.draw(&vae, &[&session.flux, &found.pruned], count)?;
    let grid = crate::sample::grid::grid(&rows)?;
    let title = format!(
        "above: {}; below: {} of {} blocks replaced",
        session.pipeline.name,
        found.plan.blocks().count(),
        session.pipeline.config.original_ids().count()
    );
    let text = [
        ("Title", title.as_str()),
        ("prompts", &prompts.join("\n")),
        ("Software", &load::software()),
    ];
    grid.save(&folder.join("before-after.png"), &text)?;
    Ok(true)
}

/// Writes plan and scores.
fn write(folder: &Path, found: &Found) -> Result<()> {
    output::write_json(
        &folder.join("plan.json"),
        &serde_json::to_value(&found.plan)?,
    )?;
    let Some(selection) = &found.selection else {
        return Ok(());
    };
    output::write_json(
        &folder.join("scores.json"),
        &json!({ "blocks": scores(selection, &found.plan) }),
    )
}

/// All that is known of every block.
fn scores(selection: &Selection, plan: &PruningPlan) -> Vec<serde_json::Value> {
    let blocks = selection.stats.blocks.iter();
    blocks.map(|block| score(selection, plan, block)).collect()
}

fn score(selection: &Selection, plan: &PruningPlan, block: &BlockStats) -> serde_json::Value {
    let both = |f: fn(&Moments) -> f64| f(&block.txt.moments) + f(&block.img.moments);
    // what the plain layer of either stream leaves of ‖y − x‖²
    let residual = selection
        .fits
        .get(&block.id)
        .and_then(Layers::fits)
        .map(|[txt, img]| {
            txt.error * block.txt.moments.change_sq + img.error * block.img.moments.change_sq
        });
    let change = both(|m| m.change_sq);
    json!({
        "block": block.id,
        "ablation": selection.greedy.alone.get(&block.id),
        "relative_change": (change / both(|m| m.input_sq)).sqrt(),
        "cosine": 1.0 - both(|m| m.cosine) / both(|m| m.tokens),
        "fit_residual": residual.map(|r| r / both(|m| m.tokens)),
        "fit_error": residual.map(|r| r / change),
        "replaced": plan.blocks().any(|id| id == block.id),
    })
}

/// The numbers of the run, as `--json` prints them.
fn report(
    session: &Session,
    found: &Found,
    pruned: &FluxConfig,
    written: &Checkpoint,
    args: &PruneArgs,
    drawn: bool,
) -> Result<serde_json::Value> {
    let pipeline = session.pipeline;
    let (image, text) = (session.size.tokens(), session.text_tokens()?);
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
    Ok(json!({
        "output": args.output,
        "model": pipeline.name,
        "replaced": found.plan.blocks().collect::<Vec<_>>(),
        "velocity_error": found.velocity_error,
        "before": side(&pipeline.config, &pipeline.transformer),
        "after": side(pruned, written),
        "layers": layers,
        "blocks": found.selection.as_ref().map(|selection| scores(selection, &found.plan)),
        "picture": drawn.then_some("before-after.png"),
        "recipe": session.recipe,
    }))
}

/// The same as tables.
fn text(session: &Session, found: &Found, report: &serde_json::Value) -> String {
    let number = |value: &serde_json::Value| {
        value
            .as_f64()
            .map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"))
    };
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
    let scored = found
        .selection
        .as_ref()
        .map(|selection| scores(selection, &found.plan))
        .unwrap_or_default();
    let rows: Vec<Vec<String>> = plan::originals(&session.pipeline.config)
        .into_iter()
        .map(|id| {
            let name = id.to_string();
            let score = scored
                .iter()
                .find(|s| s["block"] == name.as_str())
                .cloned()
                .unwrap_or_default();
            vec![
                name,
                number(&score["ablation"]),
                number(&score["relative_change"]),
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
