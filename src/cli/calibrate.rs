//! Arguments of `calibrate` and `merge-stats`, and of every command that calibrates on the way.

use std::path::PathBuf;

use clap::Args;

use super::{MemoryArgs, PipelineArgs, RunArgs, bytes};
use crate::calibrate::{pass::Shard, recipe::StateSource};

/// The flags that make no sense beside a calibration that was made before.
pub const CALIBRATION: [&str; 10] = [
    "prompts",
    "images",
    "source",
    "samples",
    "steps",
    "width",
    "height",
    "seed",
    "tokens_per_forward",
    "stats_memory",
];

/// What to calibrate on.
#[derive(Args, Clone, Debug, Default)]
pub struct CalibrationArgs {
    /// Recipe (JSON, see configs/prune.json); flags win over it.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Prompts to calibrate with, one a line. Default: a bundled list.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Calibrate on these pictures (PNG, JPEG) instead of sampling; the caption of fox.jpg is in fox.txt.
    #[arg(long, value_name = "DIR", conflicts_with = "prompts")]
    pub images: Option<PathBuf>,
    /// States to look at: latents (the model's own pictures, noised anew) or trajectory (those of sampling itself).
    /// Default: latents.
    #[arg(long, conflicts_with = "images")]
    pub source: Option<StateSource>,
    /// How many prompts to sample for calibration. Default: 640 for small pictures, 96 for large ones.
    #[arg(long)]
    pub samples: Option<usize>,
    /// Sampling steps of calibration. Default: 8, or the model's own where that is lower
    #[arg(long)]
    pub steps: Option<usize>,
    /// Picture width of calibration, in pixels.
    #[arg(long)]
    pub width: Option<usize>,
    /// Picture height of calibration, in pixels.
    #[arg(long)]
    pub height: Option<usize>,
    /// Seed of calibration.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens of each stream that enter the sums of one forward. Default: all.
    #[arg(long, value_name = "N")]
    pub tokens_per_forward: Option<usize>,
    /// Memory for the sums, such as 8GiB; where not all blocks fit, a first cheap pass chooses candidates.
    /// Default: half of what is free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub stats_memory: Option<u64>,
    /// Save the calibration after this many seconds of work, as OUTPUT.partial; the same command goes on from there. Scores
    /// and fits are not saved: they are made again.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub save_every: u64,
}

/// `calibrate`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct CalibrateArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Do the i-th of n parts only, from 1; `merge-stats` adds them up.
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,
    /// Say how many forwards and how much memory it takes, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Statistics file to write.
    #[arg(long, short, value_name = "FILE", default_value = "stats.safetensors")]
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

/// `merge-stats`.
#[derive(Args, Debug)]
pub struct MergeStatsArgs {
    /// Statistics files of the shards, all of them.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Statistics file to write.
    #[arg(long, short, value_name = "FILE", default_value = "stats.safetensors")]
    pub output: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
