//! Signals that stop the process: temporary files are removed first.

use std::sync::{Arc, atomic::AtomicBool};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
    flag,
    iterator::Signals,
    low_level::emulate_default_handler,
};

use super::registry::remove_temporaries;

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
    let mut signals = Signals::new(handled)?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            remove_temporaries();
            let _ = emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// The signals that this process was started to ignore, a bit each; `None` if the system does not say.
fn ignored_signals() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}
