//! The `fastflux` binary: parse, run, print the error once.

use std::process::ExitCode;
#[cfg(unix)]
use std::sync::{Arc, atomic::AtomicBool};

use clap::Parser;
use fastflux::{checkpoint::target, cli::Cli, commands, device, ui};

/// Keeps the memory of tensors that come and go, where the system's allocator would return it page by page.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(unix)]
    if let Err(error) = heed_signals() {
        ui::warn(format!("signals are not heeded: {error}"));
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

/// Told to stop, the process removes what it has begun to write and ends by that signal. A file that outgrows its limit
/// is an error like a full disk.
#[cfg(unix)]
fn heed_signals() -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
        flag,
        iterator::Signals,
        low_level::emulate_default_handler,
    };
    // any handler does: the write then fails
    flag::register(SIGXFSZ, Arc::<AtomicBool>::default())?;
    // what nohup or a shell had ignored stays so
    let ignored = ignored_signals();
    let heeded = [SIGINT, SIGTERM, SIGHUP]
        .into_iter()
        .filter(|signal| ignored.map_or(*signal != SIGHUP, |mask| mask >> (signal - 1) & 1 == 0));
    let mut signals = Signals::new(heeded)?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            target::remove_temporaries();
            let _ = emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// The signals that this process was started to ignore, a bit each; `None` where the system does not say.
#[cfg(unix)]
fn ignored_signals() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}
