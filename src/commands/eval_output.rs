//! What `eval` writes: a JSON, a page and a grid of pictures; and its table.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    checkpoint::{output, save},
    eval::{
        html::{self, Assets, Losses, ShownPair},
        report::Report,
    },
    pipeline::Pipeline,
    sample::{grid, image, png::Picture, size::LARGE_TOKENS},
    score::{Scores, chart},
    ui,
};

/// Pairs on the page: of small and of large pictures.
const SHOWN: usize = 24;
const SHOWN_LARGE: usize = 12;
/// Longest side of pictures on the page, in pixels.
const SHOWN_SIDE: u32 = 640;
/// Pairs in pictures.png.
const IN_GRID: usize = 64;

/// Writes report.json, report.html and pictures.png.
pub(super) fn write(
    folder: &Path,
    report: &Report,
    models: &[Pipeline],
    drawn: &[Vec<Picture>],
) -> Result<()> {
    output::write_json(&folder.join("report.json"), &serde_json::to_value(report)?)?;
    let order = report.worst_first();
    let of_pair = |index: usize| drawn.iter().filter_map(move |pictures| pictures.get(index));
    let mut pairs = Vec::new();
    let large = report.settings.image_tokens >= LARGE_TOKENS;
    let shown = if large { SHOWN_LARGE } else { SHOWN };
    for &index in order.iter().take(shown) {
        let png = |picture: &Picture| image::within(picture, SHOWN_SIDE)?.to_png();
        let pictures = of_pair(index).map(png).collect::<Result<_>>()?;
        pairs.push(ShownPair { index, pictures });
    }
    let mut assets = Assets {
        pairs,
        ..Assets::default()
    };
    for model in models {
        beside(model, &mut assets)?;
    }
    let page = html::page(report, &assets)?;
    save::write_bytes(&folder.join("report.html"), page.as_bytes())?;

    let columns = if large { 4 } else { 8 };
    let order: Vec<usize> = order.into_iter().take(IN_GRID).collect();
    let mut rows = Vec::new();
    for chunk in order.chunks(columns) {
        for pictures in drawn {
            rows.push(
                chunk
                    .iter()
                    .filter_map(|i| pictures.get(*i).cloned())
                    .collect(),
            );
        }
    }
    let names: Vec<&str> = report.models.iter().map(|m| m.name.as_str()).collect();
    let title = format!(
        "worst pairs first; above: {}; below: {}",
        report.baseline.name,
        names.join(", ")
    );
    let prompts: Vec<&str> = order
        .iter()
        .map(|i| report.pairs[*i].prompt.as_str())
        .collect();
    let text = [
        ("Title", title.as_str()),
        ("prompts", &prompts.join("\n")),
        ("Software", &report.tool),
    ];
    grid::grid(&rows)?.save(&folder.join("pictures.png"), &text)
}

/// What lies beside a model: its block scores, and the losses of its training. A file that cannot be used is passed over.
fn beside(model: &Pipeline, assets: &mut Assets) -> Result<()> {
    let path = PathBuf::from(&model.name);
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().map(Path::to_path_buf).unwrap_or_default()
    };
    if !Path::new(&model.name).exists() {
        return Ok(()); // bundled, or of the hub
    }
    let scores = folder.join("scores.json");
    if scores.is_file() {
        match Scores::read(&scores) {
            Ok(scores) if !scores.blocks.is_empty() => {
                let svg = chart::svg(&scores)?;
                // models that were planned from one calibration share their scores
                match assets.scores.iter_mut().find(|(_, known)| *known == svg) {
                    Some((names, _)) => *names = format!("{names}, {}", model.name),
                    None => assets.scores.push((model.name.clone(), svg)),
                }
            }
            _ => ui::warn(format!(
                "`{}` is not a scores file and is left out",
                scores.display()
            )),
        }
    }
    let losses = match std::fs::read(folder.join("loss.svg")) {
        Ok(svg) => Some(Losses::Svg(svg)),
        Err(_) => std::fs::read_to_string(folder.join("train.jsonl"))
            .ok()
            .map(|log| losses(&log)),
    };
    assets
        .losses
        .extend(losses.map(|losses| (model.name.clone(), losses)));
    Ok(())
}

/// The losses of a training log: one JSON object a line, with `loss` and `held-out` where they were taken.
fn losses(log: &str) -> Losses {
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    let entries = log
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    // steps count anew in every phase, so the place in the log is what goes on
    for (i, entry) in entries.enumerate() {
        let number = |key: &str| entry.get(key).and_then(serde_json::Value::as_f64);
        train.extend(number("loss").map(|loss| (i as f64, loss)));
        held_out.extend(number("held-out").map(|loss| (i as f64, loss)));
    }
    Losses::Log(train, held_out)
}

/// What a terminal shows.
pub(super) fn table(report: &Report) -> String {
    // the last column only where there is something in it
    let columns = if report.settings.clip.is_some() { 9 } else { 8 };
    let rows: Vec<Vec<String>> = std::iter::once(&report.baseline)
        .chain(&report.models)
        .map(|m| {
            let against = m.against_baseline.as_ref();
            let number = |value: Option<f64>, digits: usize| {
                value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
            };
            let score = m.prompt_following.map(|p| p.ok);
            vec![
                m.name.clone(),
                ui::count(m.parameters as f64),
                format!("{:.2} ms", 1e3 * m.step.median),
                m.speed_up
                    .map_or_else(|| "-".to_owned(), |s| format!("{s:.2}x")),
                number(against.map(|a| a.velocity.error), 5),
                number(against.map(|a| a.psnr.mean), 2),
                number(against.map(|a| a.ssim.mean), 4),
                score.map_or_else(
                    || "-".to_owned(),
                    |s| {
                        format!(
                            "{:.1} ({:.1} to {:.1})",
                            100.0 * s.share,
                            100.0 * s.low,
                            100.0 * s.high
                        )
                    },
                ),
                m.clip_score.as_ref().map_or_else(
                    || "-".to_owned(),
                    |s| format!("{:.2} ± {:.2}", s.mean, s.deviation),
                ),
            ]
        })
        .map(|mut row: Vec<String>| {
            row.truncate(columns);
            row
        })
        .collect();
    let header = [
        "model",
        "parameters",
        "step",
        "speed-up",
        "velocity error",
        "PSNR, dB",
        "SSIM",
        "prompts followed, %",
        "CLIP score",
    ];
    let mut out = ui::table(&header[..columns], &rows, &[1, 2, 3, 4, 5, 6, 7, 8]);
    for (model, index) in report.models.iter().zip(0..) {
        let worst = model
            .against_baseline
            .iter()
            .flat_map(|a| a.worst.iter().take(3));
        for pair in worst.filter_map(|i| report.pairs.get(*i)) {
            let psnr = pair.models.get::<usize>(index).map_or(0.0, |m| m.psnr);
            out.push_str(&format!(
                "\nworst of {}: {psnr:.1} dB, seed {}, {}",
                model.name, pair.seed, pair.prompt
            ));
        }
    }
    out
}
