//! Arguments of `diff`.

use clap::Args;

use super::{OutputArgs, shared::written};

/// `diff`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
#[command(
    mut_arg("output", |arg| written(arg, "FILE", "patch.safetensors", "Patch to write"))
)]
pub struct DiffArgs {
    /// A pruned model, named as elsewhere (folder, file or hub id); may be given several times.
    #[arg(long, value_name = "PATH|ID", required = true, help_heading = "Model")]
    pub model: Vec<String>,
    /// The model that they were pruned from. Default: the one that the first --model names.
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub base: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}
