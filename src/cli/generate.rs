//! Arguments of `generate`.

use std::path::PathBuf;

use clap::Args;

use super::{
    DecodeArgs, MemoryArgs, OutputArgs, PipelineArgs, RunArgs, SamplingArgs, SeedArgs, SizeArgs,
    shared::written, units::whole,
};
use crate::pipeline::defaults::MAX_TEXT_TOKENS;

/// Most images of one prompt: a larger number is a slip of the finger.
const MAX_IMAGES: usize = 10_000;

/// `generate`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("output", |arg| written(arg, "PATTERN|DIR", ".", "A .png file, a pattern with {prompt}, {image} or {seed}, or a folder")),
    mut_arg("seed", |arg| arg.help("Seed of the starting noise: the same noise as torch's CPU generator. Default: 0")),
    mut_arg("force", |arg| arg.help("Overwrite existing images"))
)]
pub struct GenerateArgs {
    /// What to generate; may be given several times.
    #[arg(long, required_unless_present = "prompt_file")]
    pub prompt: Vec<String>,
    /// Prompts, one a line; - reads standard input. Every line counts that is not empty, also one that starts with #.
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Images for each prompt.
    #[arg(long, alias = "num-images", value_name = "N", default_value_t = 1, value_parser = whole(1, MAX_IMAGES))]
    pub images_per_prompt: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub size: SizeArgs,
    #[command(flatten)]
    pub seed: SeedArgs,
    /// What images are to be unlike, for FLUX.2 as long as it was not distilled and for FLUX.1 with --true-cfg: each step
    /// computes a second velocity. Default: nothing.
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// A reference image (PNG or JPEG) for a model that edits: FLUX.2, where it may be given several times, and
    /// FLUX.1-Kontext.
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Longest text the text encoder is given, in tokens. Default: 512 (FLUX.2, dev), 256 (schnell), or the tokenizer's
    /// limit.
    #[arg(long, value_name = "TOKENS", value_parser = whole(1, MAX_TEXT_TOKENS))]
    pub max_sequence_length: Option<usize>,
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub decode: DecodeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}
