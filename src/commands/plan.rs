//! `plan`: which blocks to replace, and what that will save, before anything is written.

use std::collections::BTreeMap;

use anyhow::Result;

use super::options;
use crate::{
    calibrate::{Calibrator, options::ResolvedOptions, run::RunOptions},
    checkpoint::{output, target},
    cli::PlanArgs,
    prune::{
        goal::{self, PruneTarget},
        report::PlanReport,
        select::{self, RankedPlan},
    },
    score::Scores,
    ui::Reporter,
};

pub(super) fn run(args: &PlanArgs, reporter: &Reporter) -> Result<()> {
    let mut recipe = options::recipe_for(&args.calibration, &args.goal)?;
    let output = &args.output.path;
    target::check_file(output, args.output.force)?;
    let scores = args.scores.as_deref().map(Scores::read).transpose()?;
    let (pipeline, budget) = options::open_within(&args.pipeline, args.run, args.memory, reporter)?;
    let wanted = PruneTarget::new(&options::goal(&args.goal, None), &recipe, &pipeline)?;
    let calibration = options::calibration(&args.calibration, Some(&args.stats), &recipe);
    let resolved = ResolvedOptions::new(&pipeline, &calibration)?;
    recipe.resolve(&pipeline, &resolved);
    let workload = goal::workload(&pipeline, budget.runtime(), &resolved);
    target::check_writable(output)?;
    target::check_other(
        output,
        &[args.scores.as_deref(), args.stats.stats.as_deref()],
    )?;
    let ranked = match (wanted, scores) {
        (PruneTarget::Plan(plan), _) => RankedPlan {
            plan,
            importance: BTreeMap::new(),
        },
        (PruneTarget::Goal { goal, protect }, scores) => {
            let goal = goal::budget(&pipeline, workload, &recipe, goal, &protect)?;
            if let Some(scores) = scores {
                select::by_scores(&pipeline, &goal, &protect, &scores, args.metric)?
            } else {
                let memory = calibration.stats_memory;
                let calibrator = Calibrator::open(&pipeline, &budget, resolved, memory)?;
                let run = RunOptions::for_output(output, calibration.save_every);
                let calibration = calibrator.load_or_run(&run)?;
                let noised = calibrator.noised(&calibration)?;
                let held_out = calibrator.held_out(&noised)?;
                let (stats, r) = (calibration.stats, &recipe);
                let (selection, plan) =
                    select::by_model(&calibrator, r, stats, &noised, &held_out, &goal, &protect)?;
                run.remove_partial()?;
                RankedPlan {
                    plan,
                    importance: selection.greedy.alone,
                }
            }
        }
    };
    output::write_json(output, &serde_json::to_value(&ranked.plan)?)?;
    let report = PlanReport::new(&pipeline, ranked, workload, output);
    super::show(args.output.print, &report, || report.text())?;
    reporter.note(format!("wrote `{}`", output.display()));
    Ok(())
}
