//! `prune`: a model → a folder with the pruned one.

use anyhow::Result;

use super::options;
use crate::{
    bench::timing,
    calibrate::{memory::CalibrationEstimate, options::ResolvedOptions, pass::Shard},
    checkpoint::target,
    cli::PruneArgs,
    prune::{self, plan::PruningPlan},
    ui::Reporter,
};

pub(super) fn run(args: &PruneArgs, reporter: &Reporter) -> Result<()> {
    let options = options::prune(args)?;
    if !args.dry_run.dry_run {
        target::check_folder(&options.output, options.force)?;
    }
    if let Some(plan) = &options.goal.plan {
        PruningPlan::read(plan)?; // a damaged one is refused before the model is opened
    }
    let (model, run) = (&args.pipeline, (args.run, args.memory));
    let (pipeline, budget) = options::open_to_calibrate(model, &args.calibration, run, reporter)?;
    if args.dry_run.dry_run {
        let resolved = ResolvedOptions::new(&pipeline, &options.calibration)?;
        let rounds = options.goal.rounds(&options.recipe, &pipeline)?;
        let memory = match rounds {
            0 => Some(0), // nothing is chosen, so nothing is summed
            _ => options.calibration.stats_memory,
        };
        let refits = Some(options.recipe.fit.refits(&pipeline.config));
        let estimate =
            CalibrationEstimate::new(&pipeline, &budget, &resolved, Shard::WHOLE, memory, refits)?;
        let speed = timing::peak(&budget.runtime().device, budget.runtime().dtype)?;
        let written = prune::run::bytes_written(&pipeline, &options)?;
        let estimate = estimate
            .with_scoring(rounds)
            .timed(speed.flops)
            .with_output(&options.output, written);
        super::show(args.output.print, &estimate, || estimate.text())?;
        return estimate.check();
    }
    let report = prune::run::run(&pipeline, &budget, &options)?;
    super::show(args.output.print, &report, || report.text())?;
    let model = super::path_word(&options.output);
    let next =
        format!("eval --model {model} (compares), or train-sandwich --model {model} (heals)");
    super::wrote(reporter, &options.output, &next);
    Ok(())
}
