//! Arguments of `doctor`, `completions` and `man`.

use clap::Args;
use clap_complete::Shell;

use super::PrintArgs;

/// `completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell that is to complete fastflux's commands and flags.
    pub shell: Shell,
}

/// `doctor`.
#[derive(Args, Debug)]
#[expect(missing_docs, reason = "flattened arguments")]
pub struct DoctorArgs {
    #[command(flatten)]
    pub print: PrintArgs,
}

/// `man`.
#[derive(Args, Debug)]
pub struct ManArgs {
    /// The command that the page is about. Default: fastflux itself.
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,
}
