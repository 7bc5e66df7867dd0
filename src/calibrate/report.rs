//! What is in a statistics file, for `--json` and as a table.

use std::path::Path;

use serde::Serialize;

use super::{
    file::Calibration,
    recipe::CalibrationRecipe,
    stats::{BlockStats, Moments},
};
use crate::{layout::BlockId, ui};

/// What is in a statistics file.
#[derive(Clone, Debug, Serialize)]
pub struct CalibrationReport {
    /// The file.
    pub output: String,
    /// How the model is called.
    pub model: String,
    /// Whether no unit is missing.
    pub complete: bool,
    /// Units of the whole calibration.
    pub units: usize,
    /// Units that are in the file.
    pub done: usize,
    /// What made it.
    pub recipe: CalibrationRecipe,
    /// What was seen of each block.
    pub blocks: Vec<BlockReport>,
}

/// What was seen of one block.
#[derive(Clone, Debug, Serialize)]
pub struct BlockReport {
    /// The block.
    pub block: BlockId,
    /// Tokens that were seen.
    pub tokens: Streams,
    /// Tokens that entered the products.
    pub rows: Streams,
    #[serde(skip)]
    moments: Moments,
}

/// A number for each stream.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Streams {
    /// Text tokens.
    pub txt: f64,
    /// Image tokens.
    pub img: f64,
}

impl CalibrationReport {
    /// Of a calibration that was written to `output`.
    pub fn new(calibration: &Calibration, output: &Path) -> Self {
        let header = &calibration.header;
        let block = |block: &BlockStats| BlockReport {
            block: block.id,
            tokens: Streams {
                txt: block.txt.moments().tokens,
                img: block.img.moments().tokens,
            },
            rows: Streams {
                txt: block.txt.rows,
                img: block.img.rows,
            },
            moments: block.moments(),
        };
        Self {
            output: output.display().to_string(),
            model: header.model_name.clone(),
            complete: header.is_complete(),
            units: header.units,
            done: header.done.len(),
            recipe: header.recipe.clone(),
            blocks: calibration.stats.blocks.iter().map(block).collect(),
        }
    }

    /// As a table.
    pub fn text(&self) -> String {
        let row = |block: &BlockReport| {
            let m = &block.moments;
            let seen = |value: f64| {
                if m.tokens > 0.0 {
                    format!("{value:.4}")
                } else {
                    "-".to_owned()
                }
            };
            vec![
                block.block.to_string(),
                ui::count(block.rows.txt),
                ui::count(block.rows.img),
                seen((m.change_sq / m.input_sq).sqrt()),
                seen(1.0 - m.cosine / m.tokens),
            ]
        };
        let rows: Vec<Vec<String>> = self.blocks.iter().map(row).collect();
        let header = [
            "block",
            "text tokens",
            "image tokens",
            "‖y−x‖/‖x‖",
            "1 − cos",
        ];
        let mut out = ui::table(&header, &rows, &[1, 2, 3, 4]);
        if self.blocks.iter().all(|block| block.moments.tokens == 0.0) {
            out.push_str("\n\nthis shard holds only held-out images and no statistics");
        }
        if !self.complete {
            out.push_str(&format!(
                "\n\n{} of {} units; add the other shards with `fastflux merge-stats`",
                self.done, self.units
            ));
        }
        out
    }
}
