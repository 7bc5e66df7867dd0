//! One file per subcommand: read, call the stage, write. All I/O and talk happens here.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::{
    cli::Command,
    model::Flux,
    pipeline::{ModelChoice, Pipeline},
    ui,
};

mod inspect;

/// Runs a subcommand.
///
/// # Errors
/// Whatever the subcommand could not do; `main` prints it.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        _ => anyhow::bail!("not there yet"),
    }
}

/// Opens a model and says so when it is the bundled one.
fn open(choice: &ModelChoice) -> Result<Pipeline> {
    if choice.model.is_none() {
        ui::note("using the bundled tiny model (64×64 pictures of coloured shapes); name a real one with --model, for example --model black-forest-labs/FLUX.1-dev");
    }
    Pipeline::open(choice)
}
