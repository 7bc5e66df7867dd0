//! Which ratio makes a model fit onto a card, and the commands that get there: by arithmetic, before anything is run.

use serde::Serialize;

use super::{
    estimate::{ModelCost, Workload},
    plan::PruningPlan,
};
use crate::{
    layout::{BlockId, BlockKind, FluxConfig, Form},
    ui,
};

/// Ratios that are looked at.
const RATIOS: [f64; 5] = [0.0, 0.1, 0.2, 0.3, 0.4];
/// The ratio for cards on which nothing fits as a whole.
const DEFAULT_RATIO: f64 = 0.2;
/// Share of a card's memory that programs get: the driver and kernels take the rest.
const USABLE: f64 = 0.92;

/// The model at one ratio.
#[derive(Clone, Debug, Serialize)]
pub struct CardRow {
    /// Share of the blocks that are replaced.
    pub ratio: f64,
    /// What is left of the model. Single blocks are counted as replaced first, as they free least memory.
    pub cost: ModelCost,
    /// How many times faster a step is, by arithmetic.
    pub speed_up: f64,
    /// Whether all blocks stay on the card.
    pub fits: bool,
}

/// What a card can run.
#[derive(Clone, Debug, Serialize)]
pub struct CardReport {
    /// How the model is called.
    pub model: String,
    /// Bytes of the card.
    pub bytes: u64,
    /// Width and height of images.
    pub size: (usize, usize),
    /// The model at several ratios.
    pub rows: Vec<CardRow>,
    /// The smallest ratio at which all blocks stay on the card; `None` if some must be offloaded.
    pub ratio: Option<f64>,
    /// Seconds that calibration and scoring take on this machine, by arithmetic.
    pub seconds: Option<f64>,
    /// What to run.
    pub commands: Vec<String>,
}

/// `count` blocks, single ones first, from the last.
fn some_blocks(config: &FluxConfig, count: usize) -> Vec<BlockId> {
    let all = config.kept_ids();
    let of = |kind| all.iter().rev().filter(move |id| id.kind == kind).copied();
    of(BlockKind::Single)
        .chain(of(BlockKind::Double))
        .take(count)
        .collect()
}

impl CardReport {
    /// For a card of `bytes`; `model_flag` is `--model NAME ` or nothing, `limit` the size as the user wrote it.
    pub fn new(
        model: &str,
        config: &FluxConfig,
        workload: Workload,
        size: (usize, usize),
        bytes: u64,
        model_flag: &str,
    ) -> Self {
        let whole = ModelCost::for_config(config, workload);
        let blocks = config.kept_ids().len();
        let row = |ratio: f64| {
            let count = (ratio * blocks as f64).round() as usize;
            let chosen = some_blocks(config, count.min(blocks.saturating_sub(1)));
            let plan = PruningPlan::new(
                config,
                String::new(),
                chosen,
                Form::Linear,
                false,
                true,
                String::new(),
            );
            let cost = ModelCost::of_plan(config, &plan, workload);
            CardRow {
                ratio,
                cost,
                speed_up: cost.speed_up(&whole),
                fits: (cost.memory_bytes as f64) <= USABLE * bytes as f64,
            }
        };
        let rows: Vec<CardRow> = RATIOS.into_iter().map(row).collect();
        let ratio = rows.iter().find(|row| row.fits).map(|row| row.ratio);
        let limit = if ratio.is_some() {
            String::new()
        } else {
            format!(" --max-vram {}MiB", bytes >> 20)
        };
        let wanted = ratio.filter(|r| *r > 0.0).unwrap_or(DEFAULT_RATIO);
        let stats = "--stats stats.safetensors";
        let commands = vec![
            format!("fastflux calibrate {model_flag}--output stats.safetensors{limit}"),
            format!("fastflux plan {model_flag}{stats} --ratio {wanted} --output plan.json{limit}"),
            format!("fastflux prune {model_flag}{stats} --plan plan.json --output pruned{limit}"),
            format!("fastflux train-sandwich --model pruned --output trained{limit}"),
            format!(
                "fastflux generate --model trained --width {} --height {} --prompt TEXT{limit}",
                size.0, size.1
            ),
        ];
        Self {
            model: model.to_owned(),
            bytes,
            size,
            rows,
            ratio,
            seconds: None,
            commands,
        }
    }

    /// A table, what follows from it, and the commands.
    pub fn text(&self) -> String {
        let row = |row: &CardRow| {
            vec![
                row.ratio.to_string(),
                ui::count(row.cost.parameters as f64),
                ui::bytes(row.cost.memory_bytes as f64),
                format!("{:.2}×", row.speed_up),
                if row.fits { "fits" } else { "offloads blocks" }.to_owned(),
            ]
        };
        let rows: Vec<Vec<String>> = self.rows.iter().map(row).collect();
        let header = ["ratio", "parameters", "memory", "speed", "on the card"];
        let advice = match self.ratio {
            Some(ratio) if ratio > 0.0 => {
                format!("ratio {ratio} is the least at which all blocks stay on the card")
            }
            Some(_) => "the model fits as it is; pruning makes it faster".to_owned(),
            None => "some blocks are read from host memory in every step (--max-vram)".to_owned(),
        };
        let time = self.seconds.map_or_else(String::new, |s| {
            format!(
                "\ncalibrating and choosing blocks takes about {} on this machine",
                ui::duration(s)
            )
        });
        format!(
            "{} on a card of {}, {}×{} in bfloat16\n\n{}\n\n{advice}{time}\n\n{}",
            self.model,
            ui::bytes(self.bytes as f64),
            self.size.0,
            self.size.1,
            ui::table(&header, &rows, &[0, 1, 2, 3]),
            self.commands.join("\n")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{ModelChoice, Pipeline};

    #[test]
    fn a_smaller_card_takes_a_larger_ratio_and_the_smallest_offloads() {
        let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
        let workload = Workload {
            image_tokens: 16,
            text_tokens: 12,
            element: 2,
            weight_bytes: 2.0,
            file_bytes: 2.0,
        };
        let of = |bytes| CardReport::new("x", &pipeline.config, workload, (64, 64), bytes, "");
        let whole = ModelCost::for_config(&pipeline.config, workload).memory_bytes as f64;
        assert_eq!(of(1 << 40).ratio, Some(0.0));
        let less = of((whole * 0.95 / USABLE) as u64);
        assert!(less.ratio.is_some_and(|ratio| ratio > 0.0), "{less:?}");
        let none = of(1000);
        assert_eq!(none.ratio, None);
        assert!(none.commands[0].contains("--max-vram"), "{none:?}");
    }
}
