//! Signals that stop the process: temporary files are removed first.

use std::sync::{Arc, atomic::AtomicBool};

use signal_hook::{
    consts::{SIGBUS, SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
    flag,
    iterator::Signals,
    low_level::emulate_default_handler,
};

use crate::ui::{Level, Reporter};

use super::registry::{remove_locks, remove_temporaries, unfinished};

/// Makes SIGINT, SIGTERM and SIGHUP remove what this process has begun to write before they end it, and SIGXFSZ (a file
/// outgrows its limit) an error like a full disk.
///
/// # Errors
/// When the system refuses a handler; then an interrupted run may leave temporary files.
pub fn install_signal_handlers() -> std::io::Result<()> {
    // any handler does: the write then fails
    flag::register(SIGXFSZ, Arc::<AtomicBool>::default())?;
    // what nohup or a shell had ignored stays so
    let ignored = ignored_signals();
    let handled = [SIGINT, SIGTERM, SIGHUP]
        .into_iter()
        .filter(|signal| ignored.map_or(*signal != SIGHUP, |mask| mask >> (signal - 1) & 1 == 0));
    // a mapped file that was cut short: the thread that read beyond its end waits in its read meanwhile
    let mut signals = Signals::new(handled.chain([SIGBUS]))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGBUS {
                say_what_was_cut();
            }
            remove_temporaries();
            remove_locks();
            if let Some(saved) = unfinished() {
                Reporter::new(Level::Normal).note(format!(
                    "stopped; the same command goes on from `{}`",
                    saved.display()
                ));
            }
            let _ = emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// Names the mapped file that is shorter than it was, or says that one could not be read.
fn say_what_was_cut() {
    let cut = super::super::mapped_and_cut();
    let what = match &cut {
        Some(path) => format!("`{}` was cut short while it was read", path.display()),
        None => "a mapped file could not be read: its disk failed, or it was cut short".to_owned(),
    };
    Reporter::new(Level::Quiet).error(&anyhow::anyhow!(
        "{what}\nhint: fetch or copy the file again, and change no file that a command reads"
    ));
}

/// The signals that this process was started to ignore, a bit each; `None` if the system does not say.
fn ignored_signals() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}
