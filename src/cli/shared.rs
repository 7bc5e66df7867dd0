//! Flags that several commands take, each defined once. If a command says more about a flag than is said here, its
//! own arguments change the help text or the default.

use std::path::{Path, PathBuf};

use clap::{Arg, Args};

use super::units::{bytes, number, seed, whole};
use crate::{
    checkpoint::{lora::LoraChoice, output::Naming},
    device::{DTypeChoice, DeviceChoice},
    pipeline::defaults::{MAX_GUIDANCE, MAX_SIDE, MAX_STEPS, MIN_SIDE},
    pipeline::{PatchChoice, whole::Copying},
};

/// The model's own description, if its tensors do not tell all.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct ConfigArgs {
    /// JSON with what the tensors cannot tell: axes_dims_rope, theta, scheduler.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// LoRA files.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct LoraArgs {
    /// Add this LoRA to the weights, multiplied by WEIGHT (default 1; may be negative); may be given several times.
    #[arg(long, value_name = "FILE[:WEIGHT]", value_parser = |s: &str| s.parse::<LoraChoice>())]
    pub lora: Vec<LoraChoice>,
}

/// A patch.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct PatchArgs {
    /// Open the pruned model that this patch (made by `diff` or `prune --patch`) makes of its base, --model.
    #[arg(long, value_name = "FILE")]
    pub patch: Option<PathBuf>,
    /// Which of the patch's pruned models, by the share of replaced blocks in percent. Default: the only one.
    #[arg(long, value_name = "NAME", requires = "patch")]
    pub level: Option<String>,
}

impl PatchArgs {
    /// What `--patch` is without a file: `prune` writes one.
    pub const WRITE: &str = "-";

    /// The patch that is asked for; none if no file is named.
    pub fn choice(&self) -> Option<PatchChoice> {
        let path = self.patch.clone().filter(|_| !self.writes())?;
        let level = self.level.clone();
        Some(PatchChoice { path, level })
    }

    /// Whether a patch is to be written.
    pub fn writes(&self) -> bool {
        self.patch.as_deref() == Some(Path::new(Self::WRITE))
    }
}

/// Which model.
#[derive(Args, Clone, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// The model: a folder (diffusers layout or fastflux output), a .safetensors or .gguf file, or a hub id
    /// (`owner/name` or `owner/name@revision`). Default: the bundled tiny model.
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    #[command(flatten)]
    pub patch: PatchArgs,
    #[command(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// The other parts of a pipeline.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct PartsArgs {
    /// Folder with text encoders and tokenizers, or their files with commas between, if the model comes without.
    #[arg(long, value_name = "DIR|FILES")]
    pub text_encoders: Option<PathBuf>,
    /// VAE file (ae.safetensors or diffusers names) or folder, if the model comes without.
    #[arg(long, value_name = "FILE|DIR")]
    pub vae: Option<PathBuf>,
    /// Download the model that a pruned checkpoint says it was made of, if it is needed and not on this machine.
    #[arg(long)]
    pub fetch_base: bool,
}

/// Which model, and where its text encoders and VAE are.
#[derive(Args, Clone, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct PipelineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub parts: PartsArgs,
}

/// The device to compute on.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Memory")]
pub struct DeviceArgs {
    /// Device to compute on: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto", value_parser = |s: &str| s.parse::<DeviceChoice>())]
    pub device: DeviceChoice,
}

/// How to run; none of these changes what is computed beyond rounding.
#[derive(Args, Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(next_help_heading = "Memory")]
pub struct RunArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Number format to compute in: auto (bf16 on a GPU, f32 on the CPU), f32, bf16 or f16.
    #[arg(long, default_value = "auto", value_parser = |s: &str| s.parse::<DTypeChoice>())]
    pub dtype: DTypeChoice,
}

/// How much of the device to use; none of this changes what is computed.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// Keep all blocks of the transformer off the device: read each from the mapped file when it is run, the next one
    /// meanwhile.
    #[arg(long)]
    pub offload: bool,
    /// Most memory to use on the device, such as 12GiB (on the CPU: of this machine): as many blocks stay there as fit,
    /// the others are read when they are run. Default: what is free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_vram: Option<u64>,
}

/// How images are decoded; up to rounding they are the same.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Memory")]
pub struct DecodeArgs {
    /// Decode images in bands of this many rows of pixels, which takes less memory; 0: at once. Default: at once if
    /// there is room.
    #[arg(long, value_name = "PIXELS")]
    pub vae_tile: Option<usize>,
}

/// Size of images.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct SizeArgs {
    /// Image width, in pixels. Default: the model's own (FLUX.1: 1024).
    #[arg(long, value_name = "PIXELS", value_parser = whole(MIN_SIDE, MAX_SIDE))]
    pub width: Option<usize>,
    /// Image height, in pixels. Default: the model's own.
    #[arg(long, value_name = "PIXELS", value_parser = whole(MIN_SIDE, MAX_SIDE))]
    pub height: Option<usize>,
}

/// The seed.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct SeedArgs {
    /// Seed of all that is random: a number, or random. Default: 0.
    #[arg(long, value_name = "N|random", value_parser = seed)]
    pub seed: Option<u64>,
}

/// How images are sampled.
#[derive(Args, Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct SamplingArgs {
    /// Sampling steps. Default: the model's own (dev 28, schnell 4; FLUX.2 klein 4, its base 50).
    #[arg(long, value_parser = whole(1, MAX_STEPS))]
    pub steps: Option<usize>,
    /// Guidance scale, for models with a guidance embedding and for FLUX.2 as long as it was not distilled. Default: the
    /// model's own (dev 3.5, klein's base 4).
    #[arg(long, value_parser = number(0.0, MAX_GUIDANCE), allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    #[command(flatten)]
    pub cfg: TrueCfgArgs,
}

/// Guidance by a negative prompt.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct TrueCfgArgs {
    /// Guide FLUX.1 by a second forward in each step, away from a negative prompt, with this scale; 1: not at all. Default:
    /// 3.5 if the model was trained out of distillation, else 1.
    #[arg(long, value_name = "SCALE", value_parser = number(1.0, MAX_GUIDANCE))]
    pub true_cfg: Option<f64>,
}

/// A list of prompts.
#[derive(Args, Clone, Debug, Default)]
pub struct PromptsArgs {
    /// Prompts, one a line. Default: a bundled list.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// How many prompts to use.
    #[arg(long, value_name = "N", aliases = ["samples", "num"], value_parser = whole(1, 1_000_000))]
    pub num_prompts: Option<usize>,
}

/// A recipe.
#[derive(Args, Clone, Debug, Default)]
pub struct RecipeArgs {
    /// Recipe (JSON, see configs/prune.json); flags win over it.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
}

/// What is printed on stdout.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Output")]
pub struct PrintArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Estimate instead of work.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Output")]
pub struct DryRunArgs {
    /// Estimate the work and the memory it takes, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What is written. Commands set value name, default and help of `--output` with `written`.
#[derive(Args, Clone, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// File or folder to write.
    #[arg(id = "output", long, short)]
    pub path: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub print: PrintArgs,
}

/// Whose names the written tensors and files have.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Output")]
pub struct LayoutArgs {
    /// Names and places of what is written: original (flux.safetensors) or diffusers (a transformer folder).
    #[arg(long, alias = "format", default_value_t, value_parser = |s: &str| s.parse::<Naming>())]
    pub layout: Naming,
}

/// Whose names a folder with a model has, and whether the other parts of the pipeline lie in it.
#[derive(Args, Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(next_help_heading = "Output")]
pub struct FolderArgs {
    #[command(flatten)]
    pub layout: LayoutArgs,
    /// Write the whole pipeline in diffusers layout: model_index.json, and the other parts copied, or their weights
    /// as hard links (link).
    #[arg(
        long, value_name = "copy|link", num_args = 0..=1, require_equals = true, default_missing_value = "copy",
        value_parser = |s: &str| s.parse::<Copying>()
    )]
    pub whole: Option<Copying>,
}

impl FolderArgs {
    /// Whose names: a whole pipeline has diffusers'.
    pub fn naming(&self) -> Naming {
        match self.whole {
            Some(_) => Naming::Diffusers,
            None => self.layout.layout,
        }
    }
}

/// `--output` of one command.
pub(super) fn written(
    arg: Arg,
    value_name: &'static str,
    default: &'static str,
    help: &'static str,
) -> Arg {
    let arg = arg.value_name(value_name).required(false).help(help);
    arg.default_value(default)
}
