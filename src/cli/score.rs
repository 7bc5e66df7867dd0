//! Arguments of `score` and `plan`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{CalibrationArgs, MemoryArgs, PipelineArgs, RunArgs, bytes, count};
use crate::{layout::Form, score::Metric};

/// `score`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct ScoreArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Score these statistics, made by `calibrate`, instead of calibrating.
    #[arg(long, value_name = "FILE", conflicts_with_all = super::CALIBRATION)]
    pub stats: Option<PathBuf>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// What blocks are ranked by: ablation, removal, relative-change, cosine, fit-error or fit-residual. The last four
    /// follow from the statistics alone and cost no forward.
    #[arg(long, default_value_t)]
    pub metric: Metric,
    /// Scores to write, and a chart of the same name (.svg) beside them.
    #[arg(long, short, value_name = "FILE", default_value = "scores.json")]
    pub output: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// How far to prune; one of them.
#[derive(Args, Clone, Debug, Default)]
#[command(group = ArgGroup::new("goal").multiple(false))]
pub struct GoalArgs {
    /// Share of all blocks to replace, above 0 and below 1. Default: 0.2.
    #[arg(long, group = "goal")]
    pub ratio: Option<f64>,
    /// Replace just these blocks, such as double.05,single.20-24.
    #[arg(long, value_name = "LIST", group = "goal", conflicts_with = "protect")]
    pub blocks: Option<String>,
    /// At most this many parameters, such as 9.5B.
    #[arg(long, value_name = "COUNT", value_parser = count, group = "goal")]
    pub budget_params: Option<u64>,
    /// At most this much device memory while drawing, such as 16GiB: weights and activations of the transformer.
    #[arg(long, value_name = "SIZE", value_parser = bytes, group = "goal")]
    pub budget_vram: Option<u64>,
    /// At least this many times faster, by arithmetic, such as 1.2.
    #[arg(long, value_name = "FACTOR", group = "goal")]
    pub target_speedup: Option<f64>,
    /// Never replace these blocks.
    #[arg(long, value_name = "LIST")]
    pub protect: Option<String>,
}

/// `plan`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct PlanArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub goal: GoalArgs,
    /// Rank by these scores, made by `score`, instead of running the model.
    #[arg(long, value_name = "FILE", conflicts_with_all = super::CALIBRATION)]
    pub scores: Option<PathBuf>,
    /// Which of the scores. Default: the one they were made for.
    #[arg(long, requires = "scores")]
    pub metric: Option<Metric>,
    /// Choose with these statistics, made by `calibrate`, instead of calibrating.
    #[arg(long, value_name = "FILE", conflicts_with_all = super::CALIBRATION, conflicts_with = "scores")]
    pub stats: Option<PathBuf>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// What takes a block's place: linear, conditioned, modulated or remove. Default: linear.
    #[arg(long)]
    pub form: Option<Form>,
    /// Plan to write.
    #[arg(long, short, value_name = "FILE", default_value = "plan.json")]
    pub output: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
}
