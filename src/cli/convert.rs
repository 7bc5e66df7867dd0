//! Arguments of `convert`.

use std::path::PathBuf;

use candle::quantized::GgmlDType;
use clap::{ArgGroup, Args};
use safetensors::Dtype;

use super::ModelArgs;
use crate::{checkpoint::convert::Target, quant::QuantType};

/// `convert`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of its own on the command line"
)]
#[command(group = ArgGroup::new("format").required(true).args(["dtype", "gguf"]))]
pub struct ConvertArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Write safetensors in bf16, f16, f32 or f8e4m3 (float8 for the kept blocks' matrices, the rest as it is).
    #[arg(long, value_parser = dtype)]
    pub dtype: Option<Target>,
    /// Write GGUF with the kept blocks' matrices in q8_0 or q4_k.
    #[arg(long, value_name = "FORMAT", value_parser = gguf)]
    pub gguf: Option<Target>,
    /// With --dtype f8e4m3: no scale for each matrix, as plain ComfyUI files have it.
    #[arg(long, conflicts_with = "gguf")]
    pub no_scale: bool,
    /// What to write: a .safetensors or .gguf file, or a folder with it and a config.json.
    #[arg(long, short, value_name = "FILE|DIR")]
    pub output: PathBuf,
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

fn dtype(text: &str) -> Result<Target, String> {
    match text {
        "f8e4m3" | "fp8" => Ok(Target::Float8 { scaled: true }),
        _ => super::weight_dtype(text)
            .map(Target::Plain)
            .map_err(|_| "expected bf16, f16, f32 or f8e4m3".to_owned()),
    }
}

fn gguf(text: &str) -> Result<Target, String> {
    match text.to_ascii_lowercase().as_str() {
        "q8_0" => Ok(Target::Gguf(QuantType::Blocks(GgmlDType::Q8_0))),
        "q4_k" => Ok(Target::Gguf(QuantType::Blocks(GgmlDType::Q4K))),
        _ => Err("expected q8_0 or q4_k".to_owned()),
    }
}

impl ConvertArgs {
    /// What is asked for.
    pub fn target(&self) -> Target {
        match (self.dtype.or(self.gguf), self.no_scale) {
            (Some(Target::Float8 { .. }), true) => Target::Float8 { scaled: false },
            (Some(target), _) => target,
            (None, _) => Target::Plain(Dtype::BF16),
        }
    }
}
