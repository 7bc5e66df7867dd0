//! `train-sandwich`: opens pruned model and teacher, trains or goes on training, writes the healed model.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use candle::DType;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{
    train::{self, Pair, Resolved},
    train_memory, train_output,
};
use crate::{
    checkpoint::{advise, target},
    cli::TrainArgs,
    pipeline::Pipeline,
    train::{
        Entry, Training, Watch, sandwich,
        state::{self, Saved, StateFile},
    },
    ui,
};

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let folder = state_folder(&args.output.path);
    let resuming = folder.exists();
    // what has a report may be of this very run, killed when everything was done: looked at below
    if !resuming && !args.output.path.join(train_output::REPORT).exists() {
        target::check_folder(&args.output.path, args.output.force)?;
    }
    let runtime = super::runtime(args.run)?;
    ensure!(
        runtime.dtype != DType::F16,
        "--dtype f16: gradients are too small for f16 and would be 0\nhint: use bf16 or f32"
    );
    if args.restart && !args.dry_run.dry_run && folder.exists() {
        state::remove(&folder).context("--restart")?;
    }
    let pruned = match args.pipeline.model.model {
        Some(_) => super::open(&super::model_choice(&args.pipeline))?,
        None if args.dry_run.dry_run && !folder.join(state::PRUNED).exists() => {
            bail!("--dry-run: name a pruned model with --model\nhint: `fastflux prune` makes one")
        }
        None => Pipeline::open(&train::prune_bundled(args, &folder.join(state::PRUNED))?)?,
    };
    let pair = Pair::open(args, pruned)?;
    let resolved = train::resolve(args, &pair.teacher)?;
    let sandwiches = sandwich::sandwiches(
        &pair.pruned.config.layout,
        &pair.teacher.config.layout,
        &resolved.recipe.sandwich,
    )?;
    let way = train_memory::way(args, &pair, &resolved, &sandwiches, &runtime)?;
    if args.dry_run.dry_run {
        return train_memory::dry_run(args, &pair, &resolved, &sandwiches, way, &runtime);
    }
    target::check_writable(&args.output.path)?;
    let settings = train::settings(&pair, &resolved, &runtime);
    let state = StateFile::new(&folder, settings.clone());
    if let Some(report) = finished(&args.output.path, &settings).filter(|_| !args.output.force) {
        // killed after its output was in place and before its state was removed
        ui::note(format!(
            "`{}` is of this very run",
            args.output.path.display()
        ));
        show(args, &report)?;
        return state::remove(&folder);
    }
    if let Some(log) = &args.log {
        check_log(log, resuming || args.output.force)?;
    }
    target::check_folder(&args.output.path, args.output.force)?;
    let saved = advise(state.load(), "--restart starts over")?;
    if let Some(saved) = &saved {
        ui::note(format!(
            "going on with the run saved in `{}`: {} of its phases done, {} steps of the next",
            folder.display(),
            saved.progress.phase,
            saved.progress.step
        ));
    }
    let flux = || pair.flux(way.offload, &runtime);
    let (flux, pictures) = train::pictures(
        &folder, &pair, &resolved, &flux, &settings, way.ahead, &runtime,
    )?;
    let (pictures, held_out) = pictures.split(train::held_out_pictures(pictures.len()))?;
    let (student, shared) = pair.student(&flux, way.offload, &runtime)?;
    let mut training = Training {
        teacher: &flux,
        student,
        shared,
        sandwiches,
        pictures,
        held_out,
        batch: resolved.batch,
        held_out_states: resolved.held_out,
        recipe: &resolved.recipe,
        save_every: args.save_every,
        recompute: way.recompute,
        ahead: way.ahead,
    };
    let before = training.velocity_error()?;
    let start = Instant::now();
    let mut watching = Watching::new(args, &resolved, &training, &state, saved.as_ref())?;
    let done = training.run(saved, &mut watching)?;
    watching.finish();
    let after = training.velocity_error()?;
    let report = json!({
        "output": args.output.path.display().to_string(),
        "velocity_error": { "before": before, "after": after },
        "phases": done.progress.reports,
        "seconds": start.elapsed().as_secs_f64(),
        "recipe": resolved.recipe,
        "settings": settings.to_string(),
    });
    train_output::write(args, &pair, &training.student.trunk, &done, &report)?;
    show(args, &report)?;
    ui::note(format!("wrote `{}`", args.output.path.display()));
    state::remove(&folder)
}

/// Where a run is saved while it goes on.
fn state_folder(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".state");
    output.with_file_name(name)
}

/// Fails when the log cannot be written, or would replace a file (unless `force`: a run that goes on writes its own log
/// anew). A terminal or a pipe is fine.
fn check_log(path: &Path, force: bool) -> Result<()> {
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
struct Watching<'a> {
    state: &'a StateFile,
    progress: ProgressBar,
    log: Option<(PathBuf, BufWriter<File>)>,
    phases: usize,
    tokens: usize,
    title: String,
    start: Instant,
    steps: usize,
    held_out: Option<f64>,
}

impl<'a> Watching<'a> {
    fn new(
        args: &TrainArgs,
        resolved: &Resolved,
        training: &Training,
        state: &'a StateFile,
        saved: Option<&Saved>,
    ) -> Result<Self> {
        let log = args.log.as_ref().map(|path| {
            let file = File::create(path)
                .with_context(|| format!("--log: cannot write `{}`", path.display()))?;
            anyhow::Ok((path.clone(), BufWriter::new(file)))
        });
        let (text, image) = training.pictures.tokens()?;
        let mut out = Self {
            state,
            progress: ProgressBar::hidden(),
            log: log.transpose()?,
            phases: training.count(),
            tokens: (text + image) * resolved.batch * resolved.recipe.data.accumulate,
            title: String::new(),
            start: Instant::now(),
            steps: 0,
            held_out: None,
        };
        // a run that goes on begins its log anew with what was logged before
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

    fn finish(&self) {
        if !self.title.is_empty() {
            ui::done(&self.progress, format!("trained {}", self.title));
        }
    }
}

impl Watch for Watching<'_> {
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
        self.progress = ui::progress(steps, "training");
        self.progress.set_position(done as u64);
        self.start = Instant::now();
        self.steps = 0;
        self.held_out = None;
    }

    fn save(&mut self, saved: &Saved) -> Result<()> {
        self.state.save(saved)
    }
}

/// The report of the run of `settings` that wrote `output`, where there is one.
fn finished(output: &Path, settings: &Value) -> Option<Value> {
    let text = std::fs::read(output.join(train_output::REPORT)).ok()?;
    let report: Value = serde_json::from_slice(&text).ok()?;
    // as texts: a parsed float may be off by its last bit
    let settings = settings.to_string();
    let same = report["settings"].as_str()? == settings;
    same.then_some(report)
}

fn show(args: &TrainArgs, report: &Value) -> Result<()> {
    if args.output.print.json {
        return ui::json(report);
    }
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let phases = report["phases"].as_array().cloned().unwrap_or_default();
    let rows: Vec<Vec<String>> = phases
        .iter()
        .map(|r| {
            vec![
                r["phase"].as_str().unwrap_or_default().to_owned(),
                r["steps"].to_string(),
                ui::count(number(&r["trainables"])),
                format!("{:.5}", number(&r["before"])),
                format!("{:.5}", number(&r["after"])),
                if r["kept"] == 0 {
                    "did not improve: left as it was".to_owned()
                } else {
                    String::new()
                },
            ]
        })
        .collect();
    let header = ["trained", "steps", "values", "held out before", "after", ""];
    let error = &report["velocity_error"];
    ui::data(format!(
        "{}\n\nthe velocity of the pruned model is off by {:.4} instead of {:.4} (relative MSE, held-out states)",
        ui::table(&header, &rows, &[1, 2, 3, 4]),
        number(&error["after"]),
        number(&error["before"])
    ))
}
