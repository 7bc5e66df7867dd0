//! Arguments of `init`.

use std::path::PathBuf;

use clap::Args;
use safetensors::Dtype;

use super::{DryRunArgs, LayoutArgs, PrintArgs, SeedArgs, units::weight_dtype};

/// `init`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("seed", |arg| arg.help("The same seed gives the same file, on every machine. Default: 0")),
    mut_arg("layout", |arg| arg.help("Names of the tensors: original or diffusers")),
    mut_arg("dry_run", |arg| arg.help("Print how large the file would be and write nothing"))
)]
pub struct InitArgs {
    /// What to make: a diffusers transformer config.json (or one that `prune` wrote), flux1-dev, flux1-schnell,
    /// flux2-klein-4b or flux2-klein-9b.
    #[arg(long, value_name = "FILE|NAME", help_heading = "Model")]
    pub config: String,
    #[command(flatten)]
    pub seed: SeedArgs,
    /// Number format: bf16, f16 or f32.
    #[arg(long, default_value = "bf16", value_parser = weight_dtype)]
    pub dtype: Dtype,
    /// The .safetensors file to write; a config.json is written next to it.
    #[arg(
        long,
        short,
        value_name = "FILE",
        required_unless_present = "dry_run",
        help_heading = "Output"
    )]
    pub output: Option<PathBuf>,
    /// Overwrite an existing output.
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    #[command(flatten)]
    pub print: PrintArgs,
    #[command(flatten)]
    pub layout: LayoutArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}
