//! The progress bar of one download.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr for `size` bytes of which `done` are there; hidden when stderr is not a terminal.
pub(super) fn download(name: &str, size: u64, done: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr());
    let style = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar.set_position(done);
    bar.reset_eta(); // what was there before says nothing about the speed now
    bar
}
