//! Arguments of `score` and `plan`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{
    CalibrationArgs, MemoryArgs, OutputArgs, PipelineArgs, RunArgs, StatsArgs,
    shared::written,
    units::{bytes, count, factor, share},
};
use crate::{layout::Form, score::Metric};

/// `score`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("output", |arg| written(arg, "FILE", "scores.json", "Scores to write, and a chart of the same name (.svg) next to them"))
)]
pub struct ScoreArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// What blocks are ranked by: ablation, removal, relative-change, cosine, fit-error or fit-residual. The last four
    /// follow from the statistics alone and cost no forward.
    #[arg(long, default_value_t, help_heading = "Goal")]
    pub metric: Metric,
    #[command(flatten)]
    pub stats: StatsArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// How far to prune (one of the first five), and with what.
#[derive(Args, Clone, Debug, Default)]
#[command(
    next_help_heading = "Goal",
    group = ArgGroup::new("goal").multiple(false)
)]
pub struct GoalArgs {
    /// Share of all blocks to replace, above 0 and below 1. Default: 0.2.
    #[arg(long, group = "goal", value_parser = share, value_delimiter = ',')]
    pub ratio: Vec<f64>,
    /// Replace just these blocks, such as double.05,single.20-24.
    #[arg(long, value_name = "LIST", group = "goal", conflicts_with = "protect")]
    pub blocks: Option<String>,
    /// At most this many parameters, such as 9.5B.
    #[arg(long, value_name = "COUNT", value_parser = count, group = "goal")]
    pub budget_params: Option<u64>,
    /// At most this much device memory while generating, such as 16GiB: weights and activations of the transformer.
    #[arg(long, value_name = "SIZE", value_parser = bytes, group = "goal")]
    pub budget_vram: Option<u64>,
    /// At least this many times faster, by arithmetic, such as 1.2.
    #[arg(long, value_name = "FACTOR", value_parser = factor, group = "goal")]
    pub target_speedup: Option<f64>,
    /// Never replace these blocks.
    #[arg(long, value_name = "LIST")]
    pub protect: Option<String>,
    /// What takes a block's place: linear, conditioned, modulated or remove. Default: linear.
    #[arg(long)]
    pub form: Option<Form>,
}

/// `plan`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("ratio", |arg| arg.help("Share of all blocks to replace, above 0 and below 1; several, such as 0.1,0.2,0.3, give a plan each, a table and a chart. Default: 0.2")),
    mut_arg("output", |arg| written(arg, "FILE", "plan.json", "Plan to write"))
)]
pub struct PlanArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub goal: GoalArgs,
    /// Show what a card of this size can run, such as 24GiB, and the commands that get there; write nothing.
    #[arg(long = "for", value_name = "SIZE", value_parser = bytes, help_heading = "Goal")]
    pub card: Option<u64>,
    /// Rank by these scores, made by `score`, instead of running the model.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = super::CALIBRATION,
        conflicts_with = "stats",
        help_heading = "Goal"
    )]
    pub scores: Option<PathBuf>,
    /// Which of the scores. Default: the one they were made for.
    #[arg(long, requires = "scores", help_heading = "Goal")]
    pub metric: Option<Metric>,
    #[command(flatten)]
    pub stats: StatsArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}
