//! What an evaluation found, as the card of an evaluated model shows it and as the hub's `model-index`.

use std::{fmt::Write as _, path::Path};

use super::{
    metrics::Summary,
    report::{ModelReport, Report},
};
use crate::{
    pipeline::{Pipeline, card::CardResults},
    ui,
};

/// One number of a model and the baseline.
struct Row {
    /// As the hub calls it.
    metric: &'static str,
    name: &'static str,
    /// The baseline's, if it has one.
    before: Option<f64>,
    value: Option<f64>,
    digits: usize,
}

/// The numbers of a model.
fn rows(report: &Report, model: &ModelReport) -> Vec<Row> {
    let base = &report.baseline;
    let against = model.against_baseline.as_ref();
    let row = |metric, name, digits, before, value| Row {
        metric,
        name,
        before,
        value,
        digits,
    };
    let mean = |s: &Option<Summary>| s.as_ref().map(|s| s.mean);
    let followed = |m: &ModelReport| m.prompt_following.map(|p| 100.0 * p.ok.share);
    vec![
        row(
            "velocity_error",
            "velocity error",
            5,
            None,
            against.map(|a| a.velocity.error),
        ),
        row("psnr", "PSNR, dB", 2, None, against.map(|a| a.psnr.mean)),
        row("ssim", "SSIM", 4, None, against.map(|a| a.ssim.mean)),
        row(
            "lpips",
            "LPIPS",
            4,
            None,
            against.and_then(|a| mean(&a.lpips)),
        ),
        row(
            "prompts_followed",
            "prompts followed, %",
            1,
            followed(base),
            followed(model),
        ),
        row(
            "clip_score",
            "CLIP score",
            2,
            mean(&base.clip_score),
            mean(&model.clip_score),
        ),
        row(
            "speed_up",
            "speed of a step, times the baseline's",
            2,
            Some(1.0),
            model.speed_up,
        ),
    ]
}

/// The results of `model`, which was compared with `baseline`.
pub(super) fn results(
    report: &Report,
    model: &ModelReport,
    name: &str,
    baseline: &str,
) -> CardResults {
    let s = &report.settings;
    // a path of this machine is nobody's business
    let from = s.prompts.trim_matches('`');
    let from = match Path::new(from).file_name() {
        Some(file) if s.prompts.starts_with('`') => file.to_string_lossy().into_owned(),
        _ => from.to_owned(),
    };
    let prompts = format!("{} ({from})", ui::counted(s.images, "prompt"));
    let mut text = format!(
        "By `fastflux eval`, against `{baseline}`: {prompts}, {}×{} pixels, {}, guidance {}, seed {}, {}.\n\n| | baseline | this model |\n| --- | --- | --- |\n",
        s.width,
        s.height,
        ui::counted(s.steps, "step"),
        s.guidance,
        s.seed,
        s.runtime
    );
    let mut index = format!(
        "model-index:\n- name: {}\n  results:\n  - task:\n      type: text-to-image\n    dataset:\n      type: prompts\n      name: {}\n    metrics:\n",
        quoted(name),
        quoted(&prompts)
    );
    for row in rows(report, model) {
        let Some(value) = row.value.filter(|value| value.is_finite()) else {
            continue;
        };
        let digits = row.digits;
        let before = row
            .before
            .map_or_else(String::new, |v| format!("{v:.digits$}"));
        let _ = writeln!(text, "| {} | {before} | {value:.digits$} |", row.name);
        let _ = writeln!(
            index,
            "    - type: {}\n      name: {}\n      value: {value:.digits$}",
            row.metric,
            quoted(row.name)
        );
    }
    let _ = writeln!(
        text,
        "\nDistances are to the baseline's images and velocities; what each number is computed as: `report.json` of `fastflux eval`."
    );
    CardResults { text, index }
}

/// A text in YAML.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Puts each model's results into its card, where one of ours lies next to its weights.
pub(super) fn publish(report: &Report, baseline: &Pipeline, models: &[Pipeline]) {
    for (pipeline, model) in models.iter().zip(&report.models) {
        let results = results(
            report,
            model,
            &pipeline.public_name(),
            &baseline.public_name(),
        );
        match pipeline.publish(&results) {
            Ok(Some(card)) => pipeline
                .reporter
                .note(format!("put the results into `{}`", card.display())),
            Ok(None) => {}
            // the report is written: a card is not worth failing for
            Err(error) => pipeline
                .reporter
                .warn(format!("the model's card: {error:#}")),
        }
    }
}
