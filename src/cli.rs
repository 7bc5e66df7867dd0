//! The command line: definitions only. What a command does is in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use safetensors::Dtype;

use crate::{
    checkpoint::output::Naming,
    device::{DTypeChoice, DeviceChoice},
    layout::Form,
    pipeline::ModelChoice,
};

mod calibrate;
mod convert;
mod eval;
mod score;
mod train;

pub use calibrate::{CALIBRATION, CalibrateArgs, CalibrationArgs, MergeStatsArgs};
pub use convert::ConvertArgs;
pub use eval::{BenchArgs, EvalArgs};
pub use score::{GoalArgs, PlanArgs, ScoreArgs};
pub use train::TrainArgs;

/// Prune FLUX.1: replace its least important transformer blocks by linear layers and draw with what is left.
#[derive(Debug, Parser)]
#[command(
    name = "fastflux",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// No notes and no progress bars on stderr.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// The subcommands, in the order of the pipeline.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what a checkpoint holds: family, sizes, blocks, parameters, FLOPs.
    #[command(
        after_help = "Examples:\n  fastflux inspect\n  fastflux inspect --model flux1-dev.safetensors --width 1024 --height 1024\n  fastflux inspect --model pruned --json"
    )]
    Inspect(InspectArgs),
    /// Run the model on prompts and gather the sums that scores and fits follow from.
    #[command(
        after_help = "Examples:\n  fastflux calibrate --output stats.safetensors\n  fastflux calibrate --model flux1-dev.safetensors --text-encoders encoders --dry-run\n  fastflux calibrate --shard 2/8 --output stats-2.safetensors\n  fastflux calibrate --images photos --output stats.safetensors"
    )]
    Calibrate(CalibrateArgs),
    /// Add up the statistics files of shards.
    #[command(
        after_help = "Example:\n  fastflux merge-stats stats-*.safetensors --output stats.safetensors"
    )]
    MergeStats(MergeStatsArgs),
    /// Score every block: how much it matters, by several criteria; as a file, a table and a chart.
    #[command(
        after_help = "Examples:\n  fastflux score --output scores.json\n  fastflux score --stats stats.safetensors --metric fit-residual"
    )]
    Score(ScoreArgs),
    /// Choose the blocks to replace and say what that will save, without writing a model.
    #[command(
        after_help = "Examples:\n  fastflux plan --ratio 0.2 --output plan.json\n  fastflux plan --scores scores.json --budget-params 9.5B --protect double.00,single.37\n  fastflux plan --model flux1-dev.safetensors --stats stats.safetensors --target-speedup 1.2"
    )]
    Plan(PlanArgs),
    /// Replace the least important blocks by linear layers and write a pruned checkpoint.
    #[command(
        after_help = "Examples:\n  fastflux prune --ratio 0.2 --output pruned\n  fastflux prune --model black-forest-labs/FLUX.1-schnell --ratio 0.2 --prompts prompts.txt --output schnell-20\n  fastflux prune --plan plan.json --output mine\n\nA plan.json by hand (a layer for double.01, one layer for two neighbours, single.07 left out; other forms: conditioned, modulated):\n  {\"replace\": [\n    {\"replaces\": [\"double.01\"], \"form\": \"linear\"},\n    {\"replaces\": [\"single.03\", \"single.04\"], \"form\": \"linear\"},\n    {\"replaces\": [\"single.07\"], \"form\": \"remove\"}\n  ]}"
    )]
    Prune(PruneArgs),
    /// Train what a pruned model has in place of its blocks, and LoRA beside it, towards the unpruned model.
    #[command(
        after_help = "Examples:\n  fastflux train-sandwich --output trained\n  fastflux train-sandwich --model pruned --output trained --rank 16 --log losses.jsonl"
    )]
    TrainSandwich(TrainArgs),
    /// Draw pictures.
    #[command(
        after_help = "Examples:\n  fastflux generate --prompt \"a red circle left of a blue square on a white background\"\n  fastflux generate --model pruned --prompt-file prompts.txt --output pictures\n  fastflux generate --model flux1-dev.safetensors --text-encoders encoders --vae ae.safetensors --prompt \"a fox in the snow\""
    )]
    Generate(GenerateArgs),
    /// Draw the same prompts with a model and the one it was made from: numbers, pictures, a page that shows them.
    #[command(
        after_help = "Examples:\n  fastflux eval --model pruned --output report\n  fastflux eval --model pruned-10 --model pruned-20 --prompts prompts.txt --num 16\n  fastflux eval --model flux1-lite.safetensors --baseline flux1-dev.safetensors --text-encoders encoders --vae ae.safetensors"
    )]
    Eval(EvalArgs),
    /// Compare a model with tensors recorded from diffusers.
    #[command(
        after_help = "Examples:\n  python scripts/make_reference.py PIPELINE reference.safetensors\n  fastflux verify --model PIPELINE --reference reference.safetensors"
    )]
    Verify(VerifyArgs),
    /// Write a model in another number format: bf16, f16, f32, float8 (e4m3), or GGUF for ComfyUI-GGUF and others.
    #[command(
        after_help = "Examples:\n  fastflux convert --dtype f8e4m3 --output tiny-fp8.safetensors\n  fastflux convert --model pruned --gguf q8_0 --output pruned-q8_0.gguf\n  fastflux convert --model flux1-dev.safetensors --gguf q4_k --output flux1-dev-q4_k.gguf --dry-run\n  fastflux convert --model flux1-dev-Q4_K_S.gguf --dtype bf16 --output wide"
    )]
    Convert(ConvertArgs),
    /// Write a randomly initialised checkpoint of any size, for tests and benchmarks.
    #[command(
        after_help = "Examples:\n  fastflux init --config flux1-dev --dry-run\n  fastflux init --config configs/tiny/transformer/config.json --seed 1 --output random/flux.safetensors"
    )]
    Init(InitArgs),
    /// Time one transformer step and each kind of block, beside what the machine reaches at most.
    ///
    /// The last columns are shares of a large matrix product's and of a large copy's speed, measured in the same run;
    /// weights that the caches hold are read faster than the copy.
    #[command(
        after_help = "Examples:\n  fastflux bench\n  fastflux bench --model pruned --against flux1-dev.safetensors --size 512,1024 --batch 1,2\n  fastflux bench --config flux1-dev --dtype bf16 --json"
    )]
    Bench(BenchArgs),
}

/// Which model.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelArgs {
    /// The model: a folder (diffusers layout or fastflux output), a .safetensors file, or a hub id
    /// (`owner/name` or `owner/name@revision`). Default: the bundled tiny model.
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// JSON with what the tensors cannot tell: axes_dims_rope, theta, scheduler.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Which model, and where its text encoders and VAE are.
#[derive(Args, Clone, Debug, Default)]
pub struct PipelineArgs {
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "flattened: its doc comment would become help text"
    )]
    pub model: ModelArgs,
    /// Folder with text encoders and tokenizers, where the model comes without.
    #[arg(long, value_name = "DIR")]
    pub text_encoders: Option<PathBuf>,
    /// VAE file (ae.safetensors or diffusers names) or folder, where the model comes without.
    #[arg(long, value_name = "FILE|DIR")]
    pub vae: Option<PathBuf>,
}

impl ModelArgs {
    /// The choice without other parts of the pipeline.
    pub fn choice(&self) -> ModelChoice {
        ModelChoice {
            model: self.model.clone(),
            config: self.config.clone(),
            ..ModelChoice::default()
        }
    }
}

impl PipelineArgs {
    /// The choice with the other parts.
    pub fn choice(&self) -> ModelChoice {
        ModelChoice {
            text_encoders: self.text_encoders.clone(),
            vae: self.vae.clone(),
            ..self.model.choice()
        }
    }
}

/// How to run; none of these changes what is computed beyond rounding.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct RunArgs {
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto", value_parser = |s: &str| s.parse::<DeviceChoice>())]
    pub device: DeviceChoice,
    /// auto (bf16 on a GPU, f32 on the CPU), f32, bf16 or f16.
    #[arg(long, default_value = "auto", value_parser = |s: &str| s.parse::<DTypeChoice>())]
    pub dtype: DTypeChoice,
}

/// How much of the device to use; none of this changes what is computed.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct MemoryArgs {
    /// Keep no block of the transformer on the device: each is read from the mapped file when it is run, the next one
    /// meanwhile.
    #[arg(long)]
    pub offload: bool,
    /// Most memory to use on the device, such as 12GiB (on the CPU: of this machine): as many blocks stay there as fit,
    /// the others are read when they are run. Default: what is free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_vram: Option<u64>,
}

/// How pictures are decoded; up to rounding they are the same.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct DecodeArgs {
    /// Decode pictures in bands of this many rows of pixels, which takes less memory; 0: at once. Default: at once where
    /// there is room.
    #[arg(long, value_name = "PIXELS")]
    pub vae_tile: Option<usize>,
}

/// `inspect`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Picture width that FLOPs are counted for, in pixels. Default: the model's own (FLUX.1: 1024).
    #[arg(long)]
    pub width: Option<usize>,
    /// Picture height, in pixels. Default: as the width.
    #[arg(long)]
    pub height: Option<usize>,
    /// Text tokens that FLOPs are counted for. Default: what the model is given.
    #[arg(long)]
    pub text_tokens: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `prune`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct PruneArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub goal: GoalArgs,
    /// Carry out this plan (made by `plan`, an earlier run or yourself, as below) instead of choosing blocks.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["goal", "protect", "form"])]
    pub plan: Option<PathBuf>,
    /// What takes a block's place: linear, conditioned, modulated or remove. Default: linear.
    #[arg(long)]
    pub form: Option<Form>,
    /// Folder to write; must not exist yet (see --force).
    #[arg(long, short, default_value = "pruned", value_name = "DIR")]
    pub output: PathBuf,
    /// Calibrate with these statistics, made by `calibrate`, instead of sampling.
    #[arg(long, value_name = "FILE", conflicts_with_all = CALIBRATION)]
    pub stats: Option<PathBuf>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Names and places of what is written: original (flux.safetensors) or diffusers (a transformer folder).
    #[arg(long, default_value_t, value_parser = |s: &str| s.parse::<Naming>())]
    pub format: Naming,
    /// Say how many forwards and how much memory it takes, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
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
    #[command(flatten)]
    pub decode: DecodeArgs,
}

/// `generate`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct GenerateArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// What to draw; may be given several times.
    #[arg(long, required_unless_present = "prompt_file")]
    pub prompt: Vec<String>,
    /// Prompts to draw, one a line; - reads standard input. Every line counts that is not empty, also one with a # in front.
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Sampling steps. Default: the model's own (dev 28, schnell 4).
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance scale, for models with a guidance embedding. Default: 3.5.
    #[arg(long)]
    pub guidance: Option<f64>,
    /// Seed of the starting noise: the same noise as torch's CPU generator.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Picture width, in pixels.
    #[arg(long)]
    pub width: Option<usize>,
    /// Picture height, in pixels.
    #[arg(long)]
    pub height: Option<usize>,
    /// Pictures for each prompt.
    #[arg(long, default_value_t = 1)]
    pub num_images: usize,
    /// A .png file, a pattern with {prompt}, {image} or {seed}, or a folder.
    #[arg(long, short, default_value = ".", value_name = "PATTERN|DIR")]
    pub output: PathBuf,
    /// Longest text the T5 encoder is given, in tokens. Default: 512 (dev), 256 (schnell), or the tokenizer's limit.
    #[arg(long)]
    pub max_sequence_length: Option<usize>,
    /// Overwrite existing pictures.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub decode: DecodeArgs,
}

/// `verify`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct VerifyArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Tensors recorded by scripts/make_reference.py.
    #[arg(long, value_name = "FILE")]
    pub reference: PathBuf,
    /// Largest relative error allowed. Default: 1e-5 (1e-4 for VAE and final latents), 2e-2 in bf16.
    #[arg(long)]
    pub tolerance: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `init`.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// What to make: a diffusers transformer config.json (or one that `prune` wrote), flux1-dev or flux1-schnell.
    #[arg(long, value_name = "FILE|NAME")]
    pub config: String,
    /// The same seed gives the same file, on every machine.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// The .safetensors file to write; a config.json is put beside it.
    #[arg(long, short, value_name = "FILE", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,
    /// Number format: bf16, f16 or f32.
    #[arg(long, default_value = "bf16", value_parser = weight_dtype)]
    pub dtype: Dtype,
    /// Names of the tensors: original or diffusers.
    #[arg(long, default_value_t, value_parser = |s: &str| s.parse::<Naming>())]
    pub format: Naming,
    /// Say how large it would be and write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Overwrite an existing output.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

fn weight_dtype(text: &str) -> Result<Dtype, String> {
    match text {
        "bf16" | "bfloat16" => Ok(Dtype::BF16),
        "f16" | "float16" => Ok(Dtype::F16),
        "f32" | "float32" => Ok(Dtype::F32),
        _ => Err("expected bf16, f16 or f32".to_owned()),
    }
}

/// Bytes: `8GiB`, `500MB`, `8G` (as GiB) or a plain number.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 13] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("K", 1024.0),
        ("M", 1_048_576.0),
        ("G", 1_073_741_824.0),
        ("T", 1_099_511_627_776.0),
        ("B", 1.0),
    ];
    let text = text.trim();
    let split = UNITS
        .iter()
        .find_map(|(unit, size)| Some((text.strip_suffix(unit)?, *size)));
    let (number, size) = split.unwrap_or((text, 1.0));
    let number: Option<f64> = number.trim().parse().ok();
    let number = number.filter(|n| n.is_finite() && *n > 0.0);
    let number = number.ok_or("expected a size such as 16GiB or 500MB")?;
    Ok((number * size) as u64)
}

/// A number of things: `9.5B`, `800M` or a plain number.
fn count(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let units = [("K", 1e3), ("M", 1e6), ("B", 1e9)];
    let split = units
        .iter()
        .find_map(|(unit, size)| Some((text.strip_suffix(unit)?, *size)));
    let (number, size) = split.unwrap_or((text, 1.0));
    let number: Option<f64> = number.trim().parse().ok();
    let number = number.filter(|n| n.is_finite() && *n > 0.0);
    let number = number.ok_or("expected a number such as 9.5B or 800M")?;
    Ok((number * size) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_counts_read_as_people_write_them() {
        assert_eq!(bytes("16GiB"), Ok(16 << 30));
        assert_eq!(bytes("1.5 MB"), Ok(1_500_000));
        assert_eq!(bytes("42"), Ok(42));
        assert_eq!(bytes("1TB"), Ok(1_000_000_000_000));
        assert_eq!(bytes("1TiB"), Ok(1 << 40));
        for (unit, power) in [("K", 10), ("M", 20), ("G", 30), ("T", 40)] {
            assert_eq!(bytes(&format!("2{unit}")), Ok(2 << power));
        }
        assert_eq!(count("9.5B"), Ok(9_500_000_000));
        assert_eq!(count("800M"), Ok(800_000_000));
        for bad in ["", "B", "-1", "nan", "infGB", "1e400", "3 apples"] {
            assert!(bytes(bad).is_err() && count(bad).is_err(), "{bad}");
        }
    }
}
