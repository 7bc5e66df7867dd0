//! Shows a run as it goes on: a progress bar, a log file, and saving.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{
    log::Entry,
    run::TrainObserver,
    setup::TrainSetup,
    state::{Saved, StateFile},
};
use crate::{checkpoint::target, ui, ui::Reporter};

/// Fails when the log cannot be written, or would replace a file (unless `force`: a run that goes on writes its own log
/// again). A terminal or a pipe is fine.
///
/// # Errors
/// The message names the file.
pub fn check_log(path: &Path, force: bool) -> Result<()> {
    let shown = path.display();
    ensure!(!path.is_dir(), "--log `{shown}` is a folder");
    ensure!(
        force || !path.is_file(),
        "--log `{shown}` exists already\nhint: add --force to overwrite it, or choose another name"
    );
    if path.is_file() || !path.exists() {
        target::check_writable(path).context("--log")?;
    }
    Ok(())
}

/// Progress bar, log file and saving.
pub struct ProgressObserver<'a> {
    state: &'a StateFile,
    progress: ProgressBar,
    log: Option<(PathBuf, BufWriter<File>)>,
    phases: usize,
    /// Tokens of one step.
    tokens: usize,
    title: String,
    start: Instant,
    steps: usize,
    held_out: Option<f64>,
    reporter: Reporter,
}

impl<'a> ProgressObserver<'a> {
    /// Writes to `log`, one JSON object a line, beginning with what `saved` had logged.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn new(
        setup: &TrainSetup,
        state: &'a StateFile,
        log: Option<&Path>,
        saved: Option<&Saved>,
    ) -> Result<Self> {
        let log = log.map(|path| {
            let file = File::create(path)
                .with_context(|| format!("--log: cannot write `{}`", path.display()))?;
            anyhow::Ok((path.to_path_buf(), BufWriter::new(file)))
        });
        let options = &setup.options;
        let tokens = options.text_tokens + options.size.tokens();
        let mut out = Self {
            state,
            progress: ProgressBar::hidden(),
            log: log.transpose()?,
            phases: setup.phase_count(),
            tokens: tokens * options.batch * options.recipe.data.accumulate,
            title: String::new(),
            start: Instant::now(),
            steps: 0,
            held_out: None,
            reporter: setup.pair.pruned.reporter.clone(),
        };
        for entry in saved.iter().flat_map(|s| &s.progress.log) {
            out.write(&json!(entry))?;
        }
        Ok(out)
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        if let Some((path, file)) = &mut self.log {
            writeln!(file, "{line}")
                .and_then(|()| file.flush())
                .with_context(|| format!("--log: cannot write `{}`", path.display()))?;
        }
        Ok(())
    }

    /// Ends the bar of the last phase.
    pub fn finish(&self) {
        if !self.title.is_empty() {
            self.reporter
                .done(&self.progress, format!("trained {}", self.title));
        }
    }
}

impl TrainObserver for ProgressObserver<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let mut line = json!(entry);
        if let Some(loss) = entry.loss {
            self.steps += 1;
            self.held_out = entry.held_out.or(self.held_out);
            let rate = (self.tokens * self.steps) as f64 / self.start.elapsed().as_secs_f64();
            line["tokens-per-second"] = json!(rate.round());
            self.progress.set_position(entry.step as u64);
            self.progress.set_message(format!(
                "{}: loss {loss:.2e}, held out {:.2e}, lr {:.1e}, {} tokens/s",
                self.title,
                self.held_out.unwrap_or(f64::NAN),
                entry.lr.unwrap_or_default(),
                ui::count(rate)
            ));
        } else {
            self.held_out = entry.held_out;
        }
        self.write(&line)
    }

    fn phase(&mut self, name: &str, index: usize, steps: usize, done: usize) {
        self.finish();
        self.title = format!("{} of {}, {name}", index + 1, self.phases);
        self.progress = self.reporter.progress(steps, "training");
        self.progress.set_position(done as u64);
        self.start = Instant::now();
        self.steps = 0;
        self.held_out = None;
    }

    fn save(&mut self, saved: &Saved) -> Result<()> {
        self.state.save(saved)
    }
}
