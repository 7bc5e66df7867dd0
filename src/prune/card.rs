//! Which ratio makes a model fit onto a card, and the commands that get there: by arithmetic, before anything is run.

use serde::Serialize;

use super::{
    estimate::{ModelCost, Workload},
    plan::PruningPlan,
};
use crate::{
    layout::{BlockId, BlockKind, FluxConfig, Form},
    pipeline::placement::UNCOUNTED_ON_GPU,
    ui,
};

/// Ratios that are looked at.
const RATIOS: [f64; 5] = [0.0, 0.1, 0.2, 0.3, 0.4];
/// The ratio for cards on which nothing fits as a whole.
const DEFAULT_RATIO: f64 = 0.2;
/// Share of a card's memory that programs get: the driver and kernels take the rest.
pub const USABLE: f64 = 0.92;

/// Bytes of a card that `--max-vram` with all of it leaves to the program.
pub fn within(bytes: u64) -> u64 {
    ((USABLE * bytes as f64) as u64).min(bytes.saturating_sub(UNCOUNTED_ON_GPU))
}

/// A size as `--max-vram` takes it.
fn size_word(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units
        .into_iter()
        .find(|(shift, _)| bytes.trailing_zeros() >= *shift);
    whole.map_or_else(
        || format!("{bytes}B"),
        |(shift, unit)| format!("{}{unit}", bytes >> shift),
    )
}

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
    /// What to run.
    pub commands: Vec<CardCommand>,
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

/// A plan that replaces `count` blocks, single ones first: as large as the model that is found in the end, or larger.
pub fn some_plan(config: &FluxConfig, count: usize) -> PruningPlan {
    let blocks = config.kept_ids().len();
    PruningPlan::new(
        config,
        String::new(),
        some_blocks(config, count.min(blocks.saturating_sub(1))),
        Form::Linear,
        false,
        true,
        String::new(),
    )
}

/// A command, and what it takes on the card.
#[derive(Clone, Debug, Serialize)]
pub struct CardCommand {
    /// The line to type.
    pub command: String,
    /// Bytes of the card's memory; `None` if it is too small.
    pub memory_bytes: Option<u64>,
    /// Seconds, by arithmetic at the speed of a large product here; `None` if it was not measured.
    pub seconds: Option<f64>,
}

/// What the commands take, in the order that they are run in: arithmetic, and bytes on the card.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommandCosts {
    /// Width and height of the images that are trained on.
    pub trained_on: Option<(usize, usize)>,
    /// `calibrate`, `plan`, `prune`, `train-sandwich`; memory beyond the card's means that blocks are offloaded, `None` that
    /// the command cannot work there.
    pub costs: [Option<(f64, u64)>; 4],
    /// Steps of an image.
    pub steps: usize,
    /// Operations per second.
    pub flops_per_second: Option<f64>,
}

impl CardReport {
    /// For a card of `bytes`; `model_flags` name the model and its parts, or nothing.
    pub fn new(
        model: &str,
        config: &FluxConfig,
        workload: Workload,
        size: (usize, usize),
        bytes: u64,
        model_flags: &str,
        (resized, costs): (bool, CommandCosts),
    ) -> Self {
        let whole = ModelCost::for_config(config, workload);
        let blocks = config.kept_ids().len();
        let row = |ratio: f64| {
            let plan = some_plan(config, (ratio * blocks as f64).round() as usize);
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
            format!(" --max-vram {}", size_word(bytes))
        };
        let wanted = ratio.filter(|r| *r > 0.0).unwrap_or(DEFAULT_RATIO);
        let stats = "--stats stats.safetensors";
        let flags = |(width, height): (usize, usize)| format!(" --width {width} --height {height}");
        let sides = flags(size);
        // smaller images than the model's own are asked for everywhere
        let smaller = if resized { sides.as_str() } else { "" };
        let trained = costs.trained_on.filter(|trained| *trained != size);
        let trained = trained.map_or_else(|| smaller.to_owned(), flags);
        let lines = [
            format!("fastflux calibrate {model_flags}--output stats.safetensors{smaller}{limit}"),
            format!(
                "fastflux plan {model_flags}{stats} --ratio {wanted} --output plan.json{limit}"
            ),
            format!("fastflux prune {model_flags}{stats} --plan plan.json --output pruned{limit}"),
            format!("fastflux train-sandwich --model pruned --output trained{trained}{limit}"),
            format!("fastflux generate --model trained{sides} --prompt TEXT{limit}"),
        ];
        let pruned = rows
            .iter()
            .find(|row| row.ratio.to_bits() == wanted.to_bits());
        let pruned = pruned.map_or(whole, |row| row.cost);
        let image = (
            costs.steps as f64 * pruned.flops as f64,
            pruned.memory_bytes,
        );
        let most = if ratio.is_some() {
            (USABLE * bytes as f64) as u64
        } else {
            within(bytes)
        };
        let commands = lines
            .into_iter()
            .zip(costs.costs.into_iter().chain([Some(image)]))
            .map(|(command, cost)| CardCommand {
                command,
                memory_bytes: cost.map(|(_, memory)| memory.min(most)),
                seconds: cost.and_then(|(flops, _)| Some(flops / costs.flops_per_second?)),
            })
            .collect();
        Self {
            model: model.to_owned(),
            bytes,
            size,
            rows,
            ratio,
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
        let command = |command: &CardCommand| {
            let time = command.seconds.map(ui::duration);
            let time = time.map_or_else(String::new, |time| format!("about {time}, "));
            let memory = command.memory_bytes.map(|bytes| ui::bytes(bytes as f64));
            let memory = memory.map_or_else(
                || "more than the card has (a smaller --batch or --rank takes less)".to_owned(),
                |memory| format!("{memory} of the card's memory"),
            );
            format!("# {time}{memory}\n{}", command.command)
        };
        let commands: Vec<String> = self.commands.iter().map(command).collect();
        let speed = if self
            .commands
            .iter()
            .any(|command| command.seconds.is_some())
        {
            "\ntimes are those of the arithmetic at the speed of a large product on this machine"
        } else {
            ""
        };
        format!(
            "{} on a card of {}, {}×{} in bfloat16\n\n{}\n\n{advice}{speed}\n\n{}",
            self.model,
            ui::bytes(self.bytes as f64),
            self.size.0,
            self.size.1,
            ui::table(&header, &rows, &[0, 1, 2, 3]),
            commands.join("\n")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{ModelChoice, Pipeline};

    #[test]
    fn sizes_are_written_as_people_do() {
        let sizes = [24 << 30, 12_800 << 20, 3 << 10, 1001];
        assert_eq!(sizes.map(size_word), ["24GiB", "12800MiB", "3KiB", "1001B"]);
        assert_eq!(within(8 << 30), 7 << 30);
        assert_eq!(within(100 << 30), (USABLE * (100u64 << 30) as f64) as u64);
    }

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
        let of = |bytes| {
            let costs = (false, CommandCosts::default());
            CardReport::new("x", &pipeline.config, workload, (64, 64), bytes, "", costs)
        };
        let whole = ModelCost::for_config(&pipeline.config, workload).memory_bytes as f64;
        assert_eq!(of(1 << 40).ratio, Some(0.0));
        let less = of((whole * 0.95 / USABLE) as u64);
        assert!(less.ratio.is_some_and(|ratio| ratio > 0.0), "{less:?}");
        let none = of(1000);
        assert_eq!(none.ratio, None);
        assert!(
            none.commands[0].command.ends_with(" --max-vram 1000B"),
            "{none:?}"
        );
    }
}
