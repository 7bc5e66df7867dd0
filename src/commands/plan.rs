//! `plan`: which blocks to replace, and what that will save, before anything is written.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, ensure};

use super::options;
use crate::{
    bench::timing,
    calibrate::{Calibrator, options::ResolvedOptions, run::RunOptions},
    checkpoint::{output, save, target},
    cli::PlanArgs,
    pipeline::{Pipeline, placement::MemoryBudget},
    plot::curves::{self, Curve},
    prune::{
        curve::{self, CurvePoint, CurveReport},
        goal::{self, PruneTarget},
        recipe::PruneRecipe,
        report::PlanReport,
        select::{self, RankedPlan, Ranking},
    },
    score::Scores,
    train::card::{self, Card},
    ui::Reporter,
};

pub(super) fn run(args: &PlanArgs, reporter: &Reporter) -> Result<()> {
    let mut recipe = options::recipe_for(&args.calibration, &args.goal)?;
    let scores = args.scores.as_deref().map(Scores::read).transpose()?;
    let (model, run) = (&args.pipeline, (args.run, args.memory));
    let (pipeline, budget) = options::open_to_calibrate(model, &args.calibration, run, reporter)?;
    if let Some(bytes) = args.card {
        return for_card(args, &pipeline, &budget, &recipe, bytes);
    }
    let ratios = &args.goal.ratio;
    let outputs = match ratios.as_slice() {
        [] | [_] => vec![args.output.path.clone()],
        several => several
            .iter()
            .map(|ratio| curve::output_of(&args.output.path, *ratio))
            .collect(),
    };
    for output in &outputs {
        target::check_file(output, args.output.force)?;
        target::check_writable(output)?;
        target::check_other(
            output,
            &[args.scores.as_deref(), args.stats.stats.as_deref()],
        )?;
    }
    let wanted = PruneTarget::new(&options::goal(&args.goal, None), &recipe, &pipeline)?;
    let calibration = options::calibration(&args.calibration, Some(&args.stats), &recipe);
    let resolved = ResolvedOptions::new(&pipeline, &calibration)?;
    recipe.resolve(&pipeline, &resolved);
    let workload = goal::workload(&pipeline, budget.runtime(), &resolved);
    let ranking = match (wanted, scores) {
        (PruneTarget::Plan(plan), _) => Ranking::new(RankedPlan {
            plan,
            importance: BTreeMap::new(),
        }),
        (PruneTarget::Goal { goal, protect }, Some(scores)) => {
            let goal = goal::budget(&pipeline, workload, &recipe, goal, &protect)?;
            let metric = args.metric;
            Ranking::new(select::by_scores(
                &pipeline, &goal, &protect, &scores, metric,
            )?)
        }
        (PruneTarget::Goal { goal, protect }, None) => {
            let goal = goal::budget(&pipeline, workload, &recipe, goal, &protect)?;
            let memory = calibration.stats_memory;
            let calibrator = Calibrator::open(&pipeline, &budget, resolved, memory)?;
            let run = RunOptions::for_output(&args.output.path, calibration.save_every);
            let ranking = select::rank(&calibrator, &recipe, &run, &goal, &protect)?;
            run.remove_partial()?;
            ranking
        }
    };
    let print = args.output.print;
    let model = super::model_flags(&args.pipeline);
    if outputs.len() > 1 {
        let plans = ranking.of_ratios(ratios, &pipeline.config, recipe.fit.collapse)?;
        curve::write(&plans, &args.output.path)?;
        let path = &args.output.path;
        let report = CurveReport::new(&pipeline.name, &pipeline.config, workload, &plans, path);
        write_chart(&report, path)?;
        super::show(print, &report, || report.text())?;
        let next = format!("prune {model}--plan {}", super::path_word(&outputs[0]));
        super::suggest(reporter, &next);
        return Ok(());
    }
    let output = &outputs[0];
    output::write_json(output, &serde_json::to_value(&ranking.ranked.plan)?)?;
    let report = PlanReport::new(&pipeline, ranking.ranked, workload, output);
    super::show(print, &report, || report.text())?;
    let next = format!("prune {model}--plan {}", super::path_word(output));
    super::wrote(reporter, output, &next);
    Ok(())
}

/// Error against speed and against size, next to the plans: `plan.svg` and `plan-size.svg`.
fn write_chart(report: &CurveReport, output: &Path) -> Result<()> {
    type Number = fn(&CurvePoint) -> f64;
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let charts: [(&str, String, Number); 2] = [
        ("times as fast", format!("{stem}.svg"), |p| p.speed_up),
        ("million parameters", format!("{stem}-size.svg"), |p| {
            p.cost.parameters as f64 / 1e6
        }),
    ];
    for (axis, file, x) in charts {
        let points = report.points.iter();
        let points = points.filter_map(|point| Some((x(point), point.velocity_error?)));
        let curve = Curve {
            name: report.model.clone(),
            points: points.collect(),
        };
        if let Some(svg) = curves::svg_of(axis, "velocity error", &[curve])? {
            save::write_bytes(&output.with_file_name(file), svg.as_bytes())?;
        }
    }
    Ok(())
}

/// `--for`: what a card can run, and the commands.
fn for_card(
    args: &PlanArgs,
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    recipe: &PruneRecipe,
    bytes: u64,
) -> Result<()> {
    ensure!(args.goal.ratio.len() < 2, "--for takes no list of ratios");
    let calibration = options::calibration(&args.calibration, None, recipe);
    let model = super::model_flags(&args.pipeline);
    let speed = timing::peak(&budget.runtime().device, budget.runtime().dtype)?;
    let card = Card {
        bytes,
        flops_per_second: speed.flops,
        model_flags: &model,
    };
    let report = card::report(pipeline, &calibration, card)?;
    super::show(args.output.print, &report, || report.text())
}
