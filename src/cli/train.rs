//! The flags of `train-sandwich`.

use std::path::PathBuf;

use clap::Args;

use super::{
    DryRunArgs, FolderArgs, MemoryArgs, OutputArgs, PipelineArgs, PromptsArgs, RecipeArgs, RunArgs,
    SeedArgs, SizeArgs, shared::written,
};

/// `train-sandwich`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
#[command(
    mut_arg("recipe", |arg| arg.help("Recipe (JSON, see configs/sandwich.json); flags win over it")),
    mut_arg("prompts", |arg| arg.help("Prompts whose images are trained on, one a line. Default: a bundled list")),
    mut_arg("num_prompts", |arg| arg.help("How many prompts to sample. Default: all of the list, 128 if images are large")),
    mut_arg("seed", |arg| arg.help("Seed of images, noise and LoRA factors. Default: 0")),
    mut_arg("offload", |arg| arg.help("Keep only the blocks that are trained on the device; read the others when they are needed, once for the batches of several steps")),
    mut_arg("max_vram", |arg| arg.help("Most memory to use on the device, such as 24GiB (on the CPU: of this machine): takes --gradient-checkpointing and --offload if needed. Default: what is free")),
    mut_arg("output", |arg| written(arg, "DIR", "trained", "Folder to write; must not exist yet (see --force). The run is saved next to it, in DIR.state, until it is done"))
)]
pub struct TrainArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// The model it was pruned from. Default: the one that the pruned checkpoint names.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub teacher: Option<String>,
    #[command(flatten, next_help_heading = "Training")]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub prompts: PromptsArgs,
    #[command(flatten)]
    pub size: SizeArgs,
    #[command(flatten)]
    pub seed: SeedArgs,
    /// Steps for each sandwich.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Steps of all sandwiches together, end to end, after that; 0 leaves them out.
    #[arg(long, alias = "finish", value_name = "STEPS")]
    pub finetune: Option<usize>,
    /// Rank of the LoRA next to the neighbours' projections. Default: 64, in models wider than 1024 channels 32.
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
    /// Noised latents in one forward.
    #[arg(long)]
    pub batch: Option<usize>,
    /// Forwards whose gradients are summed for one step.
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Batches of activations kept in memory and used again; 0: new noise for every step.
    #[arg(long, value_name = "BATCHES")]
    pub cache: Option<usize>,
    /// Steps after which the run is saved; it goes on from there when the same command is given again.
    #[arg(long, default_value_t = 100, value_name = "STEPS")]
    pub save_every: usize,
    /// Forget a saved run and start over.
    #[arg(long)]
    pub restart: bool,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Keep the input of each block only and compute the rest again on the way back. Default: for large images.
    #[arg(long, alias = "recompute", help_heading = "Memory")]
    pub gradient_checkpointing: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Write the trained LoRA next to the checkpoint, in PEFT's names, instead of merging it; --lora applies it.
    #[arg(long, help_heading = "Output")]
    pub keep_lora: bool,
    /// Write the losses to this file as they come, one JSON object a line.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub log: Option<PathBuf>,
    #[command(flatten)]
    pub folder: FolderArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}
