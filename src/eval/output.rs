//! What an evaluation writes: report.json, report.html, and a grid of images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{
    Evaluation,
    html::{self, Assets, ShownPair},
};
use crate::{
    checkpoint::{output, read_small, save},
    pipeline::Pipeline,
    plot::losses::{self, LossPoint},
    sample::{grid, image, png::Image},
    score::{Scores, chart},
};

/// Pairs on the page: of small and of large images.
const MAX_SHOWN: usize = 24;
const MAX_SHOWN_LARGE: usize = 12;
/// Longest side of images on the page, in pixels.
const SHOWN_SIDE: u32 = 640;
/// Pairs in images.png.
const MAX_IN_GRID: usize = 64;
/// Image tokens from which fewer are shown.
const LARGE: usize = 1024;

impl Evaluation {
    /// Writes report.json, report.html and images.png into `folder`; scores and losses that lie next to `models` are on
    /// the page.
    ///
    /// # Errors
    /// When a chart cannot be drawn or a file cannot be written.
    pub fn write(&self, folder: &Path, models: &[Pipeline]) -> Result<()> {
        let report = &self.report;
        output::write_json(&folder.join("report.json"), &serde_json::to_value(report)?)?;
        let order = report.worst_first();
        let large = report.settings.image_tokens >= LARGE;
        let shown = if large { MAX_SHOWN_LARGE } else { MAX_SHOWN };
        let mut assets = Assets::default();
        for &index in order.iter().take(shown) {
            let png = |image: &Image| image::within(image, SHOWN_SIDE)?.to_png();
            let images = self.images.iter().filter_map(|images| images.get(index));
            assets.pairs.push(ShownPair {
                index,
                images: images.map(png).collect::<Result<_>>()?,
            });
        }
        for (model, report) in models.iter().zip(&report.models) {
            add_neighbours(model, &report.name, &mut assets)?;
        }
        let page = html::page(report, &assets)?;
        save::write_bytes(&folder.join("report.html"), page.as_bytes())?;
        self.write_grid(&folder.join("images.png"), &order, large)
    }

    /// The worst pairs first, each model's row below the baseline's.
    fn write_grid(&self, path: &Path, order: &[usize], large: bool) -> Result<()> {
        let report = &self.report;
        let columns = if large { 4 } else { 8 };
        let order = &order[..order.len().min(MAX_IN_GRID)];
        let mut rows = Vec::new();
        for chunk in order.chunks(columns) {
            for images in &self.images {
                let row = chunk.iter().filter_map(|i| images.get(*i).cloned());
                rows.push(row.collect());
            }
        }
        let names: Vec<&str> = report.models.iter().map(|m| m.name.as_str()).collect();
        let title = format!(
            "worst pairs first; above: {}; below: {}",
            report.baseline.name,
            names.join(", ")
        );
        let prompts = order.iter().filter_map(|i| report.pairs.get(*i));
        let prompts: Vec<&str> = prompts.map(|pair| pair.prompt.as_str()).collect();
        let text = [
            ("Title", title.as_str()),
            ("prompts", &prompts.join("\n")),
            ("Software", &report.tool),
        ];
        grid::grid(&rows)?.save(path, &text)
    }
}

/// The chart of the losses in a `training.json`; `None` if it holds none.
fn losses_of(path: &Path) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Entry {
        phase: String,
        step: usize,
        loss: Option<f64>,
        held_out: Option<f64>,
    }
    let name = path.display();
    let mut json: serde_json::Value = serde_json::from_slice(&read_small(path)?)
        .with_context(|| format!("`{name}` is not valid JSON"))?;
    let log: Vec<Entry> = serde_json::from_value(json["log"].take()).unwrap_or_default();
    if log.is_empty() {
        return Ok(None);
    }
    let points = log.iter().map(|entry| LossPoint {
        phase: &entry.phase,
        step: entry.step,
        loss: entry.loss,
        held_out: entry.held_out,
    });
    losses::svg_of(&points.collect::<Vec<_>>()).map(Some)
}

/// Takes block scores and the chart of losses that lie next to a model. A file that cannot be used is left out.
fn add_neighbours(model: &Pipeline, name: &str, assets: &mut Assets) -> Result<()> {
    let path = PathBuf::from(&model.name);
    if !path.exists() {
        return Ok(()); // bundled, or of the hub
    }
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().map(Path::to_path_buf).unwrap_or_default()
    };
    let scores = folder.join("scores.json");
    if scores.is_file() {
        match Scores::read(&scores) {
            Ok(scores) if !scores.blocks.is_empty() => {
                let svg = chart::svg(&scores)?;
                // models that were planned from one calibration share their scores
                match assets.scores.iter_mut().find(|(_, known)| *known == svg) {
                    Some((names, _)) => *names = format!("{names}, {name}"),
                    None => assets.scores.push((name.to_owned(), svg)),
                }
            }
            _ => model.reporter.warn(format!(
                "`{}` is not a scores file and is left out",
                scores.display()
            )),
        }
    }
    let training = folder.join("training.json");
    if training.is_file() {
        // a chart that lies there may be anybody's: it is drawn again from the numbers
        match losses_of(&training) {
            Ok(Some(svg)) => assets.losses.push((name.to_owned(), svg.into_bytes())),
            Ok(None) => {}
            Err(error) => model
                .reporter
                .warn(format!("{error:#}: its losses are left out")),
        }
    }
    Ok(())
}
