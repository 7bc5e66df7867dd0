//! Arguments of `completions` and `man`.

use clap::Args;
use clap_complete::Shell;

/// `completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell that is to complete fastflux's commands and flags.
    pub shell: Shell,
}

/// `man`.
#[derive(Args, Debug)]
pub struct ManArgs {
    /// The command that the page is about. Default: fastflux itself.
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,
}
