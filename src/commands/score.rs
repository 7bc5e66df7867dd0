//! `score`: every block with all its scores, as a file, a table and a chart.

use anyhow::{Result, ensure};

use super::options;
use crate::{
    calibrate::{Calibrator, options::ResolvedOptions, run::RunOptions},
    checkpoint::target,
    cli::ScoreArgs,
    score::measure,
    ui::Reporter,
};

pub(super) fn run(args: &ScoreArgs, reporter: &Reporter) -> Result<()> {
    let recipe = options::recipe(&args.calibration)?;
    let output = &args.output.path;
    let chart = output.with_extension("svg");
    ensure!(
        chart != *output,
        "--output `{}` is the name of the chart that is put next to the scores\nhint: name a .json file",
        chart.display()
    );
    target::check_file(output, args.output.force)?;
    target::check_file(&chart, args.output.force)?;
    let (model, run) = (&args.pipeline, (args.run, args.memory));
    let (pipeline, budget) = options::open_to_calibrate(model, &args.calibration, run, reporter)?;
    let calibration = options::calibration(&args.calibration, Some(&args.stats), &recipe);
    let resolved = ResolvedOptions::new(&pipeline, &calibration)?;
    target::check_writable(output)?;
    target::check_writable(&chart)?;
    target::check_other(output, &[args.stats.stats.as_deref()])?;
    let calibrator = Calibrator::open(&pipeline, &budget, resolved, calibration.stats_memory)?;
    let run = RunOptions::for_output(output, calibration.save_every);
    let calibration = calibrator.load_or_run(&run)?;
    let scores = measure::score(
        &calibrator,
        &calibration,
        args.metric,
        recipe.fit.ridge,
        &run,
    )?;
    scores.write(output, &chart)?;
    run.remove_partial()?;
    super::show(args.output.print, &scores, || scores.text())?;
    reporter.note(format!(
        "wrote `{}` and `{}`",
        output.display(),
        chart.display()
    ));
    let model = super::model_flags(&args.pipeline);
    let scores = super::quoted(&output.display().to_string());
    super::suggest(
        reporter,
        &format!("plan {model}--scores {scores} --ratio 0.1,0.2,0.3"),
    );
    Ok(())
}
