//! Arguments of `prune`.

use std::path::PathBuf;

use clap::Args;

use super::{
    CalibrationArgs, DecodeArgs, DryRunArgs, FolderArgs, GoalArgs, MemoryArgs, OutputArgs,
    PatchArgs, PipelineArgs, RunArgs, StatsArgs, shared::written,
};
use crate::prune::projections::RefitProjections;

/// `prune`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("patch", |arg| arg.num_args(0..=1).default_missing_value(PatchArgs::WRITE).value_name("FILE").help("Without FILE: write patch.safetensors, what differs from the base, in place of the whole checkpoint. With FILE: prune the model that this patch makes of --model")),
    mut_arg("output", |arg| written(arg, "DIR", "pruned", "Folder to write; must not exist yet (see --force)"))
)]
pub struct PruneArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub goal: GoalArgs,
    /// Carry out this plan (made by `plan`, an earlier run or yourself, as below) instead of choosing blocks.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["goal", "protect", "form"], help_heading = "Goal")]
    pub plan: Option<PathBuf>,
    /// Fit the last projections of kept blocks again too: all, head (only the model's own last one) or none. Default: all up to a width of 1024, head above.
    #[arg(long, value_name = "WHICH", help_heading = "Goal")]
    pub refit_projections: Option<RefitProjections>,
    #[command(flatten)]
    pub stats: StatsArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub decode: DecodeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub folder: FolderArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}
