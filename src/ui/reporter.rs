//! Talk to the person at the terminal: notes, warnings and progress bars on stderr. `main` makes one [`Reporter`] and
//! hands it down; tests take [`Reporter::silent`].

use std::{
    borrow::Cow,
    io::{IsTerminal, Write},
};

use anstyle::{AnsiColor, Style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::wrap;

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing at all (tests).
    Silent,
    /// Warnings and errors only (`--quiet`).
    Quiet,
    /// Notes and progress bars too.
    Normal,
    /// Details too (`--verbose`).
    Verbose,
}

/// Prints notes, warnings and progress bars on stderr. Clones share the bars, so that one line at a time is drawn.
#[derive(Clone, Debug)]
pub struct Reporter {
    level: Level,
    bars: MultiProgress,
}

impl Default for Reporter {
    fn default() -> Self {
        Self::silent()
    }
}

impl Reporter {
    /// One that says as much as `level` allows. Bars are drawn on a terminal only.
    pub fn new(level: Level) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        if level >= Level::Normal && std::io::stderr().is_terminal() {
            bars.set_draw_target(ProgressDrawTarget::stderr());
        }
        Self { level, bars }
    }

    /// One that prints nothing.
    pub fn silent() -> Self {
        Self::new(Level::Silent)
    }

    /// Tells the user something.
    pub fn note(&self, text: impl AsRef<str>) {
        self.print(Level::Normal, None, text.as_ref());
    }

    /// Something that only `--verbose` prints.
    pub fn detail(&self, text: impl AsRef<str>) {
        self.print(Level::Verbose, None, text.as_ref());
    }

    /// Something that may need attention; printed with `--quiet` too.
    pub fn warn(&self, text: impl AsRef<str>) {
        let label = ("warning:", AnsiColor::Yellow);
        self.print(Level::Quiet, Some(label), text.as_ref());
    }

    /// Prints an error and its causes in one line; hints follow on lines of their own.
    pub fn error(&self, error: &anyhow::Error) {
        let (message, hints) = super::message(error);
        let text = [&[message][..], &hints].concat().join("\n");
        self.print(Level::Quiet, Some(("error:", AnsiColor::Red)), &text);
    }

    /// A progress bar of `steps`; hidden when stderr is not a terminal or with `--quiet`.
    pub fn progress(&self, steps: usize, what: impl Into<Cow<'static, str>>) -> ProgressBar {
        let template = "{prefix} {bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]";
        self.bar(steps as u64, template).with_prefix(what)
    }

    /// A progress bar for a download of `size` bytes of which `done` are there. Its message is the name, shortened to
    /// what the terminal has room for.
    pub fn download(&self, name: &str, size: u64, done: u64) -> ProgressBar {
        let template = "{wide_msg} {bar:20} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} [{elapsed} < {eta}]";
        let bar = self.bar(size, template).with_message(name.to_owned());
        bar.set_position(done);
        bar.reset_eta(); // what was there before says nothing about the speed now
        bar
    }

    /// Takes a finished bar away and says how long the work took.
    pub fn done(&self, bar: &ProgressBar, what: impl AsRef<str>) {
        bar.finish_and_clear();
        let seconds = bar.elapsed().as_secs_f64();
        self.note(format!("{} ({seconds:.1} s)", what.as_ref()));
    }

    fn bar(&self, len: u64, template: &str) -> ProgressBar {
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::hidden());
        self.bars.add(bar.with_style(style))
    }

    /// Ignores write errors: a closed stderr must not abort the run.
    fn print(&self, level: Level, label: Option<(&str, AnsiColor)>, text: &str) {
        if self.level < level {
            return;
        }
        let mut text = super::printable(text);
        if let Some((end, _)) = text.char_indices().nth(super::MAX_MESSAGE) {
            text.truncate(end);
            text.push('…');
        }
        let (label, style) = label.map_or(("", Style::new()), |(label, color)| {
            (label, Style::new().bold().fg_color(Some(color.into())))
        });
        let text = if label.is_empty() {
            text.clone()
        } else {
            format!("{label} {text}")
        };
        let text = wrap(&text, super::width());
        let text = text.strip_prefix(label).unwrap_or(&text);
        self.bars.suspend(|| {
            let _ = writeln!(anstream::stderr(), "{style}{label}{style:#}{text}");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_in_order() {
        assert!(Level::Silent < Level::Quiet && Level::Quiet < Level::Normal);
        assert!(Level::Normal < Level::Verbose);
    }

    #[test]
    fn bars_of_a_silent_reporter_count_all_the_same() {
        let bar = Reporter::silent().progress(3, "testing");
        bar.inc(2);
        assert!(bar.is_hidden() && bar.position() == 2);
    }
}
