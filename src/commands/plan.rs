//! `plan`: which blocks to replace, and what that will save, before anything is written.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, ensure};

use super::options;
use crate::{
    bench::timing,
    calibrate::{
        Calibrator, memory::CalibrationEstimate, options::ResolvedOptions, pass::Shard,
        run::RunOptions,
    },
    checkpoint::{output, save, target},
    cli::PlanArgs,
    pipeline::{Pipeline, placement::MemoryBudget},
    plot::curves::{self, Curve},
    prune::{
        card::CardReport,
        curve::{self, CurveReport},
        goal::{self, PruneTarget},
        recipe::PruneRecipe,
        report::PlanReport,
        select::{self, RankedPlan, Ranking},
    },
    score::Scores,
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
    let model = super::model_flag(args.pipeline.model.model.as_deref());
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

/// Error against speed, next to the plans.
fn write_chart(report: &CurveReport, output: &Path) -> Result<()> {
    let points = report.points.iter();
    let points = points.filter_map(|point| Some((point.speed_up, point.velocity_error?)));
    let curve = Curve {
        name: report.model.clone(),
        points: points.collect(),
    };
    match curves::svg_of("times as fast", "velocity error", &[curve])? {
        Some(svg) => save::write_bytes(&output.with_extension("svg"), svg.as_bytes()),
        None => Ok(()),
    }
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
    let resolved = ResolvedOptions::new(pipeline, &calibration)?;
    let mut workload = goal::workload(pipeline, budget.runtime(), &resolved);
    workload.element = 2; // bfloat16, as GPUs compute
    workload.weight_bytes = pipeline.bytes_of_a_weight(candle::DType::BF16);
    let size = (resolved.size.width, resolved.size.height);
    let model = super::model_flag(args.pipeline.model.model.as_deref());
    let mut report = CardReport::new(
        &pipeline.name,
        &pipeline.config,
        workload,
        size,
        bytes,
        &model,
    );
    let rounds = (report.ratio.unwrap_or(0.2) * pipeline.config.kept_ids().len() as f64) as usize;
    let estimate =
        CalibrationEstimate::new(pipeline, budget, &resolved, Shard::WHOLE, Some(0), true)?;
    let speed = timing::peak(&budget.runtime().device, budget.runtime().dtype)?;
    report.seconds = estimate
        .with_scoring(rounds.max(1))
        .timed(speed.flops)
        .seconds;
    super::show(args.output.print, &report, || report.text())
}
