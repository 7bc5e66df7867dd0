//! What an evaluation writes: report.json, report.html, and a grid of images.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    Evaluation,
    html::{self, Assets, ShownPair},
};
use crate::{
    checkpoint::{output, save},
    pipeline::Pipeline,
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
        for model in models {
            add_neighbours(model, &mut assets)?;
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

/// Takes block scores and the chart of losses that lie next to a model. A file that cannot be used is left out.
fn add_neighbours(model: &Pipeline, assets: &mut Assets) -> Result<()> {
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
                    Some((names, _)) => *names = format!("{names}, {}", model.name),
                    None => assets.scores.push((model.name.clone(), svg)),
                }
            }
            _ => model.reporter.warn(format!(
                "`{}` is not a scores file and is left out",
                scores.display()
            )),
        }
    }
    if let Ok(svg) = std::fs::read(folder.join("loss.svg")) {
        assets.losses.push((model.name.clone(), svg));
    }
    Ok(())
}
