//! Arguments of `calibrate` and `merge-stats`, and of every command that calibrates on the way.

use std::path::PathBuf;

use clap::Args;

use super::{
    DryRunArgs, MemoryArgs, OutputArgs, PipelineArgs, PromptsArgs, RecipeArgs, RunArgs, SeedArgs,
    SizeArgs, TrueCfgArgs,
    shared::written,
    units::{bytes, whole},
};
use crate::{
    calibrate::{pass::Shard, recipe::LatentSource},
    pipeline::defaults::MAX_STEPS_OF_DATA,
};

/// The flags that make no sense next to a calibration that was made before.
pub const CALIBRATION: [&str; 11] = [
    "prompts",
    "images",
    "image",
    "source",
    "num_prompts",
    "steps",
    "width",
    "height",
    "seed",
    "tokens_per_forward",
    "stats_memory",
];

/// What to calibrate on.
#[derive(Args, Clone, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    next_help_heading = "Calibration",
    mut_arg("prompts", |arg| arg.help("Prompts to calibrate with, one a line. Default: a bundled list")),
    mut_arg("num_prompts", |arg| arg.help("How many prompts to sample for calibration. Default: 640 for small images, 96 for large ones")),
    mut_arg("width", |arg| arg.help("Image width of calibration, in pixels. Default: the model's own")),
    mut_arg("height", |arg| arg.help("Image height of calibration, in pixels. Default: the model's own")),
    mut_arg("seed", |arg| arg.help("Seed of calibration. Default: 0"))
)]
pub struct CalibrationArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub prompts: PromptsArgs,
    /// Calibrate on these images (PNG, JPEG) instead of sampling; the caption of fox.jpg is in fox.txt.
    #[arg(long, value_name = "DIR", conflicts_with = "prompts")]
    pub images: Option<PathBuf>,
    /// A reference image (PNG, JPEG) for a model that edits (FLUX.2, FLUX.1-Kontext); given several times, the first is that of
    /// the first prompt and so on.
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Of earlier versions, where it could be `trajectory` too.
    #[arg(long, hide = true, conflicts_with = "images")]
    pub source: Option<LatentSource>,
    /// Sampling steps of calibration. Default: 4 for small images and 8 for large ones, or the
    /// model's own if that is lower.
    #[arg(long, value_parser = whole(1, MAX_STEPS_OF_DATA))]
    pub steps: Option<usize>,
    #[command(flatten)]
    pub cfg: TrueCfgArgs,
    #[command(flatten)]
    pub size: SizeArgs,
    #[command(flatten)]
    pub seed: SeedArgs,
    /// Tokens of each stream that enter the sums of one forward. Default: all.
    #[arg(long, value_name = "N", value_parser = whole(1, usize::MAX))]
    pub tokens_per_forward: Option<usize>,
    /// Memory for the sums, such as 8GiB; if not all blocks fit, a first cheap pass chooses candidates.
    /// Default: half of what is free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub stats_memory: Option<u64>,
    /// Save the calibration after this many seconds of work, as OUTPUT.partial, and the comparison of blocks as
    /// OUTPUT.partial.json; the same command goes on from there. Fits are made again.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub save_every: u64,
}

/// A calibration that was made before.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Calibration")]
pub struct StatsArgs {
    /// Use these statistics, made by `calibrate`, instead of calibrating.
    #[arg(long, value_name = "FILE", conflicts_with_all = CALIBRATION)]
    pub stats: Option<PathBuf>,
}

/// `calibrate`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("output", |arg| written(arg, "FILE", "stats.safetensors", "Statistics file to write"))
)]
pub struct CalibrateArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Do the i-th of n parts only, from 1; `merge-stats` adds them up.
    #[arg(long, value_name = "I/N", help_heading = "Calibration")]
    pub shard: Option<Shard>,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

/// `merge-stats`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("output", |arg| written(arg, "FILE", "stats.safetensors", "Statistics file to write"))
)]
pub struct MergeStatsArgs {
    /// Statistics files of the shards, all of them.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}
