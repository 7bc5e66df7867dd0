//! Arguments of `eval` and `bench`.

use std::path::PathBuf;

use clap::Args;

use super::{DecodeArgs, MemoryArgs, RunArgs};
use crate::device::{DTypeChoice, DeviceChoice};

/// `eval`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct EvalArgs {
    /// A model to evaluate, named as elsewhere (folder, file or hub id); may be given several times.
    #[arg(long, value_name = "PATH|ID")]
    pub model: Vec<String>,
    /// A plan (made by `plan` or `prune`) to carry out on the baseline in memory and evaluate like a model; may be given
    /// several times.
    #[arg(long, value_name = "FILE")]
    pub plan: Vec<PathBuf>,
    /// Recipe that plans are carried out with (JSON, see configs/prune.json). Default: that of `prune`.
    #[arg(long, value_name = "FILE", requires = "plan")]
    pub recipe: Option<PathBuf>,
    /// The model to compare with. Default: the one that the first --model was pruned
    /// from, and for plans the bundled model.
    #[arg(long, value_name = "PATH|ID")]
    pub baseline: Option<String>,
    /// Prompts, one a line. Default: captions that are in no calibration list.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Pictures that each model draws; a short list of prompts is drawn from again with other noise. Default: all of
    /// --prompts, otherwise 128 small or 8 large pictures.
    #[arg(long, value_name = "N")]
    pub num: Option<usize>,
    /// Sampling steps. Default: the baseline's own.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance scale. Default: the baseline's own.
    #[arg(long)]
    pub guidance: Option<f64>,
    /// Picture i starts from the noise of this seed + i.
    #[arg(long, default_value_t = 10_000)]
    pub seed: u64,
    /// Picture width, in pixels.
    #[arg(long)]
    pub width: Option<usize>,
    /// Picture height, in pixels.
    #[arg(long)]
    pub height: Option<usize>,
    /// JSON with what the tensors cannot tell: axes_dims_rope, theta, scheduler.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder with text encoders and tokenizers, where the baseline comes without.
    #[arg(long, value_name = "DIR")]
    pub text_encoders: Option<PathBuf>,
    /// VAE file or folder, where the baseline comes without.
    #[arg(long, value_name = "FILE|DIR")]
    pub vae: Option<PathBuf>,
    /// Score how well pictures fit their prompts with this CLIP model: a folder in transformers layout or a hub id, such
    /// as openai/clip-vit-large-patch14.
    #[arg(long, value_name = "DIR|ID")]
    pub clip: Option<String>,
    /// Folder to write: report.html, report.json, pictures.png.
    #[arg(long, short, value_name = "DIR", default_value = "report")]
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
    #[command(flatten)]
    pub decode: DecodeArgs,
}

/// `bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// The model, named as elsewhere (folder, file or hub id). Default: the bundled tiny model.
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// Time random weights of this shape instead of a model: flux1-dev, flux1-schnell, or a transformer config.json
    /// (also one that `prune` wrote).
    #[arg(long, value_name = "FILE|NAME", conflicts_with = "model")]
    pub config: Option<String>,
    /// A second model, timed in turn with the first.
    #[arg(long, value_name = "PATH|ID")]
    pub against: Option<String>,
    /// Time the first model in turn with itself after N of its blocks, spread over the single ones, were replaced by
    /// linear layers: what pruning would bring. Shares all other weights.
    #[arg(long, value_name = "N", conflicts_with = "against")]
    pub replaced: Option<usize>,
    /// Sides of square pictures, in pixels, such as 512,1024. Default: the model's own.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub size: Vec<usize>,
    /// Pictures in one forward, such as 1,4.
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
    /// Whole steps only, no blocks.
    #[arg(long)]
    pub step_only: bool,
    /// Measure instead how time and memory of a step grow with picture size (256² to 2048², or --size), blocks and batch,
    /// as far as they fit, and draw it beside the forecast into this file.
    #[arg(long, value_name = "SVG", conflicts_with_all = ["against", "replaced", "batch", "step_only"])]
    pub growth: Option<PathBuf>,
    /// Overwrite an existing chart.
    #[arg(long, requires = "growth")]
    pub force: bool,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto", value_parser = |s: &str| s.parse::<DeviceChoice>())]
    pub device: DeviceChoice,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
