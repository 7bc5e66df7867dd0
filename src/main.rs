//! The `fastflux` binary: parse, run, print the error once.

use std::process::ExitCode;

use clap::Parser;
use fastflux::{cli::Cli, commands, ui};

fn main() -> ExitCode {
    let cli = Cli::parse();
    ui::set_quiet(cli.quiet);
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            ui::error(&error);
            ExitCode::from(1)
        }
    }
}
