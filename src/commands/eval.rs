//! `eval`: the same prompts and noise through several models; numbers, images and a page that shows them.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::options::{self, EVAL_SEED};
use crate::{
    calibrate::pass::Shard,
    checkpoint::target::{self, OutputFolder},
    cli::EvalArgs,
    eval::{
        self, Scorers,
        clip::ClipFiles,
        export::{self, ExportOptions, Suite},
        lpips::LpipsFiles,
    },
    files::BUNDLED,
    pipeline::{ModelChoice, Pipeline, placement::MemoryBudget},
    prune::plan_run::PlanRun,
    ui::Reporter,
};

pub(super) fn run(args: &EvalArgs, reporter: &Reporter) -> Result<()> {
    if let (Some(suite), Some(prompts)) = (args.export, &args.prompts.prompts) {
        return export(args, suite, prompts, reporter);
    }
    target::check_folder(&args.output.path, args.output.force)?;
    let runtime = super::runtime(args.run)?;
    let budget = MemoryBudget::new(super::memory(args.memory), &runtime, reporter);
    let (baseline, mut models) = open(args, reporter)?;
    let plans: Vec<PlanRun> = args
        .plan
        .iter()
        .map(|path| PlanRun::read(path, args.recipe.recipe.as_deref(), &baseline))
        .collect::<Result<_>>()?;
    let clip = args.clip.as_deref();
    let lpips = args.lpips.as_deref();
    let scorers = Scorers {
        clip: clip
            .map(|clip| ClipFiles::find(clip, reporter))
            .transpose()?,
        lpips: lpips
            .map(|lpips| LpipsFiles::find(lpips, reporter))
            .transpose()?,
    };
    let options = options::eval(args, &baseline)?;
    if let Some(lpips) = &scorers.lpips {
        lpips.check_size(options.size)?;
    }
    eval::check(&baseline, &models, &options)?;
    target::check_writable(&args.output.path)?;
    for plan in plans {
        let budget = budget.clone().for_pipeline(&baseline);
        models.push(plan.carry_out(&baseline, &budget, &args.output.path)?);
    }
    let evaluation = eval::run(&baseline, &models, &options, &scorers, &budget)?;
    let output = OutputFolder::create(&args.output.path, args.output.force)?;
    evaluation.write(output.path(), &models)?;
    output.finish()?;
    eval::unfinished::remove(&args.output.path)?;
    // what plans made has no card
    evaluation.publish(&baseline, &models[..args.model.len()]);
    let report = &evaluation.report;
    super::show(args.output.print, report, || report.table())?;
    let page = args.output.path.join("report.html");
    reporter.note(format!("wrote `{}`; open it in a browser", page.display()));
    Ok(())
}

/// Draws images for another scorer.
fn export(args: &EvalArgs, suite: Suite, prompts: &Path, reporter: &Reporter) -> Result<()> {
    let runtime = super::runtime(args.run)?;
    let mut pipeline = Pipeline::open(&ModelChoice {
        model: args.model.first().cloned(),
        ..choice(args, reporter)
    })?;
    pipeline.set_true_cfg(args.sampling.cfg.true_cfg)?;
    pipeline.note_guesses(args.sampling.steps);
    let budget =
        MemoryBudget::new(super::memory(args.memory), &runtime, reporter).for_pipeline(&pipeline);
    let (asked, model) = (&args.sampling, &pipeline);
    let options = ExportOptions {
        suite,
        shard: args.shard.unwrap_or(Shard::WHOLE),
        size: pipeline.image_size(args.size.width, args.size.height)?,
        steps: asked.steps.unwrap_or_else(|| model.default_steps()),
        guidance: model.guidance_or_default(asked.guidance),
        seed: args.seed.seed.unwrap_or(EVAL_SEED),
        vae_tile: args.decode.vae_tile,
    };
    pipeline.check_parts(true)?;
    let report = export::run(&pipeline, &budget, prompts, &args.output.path, &options)?;
    super::show(args.output.print, &report, || report.text())
}

/// What flags say of every model but its name.
fn choice(args: &EvalArgs, reporter: &Reporter) -> ModelChoice {
    ModelChoice {
        model: None,
        lora: args.lora.lora.clone(),
        patch: args.patch.choice(),
        config: args.config.config.clone(),
        text_encoders: args.parts.text_encoders.clone(),
        fetch_base: args.parts.fetch_base,
        vae: args.parts.vae.clone(),
        reporter: reporter.clone(),
    }
}

/// The baseline and the models, all of one family.
fn open(args: &EvalArgs, reporter: &Reporter) -> Result<(Pipeline, Vec<Pipeline>)> {
    let choice = |model: &str| ModelChoice {
        model: Some(model.to_owned()),
        ..choice(args, reporter)
    };
    let models: Vec<Pipeline> = args
        .model
        .iter()
        .map(|model| Pipeline::open(&choice(model)))
        .collect::<Result<_>>()?;
    let mut baseline = match (&args.baseline, models.first()) {
        (Some(baseline), model) => {
            let record = model.and_then(|model| model.record.as_ref());
            let choice = ModelChoice {
                lora: model.map_or_else(|| args.lora.lora.clone(), Pipeline::shared_lora),
                patch: None,
                ..choice(baseline)
            };
            Pipeline::open_original(&choice, record).context("--baseline")?
        }
        (None, Some(model)) if model.record.is_some() => model.base_with(&choice(""))?,
        (None, Some(model)) => bail!(
            "`{}` does not say what it was made from\nhint: name the model to compare it with by --baseline",
            model.name
        ),
        (None, None) if !args.plan.is_empty() => Pipeline::open(&choice(BUNDLED))?,
        (None, None) => bail!(
            "--model is missing: eval compares a pruned model with the one it was made from\nhint: `fastflux prune --output pruned` prunes the bundled model; then `fastflux eval --model pruned`"
        ),
    };
    for model in &models {
        eval::check_family(&baseline, model)?;
    }
    baseline.set_true_cfg(args.sampling.cfg.true_cfg)?;
    baseline.note_guesses(args.sampling.steps);
    Ok((baseline, models))
}
