//! Arguments of `inspect`.

use clap::Args;

use super::{ModelArgs, PrintArgs, SizeArgs, units::whole};
use crate::pipeline::defaults::MAX_TEXT_TOKENS;

/// `inspect`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub size: SizeArgs,
    /// Text tokens that FLOPs are counted for. Default: what the model is given.
    #[arg(long, value_parser = whole(1, MAX_TEXT_TOKENS))]
    pub text_tokens: Option<usize>,
    #[command(flatten)]
    pub print: PrintArgs,
}
