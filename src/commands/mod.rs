//! One file per subcommand: read, call the stage, write. All I/O and talk happens here.

use std::process::ExitCode;

use anyhow::Result;

use serde::Serialize;

use crate::{
    cli::{Command, MemoryArgs, ModelArgs, PipelineArgs, PrintArgs, RunArgs},
    device::Runtime,
    pipeline::{ModelChoice, Pipeline, placement::MemoryLimit},
    ui,
};

mod bench;
mod calibrate;
mod choose;
mod convert;
mod demand;
mod eval;
mod gather;
mod generate;
mod init;
mod inspect;
mod plan;
mod planned;
mod prune;
mod score;
mod select;
mod session;
mod shell;
mod train_sandwich;
mod verify;

/// Runs a subcommand.
///
/// # Errors
/// Whatever the subcommand could not do; `main` prints it.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Calibrate(args) => calibrate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::MergeStats(args) => calibrate::merge(&args).map(|()| ExitCode::SUCCESS),
        Command::Score(args) => score::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => plan::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Prune(args) => prune::run(&args).map(|()| ExitCode::SUCCESS),
        Command::TrainSandwich(args) => train_sandwich::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(&args),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Init(args) => init::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => shell::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => shell::man(&args).map(|()| ExitCode::SUCCESS),
    }
}

/// The model that flags name, without text encoders and VAE.
fn bare_choice(args: &ModelArgs) -> ModelChoice {
    ModelChoice {
        model: args.model.clone(),
        config: args.config.config.clone(),
        ..ModelChoice::default()
    }
}

/// The model that flags name, with the other parts of its pipeline.
fn model_choice(args: &PipelineArgs) -> ModelChoice {
    ModelChoice {
        text_encoders: args.parts.text_encoders.clone(),
        vae: args.parts.vae.clone(),
        ..bare_choice(&args.model)
    }
}

/// The device and number format that flags name.
fn runtime(args: RunArgs) -> Result<Runtime> {
    Runtime::resolve(args.device.device, args.dtype)
}

/// How much of the device flags allow.
fn memory(args: MemoryArgs) -> MemoryLimit {
    MemoryLimit {
        offload: args.offload,
        max_bytes: args.max_vram,
    }
}

/// Prints a report: JSON if flags ask for it, otherwise its table.
fn show(print: PrintArgs, report: &impl Serialize, table: impl FnOnce() -> String) -> Result<()> {
    if print.json {
        ui::json(report)
    } else {
        ui::data(table())
    }
}

/// Opens a model and says so when it is the bundled one.
fn open(choice: &ModelChoice) -> Result<Pipeline> {
    if choice.model.is_none() {
        ui::note(
            "using the bundled tiny model (64×64 pictures of coloured shapes); name a real one with --model, \
             for example --model black-forest-labs/FLUX.1-schnell",
        );
    }
    Pipeline::open(choice)
}
