//! `train-sandwich`: opens pruned model and teacher, trains or resumes training, writes the healed model.

use anyhow::{Context, Result};

use super::options;
use crate::{
    bench::timing,
    checkpoint::{
        target::{self, OutputFolder},
        with_hint,
    },
    cli::TrainArgs,
    pipeline::{LORA_FILE, placement::MemoryBudget, whole::WholePipeline},
    train::{
        self,
        lock::Lock,
        progress::{self, ProgressObserver},
        report::{self, DryRunReport, REPORT, TrainReport},
        setup::{self, TrainSetup},
        state::{self, StateFile},
        strategy::MemoryRequest,
    },
    ui::{self, Reporter},
};

pub(super) fn run(args: &TrainArgs, reporter: &Reporter) -> Result<()> {
    let (output, force) = (&args.output.path, args.output.force);
    let folder = setup::state_folder(output);
    let resuming = folder.exists();
    // an output with a report may be of this very run, killed when everything was done: checked below
    if !resuming && !output.join(REPORT).exists() {
        target::check_folder(output, force)?;
    }
    let runtime = super::runtime(args.run)?;
    setup::check_dtype(&runtime)?;
    let _lock = Lock::new(&folder, args.dry_run.dry_run)?;
    if args.restart && !args.dry_run.dry_run {
        state::remove(&folder).context("--restart")?;
    }
    let choice = super::model_choice(&args.pipeline, reporter);
    let pair = options::pair(args, &choice, &folder.join(state::PRUNED))?;
    let options = options::train(args, &pair.teacher)?;
    let setup = TrainSetup::new(pair, options, runtime)?;
    let strategy = setup.strategy(MemoryRequest {
        gradient_checkpointing: args.gradient_checkpointing,
        offload: args.memory.offload,
        max_bytes: args.memory.max_vram,
        free: MemoryBudget::new(super::memory(args.memory), &setup.runtime, reporter).limit(),
        dry_run: args.dry_run.dry_run,
    })?;
    if args.dry_run.dry_run {
        let speed = timing::peak(&setup.runtime.device, setup.runtime.dtype)?;
        let bytes = setup.pair.pruned.transformer.bytes() as u64;
        let report = DryRunReport::new(&setup, strategy).with_machine(speed.flops, output, bytes);
        super::show(args.output.print, &report, || report.table())?;
        return report.check();
    }
    target::check_writable(output)?;
    let whole = args.folder.whole;
    let whole = whole.map(|how| setup.pair.pruned.whole(how)).transpose()?;
    let parts = whole.as_ref().map_or(Ok(0), WholePipeline::bytes)?;
    target::check_space(output, setup.pair.pruned.transformer.bytes() as u64 + parts)?;
    let settings = setup.settings();
    if let Some(report) = report::finished(output, &settings).filter(|_| !force) {
        // killed after its output was in place and before its state was removed
        reporter.note(format!("`{}` is of this very run", output.display()));
        super::show(args.output.print, &report, || report.table())?;
        return state::remove(&folder);
    }
    if let Some(log) = &args.log {
        progress::check_log(log, resuming || force)?;
    }
    target::check_folder(output, force)?;
    let state = StateFile::new(&folder, settings.clone());
    let saved = with_hint(state.load(), "--restart starts over")?;
    if let Some(saved) = &saved {
        reporter.note(format!(
            "resuming the run saved in `{}`: {} done, {} of the next",
            folder.display(),
            ui::counted(saved.progress.phase, "phase"),
            ui::counted(saved.progress.step, "step")
        ));
    }
    let mut observer = ProgressObserver::new(&setup, &state, args.log.as_deref(), saved.as_ref())?;
    let trained = train::train(&setup, strategy, &folder, saved, &mut observer)?;
    observer.finish();
    let report = TrainReport {
        output: output.display().to_string(),
        velocity_error: trained.velocity_error,
        phases: trained.saved.progress.reports.clone(),
        seconds: trained.seconds,
        recipe: setup.options.recipe.clone(),
        settings: settings.to_string(),
    };
    let target = OutputFolder::create(output, force)?;
    let keep_lora = args.keep_lora;
    train::write(
        target.path(),
        &setup,
        &trained,
        &report,
        (args.folder.naming(), whole.as_ref()),
        keep_lora,
    )?;
    super::write_losses(&target.path().join("loss.svg"), &trained.saved.progress.log)?;
    target.finish()?;
    if keep_lora {
        let lora = output.join(LORA_FILE).display().to_string();
        reporter.note(format!("--lora {lora} applies what is not merged"));
    }
    super::show(args.output.print, &report, || report.table())?;
    let next = format!("eval --model {}", super::path_word(output));
    super::wrote(reporter, output, &next);
    state::remove(&folder)
}
