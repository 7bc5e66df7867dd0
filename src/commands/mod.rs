//! One file per subcommand: read, call the stage, write. All I/O and talk happens here.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use self::options::{bare_choice, memory, model_choice, open, runtime};
use crate::{
    cli::{Command, PrintArgs},
    ui::{self, Reporter},
};

mod bench;
mod calibrate;
mod convert;
mod eval;
mod generate;
mod init;
mod inspect;
mod merge_stats;
mod options;
mod plan;
mod prune;
mod score;
mod shell;
mod train_sandwich;
mod verify;

/// Runs a subcommand.
///
/// # Errors
/// Whatever the subcommand could not do; `main` prints it.
pub fn run(command: Command, reporter: &Reporter) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Calibrate(args) => calibrate::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::MergeStats(args) => merge_stats::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Score(args) => score::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => plan::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Prune(args) => prune::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::TrainSandwich(args) => {
            train_sandwich::run(&args, reporter).map(|()| ExitCode::SUCCESS)
        }
        Command::Generate(args) => generate::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(&args, reporter),
        Command::Convert(args) => convert::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Init(args) => init::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => shell::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => shell::man(&args).map(|()| ExitCode::SUCCESS),
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
