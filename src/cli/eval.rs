//! Arguments of the commands that judge models: `eval`, `verify` and `bench`.

use std::path::PathBuf;

use clap::Args;

use super::{
    ConfigArgs, DecodeArgs, DeviceArgs, LoraArgs, MemoryArgs, OutputArgs, PartsArgs, PatchArgs,
    PipelineArgs, PrintArgs, PromptsArgs, RecipeArgs, RunArgs, SamplingArgs, SeedArgs, SizeArgs,
    shared::written,
};
use crate::{
    calibrate::pass::Shard, device::DTypeChoice, eval::export::Suite, verify::target::Target,
};

/// `eval`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("recipe", |arg| arg.requires("plan").help("Recipe that plans are carried out with (JSON, see configs/prune.json). Default: that of `prune`")),
    mut_arg("lora", |arg| arg.help("Add this LoRA to the weights of all models and of the baseline, multiplied by WEIGHT (default 1; may be negative); may be given several times")),
    mut_arg("prompts", |arg| arg.help("Prompts, one a line. Default: captions that are in no calibration list")),
    mut_arg("num_prompts", |arg| arg.help("Images that each model generates; a short list of prompts is used again with other noise. Default: all of --prompts, otherwise 128 small or 8 large images")),
    mut_arg("steps", |arg| arg.help("Sampling steps. Default: the baseline's own")),
    mut_arg("guidance", |arg| arg.help("Guidance scale. Default: the baseline's own")),
    mut_arg("seed", |arg| arg.help("Image i starts from the noise of this seed + i. Default: 10000")),
    mut_arg("output", |arg| written(arg, "DIR", "report", "Folder to write: report.html, report.json, images.png"))
)]
pub struct EvalArgs {
    /// A model to evaluate, named as elsewhere (folder, file or hub id); may be given several times.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub model: Vec<String>,
    /// A plan (made by `plan` or `prune`) to carry out on the baseline in memory and evaluate like a model; may be given
    /// several times.
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub plan: Vec<PathBuf>,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The model to compare with. Default: the one that the first --model was pruned
    /// from, and for plans the bundled model.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub baseline: Option<String>,
    #[command(flatten)]
    pub patch: PatchArgs,
    #[command(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub parts: PartsArgs,
    #[command(flatten, next_help_heading = "Images")]
    pub prompts: PromptsArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub seed: SeedArgs,
    #[command(flatten)]
    pub size: SizeArgs,
    /// Score how well images fit their prompts with this CLIP model: a folder in transformers layout or a hub id, such
    /// as openai/clip-vit-large-patch14.
    #[arg(long, value_name = "DIR|ID")]
    pub clip: Option<String>,
    /// Measure how far images are from the baseline's with this LPIPS model: a .safetensors file, a folder or a hub id with the
    /// weights of the package lpips (AlexNet or VGG, and the linear heads).
    #[arg(long, value_name = "FILE|DIR|ID")]
    pub lpips: Option<String>,
    /// Only draw images for another scorer, from its own prompt files (--prompts), into the folder --output as it reads them:
    /// geneval (evaluation_metadata.jsonl), dpg (folder of .txt) or hpsv2 (.json lists). The same command goes on after a
    /// kill.
    #[arg(long, value_name = "SUITE", requires = "prompts", conflicts_with_all = ["plan", "baseline", "clip", "lpips", "num_prompts"])]
    pub export: Option<Suite>,
    /// With --export: draw every n-th prompt only, from the i-th on.
    #[arg(long, value_name = "I/N", requires = "export")]
    pub shard: Option<Shard>,
    /// Save the images after this many seconds of work, as latents in OUTPUT.images.partial; the same command goes on from
    /// there.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub save_every: u64,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub decode: DecodeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `verify`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct VerifyArgs {
    /// With --target: the file, or the folder in diffusers layout.
    #[arg(requires = "target")]
    pub file: Option<PathBuf>,
    /// Say whether and how this program opens FILE, by its loader's rules: diffusers, comfyui or sdcpp (stable-diffusion.cpp).
    /// Exit status 1 if it does not.
    #[arg(long, value_name = "PROGRAM", requires = "file", conflicts_with_all = ["reference", "model"])]
    pub target: Option<Target>,
    /// Tensors recorded by scripts/make_reference.py.
    #[arg(long, value_name = "FILE", required_unless_present = "target")]
    pub reference: Option<PathBuf>,
    /// Largest relative error allowed. Default: 1e-5 (1e-4 for VAE and final latents), 2e-2 in bf16.
    #[arg(long)]
    pub tolerance: Option<f64>,
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub print: PrintArgs,
}

/// `bench`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("lora", |arg| arg.conflicts_with("config").help("Add this LoRA to the weights of both models, multiplied by WEIGHT (default 1; may be negative); may be given several times"))
)]
pub struct BenchArgs {
    /// The model, named as elsewhere (folder, file or hub id). Default: the bundled tiny model.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub model: Option<String>,
    /// Time random weights of this shape instead of a model: flux1-dev, flux1-schnell, flux2-klein-4b,
    /// flux2-klein-9b, or a transformer config.json (also one that `prune` wrote).
    #[arg(
        long,
        value_name = "FILE|NAME",
        conflicts_with = "model",
        help_heading = "Model"
    )]
    pub config: Option<String>,
    /// A second model, timed in turn with the first.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub against: Option<String>,
    /// Time the first model in turn with itself after N of its blocks, spread over the single ones, were replaced by
    /// linear layers: what pruning would bring. All other weights are shared.
    #[arg(long, value_name = "N", conflicts_with = "against")]
    pub replaced: Option<usize>,
    /// Sides of square images, in pixels, such as 512,1024. Default: the model's own.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub size: Vec<usize>,
    /// Images in one forward, such as 1,4.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Text tokens. Default: what the model is given.
    #[arg(long)]
    pub text_tokens: Option<usize>,
    /// Number formats, such as f32,bf16. Default: bf16 on a GPU, f32 on the CPU.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "auto", value_parser = |s: &str| s.parse::<DTypeChoice>())]
    pub dtype: Vec<DTypeChoice>,
    /// Measure each for about this long, in seconds, and at least three times.
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Time whole steps only, no blocks.
    #[arg(long)]
    pub step_only: bool,
    #[command(flatten)]
    pub patch: PatchArgs,
    #[command(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub print: PrintArgs,
}
