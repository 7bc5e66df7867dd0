//! The `fastflux` binary: parse, run, print the error once.

use std::process::ExitCode;

use clap::Parser;
#[cfg(unix)]
use fastflux::files::output::install_signal_handlers;
use fastflux::{cli::Cli, commands, device, ui};

/// Keeps the memory of tensors that come and go; the system's allocator would return it page by page.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(unix)]
    if let Err(error) = install_signal_handlers() {
        ui::warn(format!(
            "cannot install signal handlers; Ctrl-C may leave temporary files: {error}"
        ));
    }
    ui::set_quiet(cli.quiet);
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            let error = match device::out_of_memory(&error) {
                Some(advice) => error.context(advice),
                None => error,
            };
            ui::error(&error);
            ExitCode::from(1)
        }
    }
}
