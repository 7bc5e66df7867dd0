//! `calibrate`: one pass over the model's own noised latents, its sums into a statistics file; and what it takes.

use anyhow::Result;

use super::options;
use crate::{
    bench::timing,
    calibrate::{
        Calibrator, memory::CalibrationEstimate, options::ResolvedOptions, pass::Shard,
        report::CalibrationReport, run::RunOptions,
    },
    checkpoint::target,
    cli::CalibrateArgs,
    ui::Reporter,
};

pub(super) fn run(args: &CalibrateArgs, reporter: &Reporter) -> Result<()> {
    let recipe = options::recipe(&args.calibration)?;
    let output = &args.output.path;
    if !args.dry_run.dry_run {
        target::check_file(output, args.output.force)?;
    }
    let (model, run) = (&args.pipeline, (args.run, args.memory));
    let (pipeline, budget) = options::open_to_calibrate(model, &args.calibration, run, reporter)?;
    let calibration = options::calibration(&args.calibration, None, &recipe);
    let options = ResolvedOptions::new(&pipeline, &calibration)?;
    let shard = args.shard.unwrap_or(Shard::WHOLE);
    let memory = calibration.stats_memory;
    if args.dry_run.dry_run {
        let estimate = CalibrationEstimate::new(&pipeline, &budget, &options, shard, memory, None)?;
        let speed = timing::peak(&budget.runtime().device, budget.runtime().dtype)?;
        let estimate = estimate.timed(speed.flops).with_output(output, 0);
        super::show(args.output.print, &estimate, || estimate.text())?;
        return estimate.check();
    }
    target::check_writable(output)?;
    let calibrator = Calibrator::open(&pipeline, &budget, options, memory)?;
    let run = RunOptions {
        shard,
        more: false, // the output is written at once
        ..RunOptions::for_output(output, calibration.save_every)
    };
    let calibration = calibrator.run(&run)?;
    calibration.write_output(output)?;
    run.remove_partial()?;
    let report = CalibrationReport::new(&calibration, output);
    super::show(args.output.print, &report, || report.text())?;
    let model = super::model_flags(&args.pipeline);
    let next = format!(
        "plan {model}--stats {} --ratio 0.2",
        super::path_word(output)
    );
    super::wrote(reporter, output, &next);
    Ok(())
}
