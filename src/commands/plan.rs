//! `plan`: which blocks to replace, and what that will save, before anything is written.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    calibrate,
    choose::{self, Wanted},
    gather,
    session::{Session, Settings},
};
use crate::{
    checkpoint::{output, record, target},
    cli::PlanArgs,
    layout::BlockId,
    pipeline::{Pipeline, placement::MemoryBudget},
    prune::{
        forecast::{Forecast, Situation},
        plan::{PruningPlan, originals},
        recipe::PruneRecipe,
    },
    score::{Scores, ablation::HeldOut},
    ui,
};

/// A plan, and what is known of the importance of blocks.
struct Planned {
    plan: PruningPlan,
    importance: BTreeMap<BlockId, f64>,
}

pub(super) fn run(args: &PlanArgs) -> Result<()> {
    let mut recipe = calibrate::recipe(&args.calibration)?;
    recipe.ratio = args.goal.ratio.unwrap_or(recipe.ratio);
    recipe.fit.form = args.goal.form.unwrap_or(recipe.fit.form);
    recipe.validate()?;
    target::check_file(&args.output.path, args.output.force)?;
    let scores = args.scores.as_deref().map(Scores::read).transpose()?;
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let wanted = Wanted::new(&args.goal, &recipe, &pipeline, None)?;
    let (settings, images) = calibrate::settings(
        &args.calibration,
        args.stats.stats.as_deref(),
        &mut recipe,
        &pipeline,
    )?;
    let situation = choose::situation(&pipeline, &runtime, &settings);
    target::check_writable(&args.output.path)?;
    target::check_other(
        &args.output.path,
        &[args.stats.stats.as_deref(), args.scores.as_deref()],
    )?;
    let planned = match (wanted, scores) {
        (Wanted::Plan(plan), _) => Planned {
            plan,
            importance: BTreeMap::new(),
        },
        (Wanted::Choose { goal, protect }, scores) => {
            let budget = choose::budget(&pipeline, situation, &recipe, goal, &protect)?;
            if let Some(scores) = scores {
                by_scores(args, &pipeline, &budget, &protect, &scores)?
            } else {
                let sums = args.calibration.stats_memory;
                let session = Session::open(
                    &pipeline,
                    &runtime,
                    &place,
                    settings,
                    images.as_deref(),
                    sums,
                )?;
                let gathering = calibrate::gathering(&args.calibration, &args.output.path, true);
                let planned = by_model(args, &session, &recipe, &gathering, &budget, &protect)?;
                calibrate::remove_partial(&gathering.partial)?;
                planned
            }
        }
    };
    output::write_json(&args.output.path, &serde_json::to_value(&planned.plan)?)?;
    let settings = Forecast::of(&pipeline.config, situation);
    report(args, &pipeline, situation, &planned, settings)
}

/// Ranks by scores that were measured before.
fn by_scores(
    args: &PlanArgs,
    pipeline: &Pipeline,
    budget: &crate::prune::budget::Budget,
    protect: &[BlockId],
    scores: &Scores,
) -> Result<Planned> {
    let source = record::fingerprint(&pipeline.transformer)?;
    ensure!(
        scores.source == source,
        "--scores: the scores are of another model (`{}`, fingerprint {}; this one has {source})\nhint: run `fastflux score` on this model",
        scores.model,
        scores.source
    );
    let metric = args.metric.unwrap_or(scores.metric);
    scores
        .check_blocks(&originals(&pipeline.config))
        .context("--scores")?;
    let all = scores.importance(metric).context("--scores")?;
    let free: BTreeMap<BlockId, f64> = all
        .iter()
        .filter(|(id, _)| !protect.contains(id))
        .map(|(id, value)| (*id, *value))
        .collect();
    let chosen = budget.knapsack(&free)?;
    let reason = format!(
        "ranked once by {metric}: the {} of {} blocks of least importance that reach the goal",
        chosen.len(),
        pipeline.config.original_ids().count()
    );
    Ok(Planned {
        plan: budget.plan(&chosen, source, reason),
        importance: all,
    })
}

/// Chooses by running the model, one block after another.
fn by_model(
    args: &PlanArgs,
    session: &Session,
    recipe: &PruneRecipe,
    gathering: &gather::Gathering,
    budget: &crate::prune::budget::Budget,
    protect: &[BlockId],
) -> Result<Planned> {
    let calibration = gather::obtain(session, args.stats.stats.as_deref(), gathering)?;
    let states = session.states(&calibration)?;
    let Settings { batch, .. } = session.settings;
    let (device, dtype) = (&session.runtime.device, session.runtime.dtype);
    let held_out = HeldOut::new(&session.flux, &states.held_out, batch, device, dtype)?;
    let stats = calibration.stats;
    let (selection, plan) =
        choose::choose(session, recipe, stats, &states, &held_out, budget, protect)?;
    Ok(Planned {
        plan,
        importance: selection.greedy.alone,
    })
}

fn report(
    args: &PlanArgs,
    pipeline: &Pipeline,
    situation: Situation,
    planned: &Planned,
    before: Forecast,
) -> Result<()> {
    let plan = &planned.plan;
    let after = Forecast::of_plan(&pipeline.config, plan, situation);
    if args.output.print.json {
        return ui::json(&json!({
            "output": args.output.path.display().to_string(),
            "model": pipeline.name,
            "plan": plan,
            "importance": planned.importance.iter().map(|(id, v)| (id.to_string(), *v)).collect::<BTreeMap<_, _>>(),
            "image_tokens": situation.image_tokens,
            "text_tokens": situation.text_tokens,
            "before": before,
            "after": after,
            "speed_up": after.speed_up(&before),
        }));
    }
    let mut out = blocks(pipeline, planned);
    out.push_str("\n\n");
    out.push_str(&totals(&before, &after));
    out.push_str(&format!(
        "\n\n{} of {} blocks replaced ({}); for {} image and {} text tokens, by arithmetic",
        plan.blocks().count(),
        pipeline.config.original_ids().count(),
        plan.reason,
        situation.image_tokens,
        situation.text_tokens,
    ));
    ui::data(out)?;
    ui::note(format!("wrote `{}`", args.output.path.display()));
    Ok(())
}

fn blocks(pipeline: &Pipeline, planned: &Planned) -> String {
    let rows: Vec<Vec<String>> = originals(&pipeline.config)
        .into_iter()
        .map(|id| {
            let run = planned
                .plan
                .replace
                .iter()
                .find(|r| r.replaces.contains(&id));
            let state = match run {
                None => "kept".to_owned(),
                Some(run) if run.replaces.len() > 1 => {
                    format!("{} (one layer for {})", run.form, run.replaces.len())
                }
                Some(run) => run.form.to_string(),
            };
            let importance = planned.importance.get(&id);
            let importance = importance.map_or_else(|| "-".to_owned(), |v| format!("{v:.5}"));
            vec![id.to_string(), importance, state]
        })
        .collect();
    ui::table(&["block", "importance", ""], &rows, &[1])
}

/// The forecast as a table.
pub(super) fn totals(before: &Forecast, after: &Forecast) -> String {
    type Unit = fn(f64) -> String;
    let row = |what: &str, before: u64, after: u64, unit: Unit| {
        let (before, after) = (before as f64, after as f64);
        let change = format!("{:+.1} %", 100.0 * (after / before - 1.0));
        vec![what.to_owned(), unit(before), unit(after), change]
    };
    let mut rows = vec![
        row("parameters", before.parameters, after.parameters, ui::count),
        row("file", before.file_bytes, after.file_bytes, ui::bytes),
        row("memory", before.memory_bytes, after.memory_bytes, ui::bytes),
        row("per step", before.flops, after.flops, ui::flops),
    ];
    rows.push(vec![
        "speed-up".to_owned(),
        String::new(),
        format!("{:.2}×", after.speed_up(before)),
        String::new(),
    ]);
    ui::table(&["", "before", "after", ""], &rows, &[1, 2, 3])
}
