//! The `fastflux` binary: parse, run, print the error once.

use std::{
    alloc::{GlobalAlloc, Layout},
    process::ExitCode,
};

use clap::Parser;
#[cfg(unix)]
use fastflux::files::output::install_signal_handlers;
use mimalloc::MiMalloc;

use fastflux::{cli::Cli, commands, device, files::output::take_notes, ui::Reporter};

/// mimalloc, which keeps the memory of tensors that come and go (the system's allocator would return it page by page), with
/// advice instead of an abort when there is no more.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

#[expect(
    unsafe_code,
    reason = "the trait's methods are unsafe; each is mimalloc's"
)]
// SAFETY: every call is passed on to mimalloc with what it was given, and what comes back is not touched.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: see above.
        not_null(unsafe { MiMalloc.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: see above.
        not_null(unsafe { MiMalloc.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: see above.
        not_null(unsafe { MiMalloc.realloc(block, layout, size) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: see above.
        unsafe { MiMalloc.dealloc(block, layout) }
    }
}

fn not_null(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        device::exit_without_memory();
    }
    block
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let reporter = Reporter::new(cli.level());
    #[cfg(unix)]
    if let Err(error) = install_signal_handlers() {
        reporter.warn(format!(
            "cannot install signal handlers; Ctrl-C may leave temporary files: {error}"
        ));
    }
    let outcome = commands::run(cli.command, &reporter);
    for note in take_notes() {
        reporter.note(note);
    }
    match outcome {
        Ok(code) => code,
        Err(error) => {
            let error = match device::failure(&error) {
                Some(advice) => error.context(advice),
                None => error,
            };
            reporter.error(&error);
            ExitCode::from(1)
        }
    }
}
