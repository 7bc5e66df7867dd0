//! One file per subcommand: read, call the stage, write. All I/O and talk happens here.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use serde::Serialize;

use self::options::{bare_choice, memory, model_choice, open, runtime};
use crate::{
    checkpoint::save,
    cli::{Command, PipelineArgs, PrintArgs},
    plot::losses::{self, LossPoint},
    train::Entry,
    ui::{self, Reporter},
};

mod bench;
mod calibrate;
mod convert;
mod diff;
mod doctor;
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
        Command::Diff(args) => diff::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(&args, reporter),
        Command::Convert(args) => convert::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Init(args) => init::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args, reporter).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => doctor::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => shell::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => shell::man(&args).map(|()| ExitCode::SUCCESS),
    }
}

/// Prose below tables is broken at this many columns; tables are no wider.
const COLUMNS: usize = 80;

/// Says what was written, and the command that usually follows.
fn wrote(reporter: &Reporter, output: &Path, next: &str) {
    reporter.note(format!("wrote `{}`", output.display()));
    suggest(reporter, next);
}

/// A path for a shell.
fn path_word(path: &Path) -> String {
    quoted(&path.display().to_string())
}

/// Names the command that usually follows, on stderr.
fn suggest(reporter: &Reporter, command: &str) {
    reporter.note(format!("next: fastflux {command}"));
}

/// `--model NAME ` as the user gave it, for commands that are suggested.
fn model_flag(model: Option<&str>) -> String {
    model.map_or_else(String::new, |model| format!("--model {} ", quoted(model)))
}

/// The flags that name a model and its parts, as the user gave them, each with a space behind.
fn model_flags(args: &PipelineArgs) -> String {
    let path = |flag: &str, path: &Option<PathBuf>| {
        let path = path.as_deref().map(path_word);
        path.map_or_else(String::new, |path| format!("--{flag} {path} "))
    };
    let model = &args.model;
    let mut out = model_flag(model.model.as_deref());
    let patch = model.patch.choice();
    out += &path("patch", &patch.as_ref().map(|choice| choice.path.clone()));
    if let Some(level) = patch.and_then(|choice| choice.level) {
        out += &format!("--level {} ", quoted(&level));
    }
    for lora in &model.lora.lora {
        let file = format!("{}:{}", lora.path.display(), lora.weight);
        out += &format!("--lora {} ", quoted(&file));
    }
    out += &path("config", &model.config.config);
    out += &path("text-encoders", &args.parts.text_encoders);
    out + &path("vae", &args.parts.vae)
}

/// A word for a shell, in quotes if it needs them.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@/._-+:,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Prints a report: JSON if flags ask for it, otherwise its table.
fn show(print: PrintArgs, report: &impl Serialize, table: impl FnOnce() -> String) -> Result<()> {
    if print.json {
        ui::json(report)
    } else {
        ui::data(ui::wrap(&table(), Some(COLUMNS)))
    }
}

/// The chart of a training run.
fn write_losses(path: &Path, log: &[Entry]) -> Result<()> {
    let points = log.iter().map(|entry| LossPoint {
        phase: &entry.phase,
        step: entry.step,
        loss: entry.loss,
        held_out: entry.held_out,
    });
    let chart = losses::svg_of(&points.collect::<Vec<_>>())?;
    save::write_bytes(path, chart.as_bytes())
}
