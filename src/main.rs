//! The `fastflux` binary: parse, run, print the error once.

use std::process::ExitCode;

use clap::Parser;
#[cfg(unix)]
use fastflux::files::output::install_signal_handlers;
use fastflux::{cli::Cli, commands, device, ui::Reporter};

/// Keeps the memory of tensors that come and go; the system's allocator would return it page by page.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let reporter = Reporter::new(cli.level());
    #[cfg(unix)]
    if let Err(error) = install_signal_handlers() {
        reporter.warn(format!(
            "cannot install signal handlers; Ctrl-C may leave temporary files: {error}"
        ));
    }
    match commands::run(cli.command, &reporter) {
        Ok(code) => code,
        Err(error) => {
            let error = match device::out_of_memory(&error) {
                Some(advice) => error.context(advice),
                None => error,
            };
            reporter.error(&error);
            ExitCode::from(1)
        }
    }
}
