//! Tests that need hardware which is not there.

use std::{io::Write, sync::Mutex};

/// Reports on standard error that the test which runs on this thread skips what needs `hardware` (`avx512`,
/// `avx512bf16`, `cuda`), once for each test, past the harness, which would hide it.
///
/// Panics if `FASTFLUX_REQUIRE`, a list such as `avx512,cuda`, names it: there a skipped test is a failed one.
pub(crate) fn skip(hardware: &str) {
    static REPORTED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let required = std::env::var("FASTFLUX_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name.trim() == hardware),
        "FASTFLUX_REQUIRE names {hardware}, which this machine does not have"
    );
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let line = format!("skipped: {test}: no {hardware} here\n");
    let mut reported = REPORTED.lock().expect("no panic while reporting");
    if !reported.contains(&line) {
        // a closed stderr must not fail the test
        let _ = std::io::stderr().write_all(line.as_bytes());
        reported.push(line);
    }
}
