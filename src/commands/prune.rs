//! `prune`: calibrate, score, plan, fit, write, and draw before and after.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{PixelSize, load};
use crate::{
    calibrate::{
        self,
        states::States,
        stats::{BlockStats, CalibrationStats, StreamStats},
    },
    checkpoint::{
        record::{self, Record},
        save::{self, OutputFolder},
    },
    cli::PruneArgs,
    device::Runtime,
    layout::{BlockId, FluxConfig},
    model::{Block, Flux, cost},
    pipeline::{PRUNED_STEM, Pipeline},
    prune::{
        apply, fit,
        layers::{Fitted, LayerMap, Layers},
        plan::{self, PruningPlan},
        recipe::PruneRecipe,
        refit::{self, Fitting},
    },
    sample::denoise::{Denoise, Encoded},
    score::ablation::{Greedy, HeldOut, greedy},
    ui,
};

/// Prompts drawn before and after, from the calibration list's end.
const PICTURES: usize = 8;
/// Larger pictures take minutes each on small machines: draw fewer.
const PICTURES_LARGE: usize = 2;
/// Prompts sampled for calibration unless asked otherwise.
const SAMPLES: usize = 160;
/// The same for models whose pictures have many tokens: each picture is thousands of rows.
const SAMPLES_LARGE: usize = 32;
/// Image tokens from which a picture counts as large.
const LARGE: usize = 1024;
/// Tokens in one forward where the recipe names no batch.
const TOKENS_PER_FORWARD: usize = 1536;
/// Ridge of the fits that blocks are compared by.
const SCORING_RIDGE: f64 = 1e-4;
/// Tokens of all held-out states where the recipe names no number.
const HELD_OUT_TOKENS: usize = 131_072;

/// A run with everything resolved.
struct Run<'a> {
    pipeline: &'a Pipeline,
    runtime: &'a Runtime,
    recipe: PruneRecipe,
    size: PixelSize,
    flux: Flux,
    batch: usize,
}

/// What calibration and scoring found.
struct Found {
    stats: CalibrationStats,
    fits: LayerMap,
    greedy: Greedy,
    plan: PruningPlan,
    layers: LayerMap,
    /// Relative error of the pruned model's velocity on held-out states.
    velocity_error: f64,
}

pub(super) fn run(args: &PruneArgs) -> Result<()> {
    let recipe = recipe(args)?;
    save::check_free(&args.output, args.force)?;
    let runtime = Runtime::resolve(args.run.device, args.run.dtype)?;
    let pipeline = super::open(&args.pipeline.choice())?;
    let count = plan::blocks_of_ratio(recipe.ratio, &pipeline.config)?;
    let size = super::picture_size(
        &pipeline,
        recipe.calibration.width,
        recipe.calibration.height,
    )?;
    let (recipe, prompts) = resolve(recipe, args, &pipeline, size)?;
    // the output's place is taken now, so that an unwritable folder is found before the long part
    let output = OutputFolder::create(&args.output, args.force)?;

    let encoded = load::encode_prompts(&pipeline, &prompts, None, &runtime)?;
    let flux = load::flux(&pipeline, &runtime)?;
    let tokens = size.tokens() + encoded.txt.dim(1)?;
    let batch = recipe
        .calibration
        .batch
        .unwrap_or((TOKENS_PER_FORWARD / tokens).max(1));
    let run = Run {
        pipeline: &pipeline,
        runtime: &runtime,
        recipe,
        size,
        flux,
        batch,
    };
    let found = run.find(&encoded, count)?;

    let (checkpoint, config) = apply::apply(
        &pipeline.transformer,
        &pipeline.config,
        &found.plan,
        &found.layers,
    )?;
    let recipe = serde_json::to_value(&run.recipe)?;
    let record = Record {
        version: record::VERSION,
        tool: concat!("fastflux ", env!("CARGO_PKG_VERSION")).to_owned(),
        base: pipeline
            .record
            .as_ref()
            .map_or_else(|| pipeline.locator.clone(), |r| r.base.clone()),
        base_fingerprint: pipeline
            .record
            .as_ref()
            .map_or_else(|| found.plan.source.clone(), |r| r.base_fingerprint.clone()),
        layout: config.layout.clone(),
        axes_dims: config.axes_dims.clone(),
        theta: config.theta,
        scheduler: pipeline.scheduler.clone(),
        defaults: serde_json::to_value(&pipeline.defaults)?,
        recipe,
    };
    write(output.path(), checkpoint, &config, &record, &found)?;
    let drawn = run.draw_before_and_after(&found, &encoded, &prompts, output.path())?;
    let report = report(&run, &found, &config, output.path(), args, drawn)?;
    output.finish()?;
    if args.json {
        ui::json(&report)?
    } else {
        ui::data(text(&run, &found, &report))?
    }
    ui::note(format!("wrote `{}`", args.output.display()));
    Ok(())
}

/// The recipe with flags laid over it.
fn recipe(args: &PruneArgs) -> Result<PruneRecipe> {
    let mut recipe = match &args.recipe {
        Some(path) => PruneRecipe::read(path)?,
        None => PruneRecipe::default(),
    };
    let c = &mut recipe.calibration;
    c.samples = args.samples.or(c.samples);
    c.steps = args.steps.or(c.steps);
    c.width = args.width.or(c.width);
    c.height = args.height.or(c.height);
    c.seed = args.seed.unwrap_or(c.seed);
    recipe.ratio = args.ratio.unwrap_or(recipe.ratio);
    recipe.validate()?;
    Ok(recipe)
}

/// Fills what the recipe left to the model, and takes the prompts: first those to fit on, then the held-out ones.
fn resolve(
    mut recipe: PruneRecipe,
    args: &PruneArgs,
    pipeline: &Pipeline,
    size: PixelSize,
) -> Result<(PruneRecipe, Vec<String>)> {
    let mut prompts = match &args.prompts {
        Some(path) => super::read_prompts("--prompts", path)?,
        None => super::bundled_prompts(pipeline),
    };
    let large = size.tokens() >= LARGE;
    let c = &mut recipe.calibration;
    c.steps.get_or_insert(pipeline.default_steps());
    c.guidance.get_or_insert(pipeline.default_guidance());
    (c.width, c.height) = (Some(size.width), Some(size.height));
    let held_out = recipe
        .score
        .held_out
        .unwrap_or((HELD_OUT_TOKENS / size.tokens()).clamp(8, 128));
    recipe.score.held_out = Some(held_out);
    let held_out_pictures = held_out.div_ceil(c.draws);
    let wanted = c
        .samples
        .unwrap_or(if large { SAMPLES_LARGE } else { SAMPLES });
    // a short list is drawn from again, with other noise
    let total = wanted + held_out_pictures;
    if prompts.len() < total {
        prompts = prompts.iter().cycle().take(total).cloned().collect();
    }
    prompts.truncate(total);
    c.samples = Some(wanted);
    Ok((recipe, prompts))
}

impl Run<'_> {
    /// Calibrates, scores, chooses and fits.
    fn find(&self, encoded: &Encoded, count: usize) -> Result<Found> {
        let c = &self.recipe.calibration;
        let schedule = load::schedule(self.pipeline)?;
        let denoise = Denoise {
            flux: &self.flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &schedule,
            steps: c.steps.context("steps are resolved")?,
            guidance: c.guidance.context("guidance is resolved")?,
            size: self.size.latent(),
        };
        let channels = self.pipeline.config.out_channels / 4;
        let batches = encoded.len().div_ceil(self.batch);
        let progress = ui::progress(batches * denoise.steps, "sampling");
        let pictures =
            calibrate::sample(&denoise, encoded, channels, self.batch, c.seed, &progress)?;
        ui::done(&progress, format!("sampled {} pictures", encoded.len()));

        let samples = c.samples.context("samples are resolved")?;
        let noised = |range: std::ops::Range<usize>, draws, seed| -> Result<States> {
            let part = pictures.narrow(0, range.start, range.len())?;
            States::noised(
                part,
                encoded.range(range)?,
                denoise.size,
                denoise.guidance,
                draws,
                seed,
            )
        };
        let states = noised(0..samples, c.draws, c.seed.wrapping_add(1))?;
        let mut held_out = noised(samples..encoded.len(), c.draws, c.seed.wrapping_add(2))?;
        held_out.truncate(
            self.recipe
                .score
                .held_out
                .context("held-out states are resolved")?,
        );

        let config = &self.pipeline.config;
        let progress = ui::progress(states.batches(self.batch).len(), "calibrating");
        let stats = calibrate::gather(
            &self.flux,
            &config.layout,
            &states,
            self.batch,
            self.runtime,
            &progress,
        )?;
        ui::done(&progress, format!("calibrated on {} states", states.len()));
        let progress = ui::progress(stats.blocks.len(), "fitting");
        let mut fits = LayerMap::new();
        let mut blocks: BTreeMap<BlockId, Block> = BTreeMap::new();
        for block in &stats.blocks {
            let layers = self.fit(block)?;
            blocks.insert(
                block.id,
                layers.block(&self.runtime.device, self.runtime.dtype)?,
            );
            fits.insert(block.id, layers);
            progress.inc(1);
        }
        ui::done(&progress, "fitted every block");

        let held_out = HeldOut::new(
            &self.flux,
            &held_out,
            self.batch,
            &self.runtime.device,
            self.runtime.dtype,
        )?;
        // the first round measures every block, later ones a handful
        let evaluations = blocks.len() + 6 * (count - 1);
        let progress = ui::progress(evaluations * held_out.batches(), "scoring");
        let greedy = greedy(&self.flux, &blocks, &held_out, count, &progress)?;
        ui::done(&progress, "scored and chose blocks");
        let chosen: Vec<BlockId> = greedy.choices.iter().map(|c| c.block).collect();
        let source = record::fingerprint(&self.pipeline.transformer)?;
        let reason = format!(
            "greedy: {} of {} blocks, each the one whose replacement by its linear fit costs the final velocity least",
            chosen.len(),
            config.original_ids().count()
        );
        let f = &self.recipe.fit;
        let plan = PruningPlan::new(config, source, chosen, f.form, f.joint, f.collapse, reason);
        let fitting = Fitting {
            ridge: f.ridge,
            sequential: f.sequential,
            batch: self.batch,
        };
        let batches = states.batches(self.batch).len();
        let progress = ui::progress(plan.replace.len() * batches, "refitting");
        let layers = refit::fit_layers(
            &self.flux,
            &states,
            &plan.replace,
            fitting,
            self.runtime,
            &progress,
        )?;
        ui::done(&progress, "fitted the chosen blocks on the pruned prefix");
        let pruned = refit::pruned(&self.flux, &plan.replace, &layers, self.runtime)?;
        let velocity_error = held_out.error(&self.flux, &pruned.trunk)?;
        Ok(Found {
            stats,
            fits,
            greedy,
            plan,
            layers,
            velocity_error,
        })
    }

    /// The plain layer of a block from the statistics alone, for choosing blocks.
    fn fit(&self, block: &BlockStats) -> Result<Layers> {
        let ridge = self.recipe.fit.ridge.unwrap_or(SCORING_RIDGE);
        let fit = |stats: &StreamStats| -> Result<Box<Fitted>> {
            let sums = stats
                .gram
                .as_ref()
                .with_context(|| format!("block {}: no tokens were seen", block.id))?;
            let solution =
                fit::solve(sums, ridge).with_context(|| format!("block {}", block.id))?;
            let width = solution.coefficients.ncols();
            Ok(Box::new(Fitted {
                weight: fit::weight(&solution.coefficients, 0..width)?,
                bias: fit::bias(&solution.coefficients)?,
                vec: None,
                modulation: None,
                error: solution.residual_sq / stats.moments.change_sq.max(f64::MIN_POSITIVE),
                ridge: solution.ridge,
            }))
        };
        Ok(Layers::Streams {
            txt: fit(&block.txt)?,
            img: fit(&block.img)?,
        })
    }

    /// Draws the last prompts with both models into `before-after.png`: unpruned above, pruned below.
    fn draw_before_and_after(
        &self,
        found: &Found,
        encoded: &Encoded,
        prompts: &[String],
        folder: &Path,
    ) -> Result<bool> {
        let files = match self.pipeline.vae_files() {
            Ok(files) => files,
            Err(error) => {
                ui::note(format!("no picture before and after: {error}"));
                return Ok(false);
            }
        };
        let count = if self.size.tokens() >= LARGE {
            PICTURES_LARGE
        } else {
            PICTURES
        }
        .min(encoded.len());
        let encoded = encoded.range(encoded.len() - count..encoded.len())?;
        let prompts = &prompts[prompts.len() - count..];
        let schedule = load::schedule(self.pipeline)?;
        let c = &self.recipe.calibration;
        let vae = load::vae(&files, self.runtime)?;
        let steps = c.steps.context("steps are resolved")?;
        let progress = ui::progress(2 * steps * count.div_ceil(self.batch), "drawing");
        let mut rows = Vec::new();
        for flux in [
            &self.flux,
            &refit::pruned(&self.flux, &found.plan.replace, &found.layers, self.runtime)?,
        ] {
            let denoise = Denoise {
                flux,
                dtype: self.runtime.dtype,
                device: &self.runtime.device,
                schedule: &schedule,
                steps,
                guidance: c.guidance.context("guidance is resolved")?,
                size: self.size.latent(),
            };
            let channels = self.pipeline.config.out_channels / 4;
            let seed = c.seed.wrapping_add(1000);
            let latents =
                calibrate::sample(&denoise, &encoded, channels, self.batch, seed, &progress)?;
            rows.push(load::pictures(&vae, &latents, denoise.size, self.runtime)?);
        }
        ui::done(&progress, "drew before and after");
        let grid = crate::sample::grid::grid(&rows)?;
        let about = format!(
            "above: {}; below: {}% of its blocks replaced",
            self.pipeline.name,
            (100.0 * self.recipe.ratio).round()
        );
        let text = [
            ("Title", about.as_str()),
            ("prompts", &prompts.join("\n")),
            ("Software", &load::software()),
        ];
        grid.save(&folder.join("before-after.png"), &text)?;
        Ok(true)
    }
}

/// Writes checkpoint, configuration, plan and scores.
fn write(
    folder: &Path,
    mut checkpoint: crate::checkpoint::Checkpoint,
    config: &FluxConfig,
    record: &Record,
    found: &Found,
) -> Result<()> {
    checkpoint.metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (record::KEY.to_owned(), record.to_text()?),
    ]);
    save::write(
        &checkpoint,
        &folder.join(format!("{PRUNED_STEM}.safetensors")),
    )?;
    let pretty =
        |value: &serde_json::Value| anyhow::Ok(serde_json::to_string_pretty(value)? + "\n");
    let slots = |kind| {
        config
            .slots()
            .iter()
            .filter(|(s, p)| p.is_some() && s.kind() == kind)
            .count()
    };
    let json = json!({
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": slots(crate::layout::BlockKind::Double),
        "num_single_layers": slots(crate::layout::BlockKind::Single),
        "attention_head_dim": config.head_dim(),
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dims,
        "fastflux": record,
    });
    save::write_bytes(&folder.join("config.json"), pretty(&json)?.as_bytes())?;
    save::write_bytes(
        &folder.join("plan.json"),
        pretty(&serde_json::to_value(&found.plan)?)?.as_bytes(),
    )?;
    let scores: Vec<_> = found
        .stats
        .blocks
        .iter()
        .map(|block| scores(found, block))
        .collect();
    save::write_bytes(
        &folder.join("scores.json"),
        pretty(&json!({ "blocks": scores }))?.as_bytes(),
    )
}

/// All that is known of one block.
fn scores(found: &Found, block: &BlockStats) -> serde_json::Value {
    let both = |f: fn(&crate::calibrate::stats::Moments) -> f64| {
        f(&block.txt.moments) + f(&block.img.moments)
    };
    // what the plain layer of either stream leaves of ‖y − x‖²
    let residual = found
        .fits
        .get(&block.id)
        .and_then(Layers::fits)
        .map(|[txt, img]| {
            txt.error * block.txt.moments.change_sq + img.error * block.img.moments.change_sq
        });
    let change = both(|m| m.change_sq);
    json!({
        "block": block.id,
        "ablation": found.greedy.alone.get(&block.id),
        "relative_change": (change / both(|m| m.input_sq)).sqrt(),
        "cosine": 1.0 - both(|m| m.cosine) / both(|m| m.tokens),
        "fit_residual": residual.map(|r| r / both(|m| m.tokens)),
        "fit_error": residual.map(|r| r / change),
        "replaced": found.plan.blocks().any(|id| id == block.id),
    })
}

/// The numbers of the run, as `--json` prints them.
fn report(
    run: &Run,
    found: &Found,
    pruned: &FluxConfig,
    folder: &Path,
    args: &PruneArgs,
    drawn: bool,
) -> Result<serde_json::Value> {
    let image = run.size.tokens();
    let text = run.pipeline.default_text_length();
    let side = |config: &FluxConfig, parameters: usize, bytes: usize| json!({ "parameters": parameters, "bytes": bytes, "flops_per_step": cost::model(config, image, text).flops() });
    let written =
        crate::checkpoint::Checkpoint::open(&crate::files::Files::folder(folder), PRUNED_STEM)?;
    let blocks: Vec<_> = found
        .stats
        .blocks
        .iter()
        .map(|block| scores(found, block))
        .collect();
    ensure!(
        found.velocity_error.is_finite(),
        "the pruned model's velocity is NaN or infinite"
    );
    Ok(json!({
        "output": args.output,
        "model": run.pipeline.name,
        "ratio": run.recipe.ratio,
        "replaced": found.plan.blocks().collect::<Vec<_>>(),
        "velocity_error": found.velocity_error,
        "before": side(&run.pipeline.config, run.pipeline.transformer.parameters(), run.pipeline.transformer.bytes()),
        "after": side(pruned, written.parameters(), written.bytes()),
        "blocks": blocks,
        "picture": drawn.then_some("before-after.png"),
        "recipe": run.recipe,
    }))
}

fn text(run: &Run, found: &Found, report: &serde_json::Value) -> String {
    let number = |value: &serde_json::Value| {
        value
            .as_f64()
            .map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"))
    };
    let rows: Vec<Vec<String>> = found
        .stats
        .blocks
        .iter()
        .map(|block| {
            let scores = scores(found, block);
            let replaced = scores["replaced"] == true;
            vec![
                block.id.to_string(),
                number(&scores["ablation"]),
                number(&scores["relative_change"]),
                if replaced { "replaced" } else { "kept" }.to_owned(),
                if replaced {
                    number(&scores["fit_error"])
                } else {
                    String::new()
                },
            ]
        })
        .collect();
    let mut out = ui::table(
        &["block", "importance", "‖y−x‖/‖x‖", "", "fit error"],
        &rows,
        &[1, 2, 4],
    );
    let get = |side: &str, what: &str| report[side][what].as_f64().unwrap_or_default();
    let row = |what: &str, key: &str, unit: fn(f64) -> String| {
        let (before, after) = (get("before", key), get("after", key));
        vec![
            what.to_owned(),
            unit(before),
            unit(after),
            format!("{:+.1} %", 100.0 * (after / before - 1.0)),
        ]
    };
    let totals = [
        row("parameters", "parameters", ui::count),
        row("bytes", "bytes", ui::bytes),
        row("per step", "flops_per_step", ui::flops),
    ];
    out.push_str("\n\n");
    out.push_str(&ui::table(
        &["", "before", "after", ""],
        &totals,
        &[1, 2, 3],
    ));
    out.push_str(&format!(
        "\n\n{} of {} blocks replaced; the velocity of the pruned model is off by {:.4} (relative MSE, held-out states)",
        found.plan.blocks().count(),
        run.pipeline.config.original_ids().count(),
        found.velocity_error
    ));
    out
}
