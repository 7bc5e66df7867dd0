//! `merge-stats`: the statistics files of all shards → one.

use anyhow::{Context, Result, bail};

use crate::{
    calibrate::{file::Calibration, options::AGAIN, report::CalibrationReport},
    checkpoint::{target, with_hint},
    cli::MergeStatsArgs,
    ui::Reporter,
};

pub(super) fn run(args: &MergeStatsArgs, reporter: &Reporter) -> Result<()> {
    let output = &args.output.path;
    target::check_file(output, args.output.force)?;
    target::check_writable(output)?;
    let inputs: Vec<_> = args.files.iter().map(|path| Some(path.as_path())).collect();
    target::check_other(output, &inputs)?;
    let mut files = args.files.iter();
    let first = files
        .next()
        .context("merge-stats takes at least one file")?;
    // sums stay in the files and are added up a part at a time while the result is written
    let mut sum = with_hint(Calibration::open(first), AGAIN)?;
    for path in files {
        sum.add(with_hint(Calibration::open(path), AGAIN)?)
            .with_context(|| {
                format!("`{}` does not add to `{}`", path.display(), first.display())
            })?;
    }
    let header = &sum.header;
    if !header.is_complete() {
        let missing: Vec<String> = (0..header.units)
            .filter(|unit| !header.done.contains(unit))
            .map(|unit| unit.to_string())
            .collect();
        bail!(
            "{} of {} units are there; missing: {}\nhint: name the statistics files of all shards",
            header.done.len(),
            header.units,
            missing.join(", ")
        );
    }
    sum.write_output(output)?;
    let report = CalibrationReport::new(&sum, output);
    super::show(args.output.print, &report, || report.text())?;
    let next = format!("plan --stats {} --ratio 0.2", super::path_word(output));
    super::wrote(reporter, output, &next);
    Ok(())
}
