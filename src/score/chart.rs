//! Scores as the data of a chart, and the chart.

use anyhow::Result;

use super::{Metric, Scores};
use crate::plot::bars::{self, BlockBar, BlockBars};

/// The chart as the text of an SVG file: importance of every block, its change by stream, and its change by noise level.
///
/// # Errors
/// When there is no block to draw.
pub fn svg(scores: &Scores) -> Result<String> {
    let metric = shown(scores);
    let blocks = scores.blocks.iter().map(|block| BlockBar {
        block: block.block,
        value: block.scores.get(&metric).copied().unwrap_or_default(),
        text_change: block.txt.relative_change,
        image_change: block.img.relative_change,
        change_by_time: block
            .timesteps
            .iter()
            .map(|at| (at.t, at.part.relative_change))
            .collect(),
    });
    bars::svg_of(&BlockBars {
        title: format!("{metric}: {}", meaning(metric)),
        blocks: blocks.collect(),
    })
}

fn meaning(metric: Metric) -> &'static str {
    match metric {
        Metric::Ablation => "error of the final velocity with the block replaced by its linear fit",
        Metric::Removal => "error of the final velocity with the block removed",
        Metric::RelativeChange => "‖y − x‖ / ‖x‖",
        Metric::Cosine => "1 − cos(x, y)",
        Metric::FitError => "share of the change that a linear layer leaves, 1 − R²",
        Metric::FitResidual => "squared change per token that a linear layer leaves",
    }
}

/// The metric that was asked for if every block has it, otherwise the first that every block has.
fn shown(scores: &Scores) -> Metric {
    let has = |metric: &Metric| scores.blocks.iter().all(|b| b.scores.contains_key(metric));
    let first = Metric::ALL.into_iter().find(has);
    Some(scores.metric)
        .filter(has)
        .or(first)
        .unwrap_or_default()
}
