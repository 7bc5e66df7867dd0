//! The flags of `train-sandwich`.

use std::path::PathBuf;

use clap::Args;

use super::{PipelineArgs, RunArgs, bytes};
use crate::checkpoint::output::Naming;

/// `train-sandwich`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct TrainArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// The model it was pruned from. Default: the one that the pruned checkpoint names.
    #[arg(long, value_name = "PATH|ID")]
    pub teacher: Option<String>,
    /// Folder to write; must not exist yet (see --force). The run is saved beside it, in DIR.state, until it is done.
    #[arg(long, short, default_value = "trained", value_name = "DIR")]
    pub output: PathBuf,
    /// Recipe (JSON, see configs/sandwich.json); flags win over it.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Prompts whose pictures are trained on, one a line. Default: a bundled list.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// How many prompts to sample. Default: all of the list, 128 where pictures are large.
    #[arg(long)]
    pub samples: Option<usize>,
    /// Steps for each sandwich.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Steps of all sandwiches together, end to end, after that; 0 leaves them out.
    #[arg(long, value_name = "STEPS")]
    pub finish: Option<usize>,
    /// Rank of the LoRA beside the neighbours' projections.
    #[arg(long)]
    pub rank: Option<usize>,
    /// The LoRA is scaled by alpha / rank. Default: the rank.
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Train the replaced layers alone.
    #[arg(long, conflicts_with_all = ["rank", "alpha", "keep_lora"])]
    pub no_lora: bool,
    /// Highest learning rate.
    #[arg(long)]
    pub lr: Option<f64>,
    /// States in one forward.
    #[arg(long)]
    pub batch: Option<usize>,
    /// Forwards whose gradients are summed for one step.
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Batches of activations kept in memory and used again; 0: new noise for every step.
    #[arg(long, value_name = "BATCHES")]
    pub cache: Option<usize>,
    /// Picture width, in pixels.
    #[arg(long)]
    pub width: Option<usize>,
    /// Picture height, in pixels.
    #[arg(long)]
    pub height: Option<usize>,
    /// Seed of pictures, noise and LoRA factors.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Steps after which the run is saved; it goes on from there when the same command is given again.
    #[arg(long, default_value_t = 100, value_name = "STEPS")]
    pub save_every: usize,
    /// Forget a saved run and start over.
    #[arg(long)]
    pub restart: bool,
    /// Keep the input of each block only and compute the rest again on the way back. Default: for large pictures.
    #[arg(long)]
    pub recompute: bool,
    /// Keep only the blocks that are trained on the device; read the others when they are needed, once for the batches of
    /// several steps.
    #[arg(long)]
    pub offload: bool,
    /// Most memory to use on the device, such as 24GiB (on the CPU: of this machine): --recompute and --offload where it
    /// takes them. Default: what is free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_vram: Option<u64>,
    /// Write the LoRA beside the checkpoint, in PEFT's names, instead of merging it; fastflux itself does not apply it.
    #[arg(long)]
    pub keep_lora: bool,
    /// Write the losses to this file as they come, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Say what would be trained and how much memory it takes, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Names and places of what is written: original (flux.safetensors) or diffusers (a transformer folder).
    #[arg(long, default_value_t, value_parser = |s: &str| s.parse::<Naming>())]
    pub format: Naming,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}
