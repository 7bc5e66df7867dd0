//! Arguments of `convert`.

use candle::quantized::GgmlDType;
use clap::{ArgGroup, Args};
use safetensors::Dtype;

use super::{DryRunArgs, FolderArgs, OutputArgs, PipelineArgs, units::weight_dtype};
use crate::{checkpoint::convert::Target, quant::QuantType};

/// `convert`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    group = ArgGroup::new("target").required(true).args(["dtype", "gguf"]),
    mut_arg("output", |arg| {
        arg.value_name("FILE|DIR").help("What to write: a .safetensors or .gguf file, or a folder with it and a config.json")
    }),
    mut_arg("dry_run", |arg| arg.help("Print how large the file would be and write nothing"))
)]
pub struct ConvertArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Write safetensors in bf16, f16, f32 or f8e4m3 (float8 for the kept blocks' matrices, the rest as it is).
    #[arg(long, value_parser = dtype)]
    pub dtype: Option<Target>,
    /// Write GGUF with the kept blocks' matrices in q8_0 or q4_k.
    #[arg(long, value_name = "FORMAT", value_parser = gguf)]
    pub gguf: Option<Target>,
    /// With --dtype f8e4m3: write no scale for each matrix, as plain ComfyUI files have none.
    #[arg(long, conflicts_with = "gguf")]
    pub no_scale: bool,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub folder: FolderArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

fn dtype(text: &str) -> Result<Target, String> {
    match text {
        "f8e4m3" | "fp8" => Ok(Target::Float8 { scaled: true }),
        _ => weight_dtype(text)
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
