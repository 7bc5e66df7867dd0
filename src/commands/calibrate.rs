//! `calibrate`: one pass over the model's own states, its sums into a statistics file; and what it will take.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use candle::Device;
use serde_json::json;

use super::{
    gather::{self, Gathering},
    session::{Session, Settings},
};
use crate::{
    calibrate::{file::Calibration, pass::Shard, recipe::StateSource},
    checkpoint::save,
    cli::{CalibrateArgs, CalibrationArgs},
    device::Runtime,
    model::cost,
    pipeline::Pipeline,
    prune::{plan::originals, recipe::PruneRecipe},
    sample::image,
    ui,
};

/// What a command calibrates on.
pub(super) struct Input {
    pub(super) settings: Settings,
    /// Picture files, one for each prompt, where pictures are given.
    pub(super) images: Option<Vec<PathBuf>>,
}

/// The recipe with the flags laid over it.
pub(super) fn recipe(args: &CalibrationArgs) -> Result<PruneRecipe> {
    let mut recipe = match &args.recipe {
        Some(path) => PruneRecipe::read(path)?,
        None => PruneRecipe::default(),
    };
    let c = &mut recipe.calibration;
    if args.images.is_some() {
        c.source = StateSource::Images;
    }
    c.source = args.source.unwrap_or(c.source);
    ensure!(
        (c.source == StateSource::Images) == args.images.is_some(),
        "calibrating on images takes --images DIR"
    );
    c.samples = args.samples.or(c.samples);
    c.steps = args.steps.or(c.steps);
    c.width = args.width.or(c.width);
    c.height = args.height.or(c.height);
    c.seed = args.seed.unwrap_or(c.seed);
    c.tokens_per_forward = args.tokens_per_forward.or(c.tokens_per_forward);
    recipe.validate()?;
    Ok(recipe)
}

/// Prompts or captioned pictures, and all numbers.
pub(super) fn input(
    args: &CalibrationArgs,
    recipe: &PruneRecipe,
    pipeline: &Pipeline,
) -> Result<Input> {
    let (prompts, images) = match (&args.images, &args.prompts) {
        (Some(folder), _) => {
            let (prompts, images) = captioned(folder)?;
            (prompts, Some(images))
        }
        (None, Some(path)) => (super::read_prompts("--prompts", path)?, None),
        (None, None) => (super::bundled_prompts(pipeline), None),
    };
    let given = images.as_ref().map(Vec::len);
    let held_out = recipe.score.held_out;
    let c = recipe.calibration.clone();
    let settings = Settings::resolve(pipeline, c, held_out, prompts, given)?;
    let count = settings.prompts.len();
    Ok(Input {
        images: images.map(|mut images| {
            images.truncate(count);
            images
        }),
        settings,
    })
}

/// The settings of a command that calibrates on the way, or takes `stats`; the recipe then says what was used.
pub(super) fn settings(
    args: &CalibrationArgs,
    stats: Option<&Path>,
    recipe: &mut PruneRecipe,
    pipeline: &Pipeline,
) -> Result<(Settings, Option<Vec<PathBuf>>)> {
    let header = stats.map(|path| gather::read_header(pipeline, path));
    let (settings, images) = match header.transpose()? {
        Some(header) => {
            let settings = Settings::of(pipeline, &header, recipe.score.held_out)?;
            (settings, None)
        }
        None => {
            let input = input(args, recipe, pipeline)?;
            (input.settings, input.images)
        }
    };
    recipe.calibration = settings.recipe.clone();
    recipe.score.held_out = Some(settings.held_out);
    let narrow = pipeline.config.hidden_size <= 1024;
    recipe.score.refit.get_or_insert(narrow);
    Ok((settings, images))
}

/// The pictures of a folder in the order of their names, with the captions beside them.
fn captioned(folder: &Path) -> Result<(Vec<String>, Vec<PathBuf>)> {
    let name = folder.display();
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("--images: cannot read `{name}`"))?;
    let mut images = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("--images: cannot read `{name}`"))?
            .path();
        let ending = path.extension().and_then(|e| e.to_str());
        let ending = ending.map(str::to_ascii_lowercase).unwrap_or_default();
        if image::EXTENSIONS.contains(&ending.as_str()) {
            images.push(path);
        }
    }
    ensure!(
        !images.is_empty(),
        "--images: `{name}` holds no picture ({})",
        image::EXTENSIONS.join(", ")
    );
    images.sort();
    let caption = |path: &PathBuf| -> Result<String> {
        let text = path.with_extension("txt");
        let caption = std::fs::read_to_string(&text).with_context(|| {
            format!(
                "--images: `{}` has no caption: cannot read `{}`",
                path.display(),
                text.display()
            )
        })?;
        Ok(caption.trim().to_owned())
    };
    let captions = images.iter().map(caption).collect::<Result<_>>()?;
    Ok((captions, images))
}

/// How a command gathers that calibrates for `output` on the way.
pub(super) fn gathering(args: &CalibrationArgs, output: &Path, sums: bool) -> Gathering {
    Gathering {
        shard: Shard::WHOLE,
        partial: gather::partial(output),
        save_every: Duration::from_secs(args.save_every),
        memory: args.stats_memory,
        sums,
    }
}

pub(super) fn run(args: &CalibrateArgs) -> Result<()> {
    let recipe = recipe(&args.calibration)?;
    if !args.dry_run {
        save::check_free(&args.output, args.force)?;
    }
    let runtime = Runtime::resolve(args.run.device, args.run.dtype)?;
    let pipeline = super::open(&args.pipeline.choice())?;
    let Input { settings, images } = input(&args.calibration, &recipe, &pipeline)?;
    let shard = args.shard.unwrap_or(Shard::WHOLE);
    if args.dry_run {
        return forecast(args, &pipeline, &runtime, &settings, shard);
    }
    save::check_writable(&args.output)?;
    let session = Session::open(&pipeline, &runtime, settings, images.as_deref())?;
    let gathering = Gathering {
        shard,
        ..gathering(&args.calibration, &args.output, true)
    };
    let calibration = gather::gather(&session, &gathering)?;
    write(&calibration, &args.output)?;
    remove_partial(&gathering.partial)?;
    report(&calibration, &args.output, args.json)
}

fn write(calibration: &Calibration, output: &Path) -> Result<()> {
    if let Some(folder) = output.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
    }
    calibration.write(output, false)
}

/// Unfinished work that is finished now.
pub(super) fn remove_partial(partial: &Path) -> Result<()> {
    match std::fs::remove_file(partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove `{}`", partial.display()))
        }
        _ => Ok(()),
    }
}

/// What is in a statistics file, as JSON or as a table.
pub(super) fn report(calibration: &Calibration, output: &Path, json: bool) -> Result<()> {
    let header = &calibration.header;
    if json {
        return ui::json(&json!({
            "output": output,
            "model": header.model_name,
            "complete": header.is_complete(),
            "units": header.units,
            "done": header.done.len(),
            "recipe": header.recipe,
            "blocks": calibration.stats.blocks.iter().map(|block| json!({
                "block": block.id,
                "tokens": { "txt": block.txt.moments().tokens, "img": block.img.moments().tokens },
                "rows": { "txt": block.txt.rows, "img": block.img.rows },
            })).collect::<Vec<_>>(),
        }));
    }
    let rows: Vec<Vec<String>> = calibration
        .stats
        .blocks
        .iter()
        .map(|block| {
            let m = block.moments();
            vec![
                block.id.to_string(),
                ui::count(block.txt.rows),
                ui::count(block.img.rows),
                format!("{:.4}", (m.change_sq / m.input_sq).sqrt()),
                format!("{:.4}", 1.0 - m.cosine / m.tokens),
            ]
        })
        .collect();
    let header_row = [
        "block",
        "text tokens",
        "image tokens",
        "‖y−x‖/‖x‖",
        "1 − cos",
    ];
    let mut out = ui::table(&header_row, &rows, &[1, 2, 3, 4]);
    if !header.is_complete() {
        out.push_str(&format!(
            "\n\n{} of {} units; add the other shards with `fastflux merge-stats`",
            header.done.len(),
            header.units
        ));
    }
    ui::data(out)?;
    ui::note(format!("wrote `{}`", output.display()));
    Ok(())
}

/// `--dry-run`: forwards, arithmetic and memory, before anything is loaded.
fn forecast(
    args: &CalibrateArgs,
    pipeline: &Pipeline,
    runtime: &Runtime,
    settings: &Settings,
    shard: Shard,
) -> Result<()> {
    let config = &pipeline.config;
    let steps = settings.recipe.steps.context("steps are resolved")?;
    let draws = settings.recipe.draws.context("draws are resolved")?;
    let (samples, prompts, batch) = (settings.samples, settings.prompts.len(), settings.batch);
    let sampled = settings.recipe.source != StateSource::Images;
    let sampling = if sampled { prompts * steps } else { 0 };
    let gathered = match settings.recipe.source {
        StateSource::Trajectory => 0,
        _ => (samples as f64 * draws).ceil() as usize,
    };
    let of_shard = |states: usize| states.div_ceil(shard.of);
    let tokens = settings.size.tokens() + settings.text_tokens;
    let per_state = cost::model(config, settings.size.tokens(), settings.text_tokens);
    let flops = |states: usize| of_shard(states) as f64 * per_state.flops() as f64;
    let memory = args
        .calibration
        .stats_memory
        .or_else(|| Some(runtime.free_memory()? / 2));
    let kept = gather::blocks_within(config, memory);
    let d = config.hidden_size as u64;
    let states_in_sums = match settings.recipe.source {
        StateSource::Trajectory => samples * steps,
        _ => gathered,
    };
    let rows = match settings.recipe.tokens_per_forward {
        None => states_in_sums * tokens,
        Some(limit) => states_in_sums.div_ceil(batch) * (2 * limit).min(batch * tokens),
    };
    // 2 · rows · (k² / 2 + k d) multiply-adds
    let products = (kept * of_shard(rows)) as f64 * 2.0 * (d as f64) * (1.5 * d as f64);
    let weights = pipeline.transformer.parameters() as u64 * runtime.dtype.size_in_bytes() as u64;
    let sums = kept as u64 * gather::bytes_of_sums(config);
    let element = runtime.dtype.size_in_bytes() as u64;
    // the widest moment of a block: its input, projections of q, k, v and the MLP, and their activations
    let widest = 2 * config.mlp_size as u64 + 8 * d;
    let activations = batch as u64 * tokens as u64 * widest * element;
    // one stream of one block in f32 (f64 on the CPU), its change, and the fresh products beside the sums
    let wide = if runtime.device.is_cpu() { 8 } else { 4 };
    let gathering = (batch * tokens) as u64 * 2 * d * wide + gather::bytes_of_sums(config);
    let pictures = (prompts * settings.size.tokens() * config.in_channels * 4) as u64;
    let all = originals(config).len();
    let out = json!({
        "model": pipeline.name,
        "runtime": runtime.to_string(),
        "prompts": prompts,
        "steps": steps,
        "image_tokens": settings.size.tokens(),
        "text_tokens": settings.text_tokens,
        "states_in_a_forward": batch,
        "forwards": { "sampling": of_shard(sampling).div_ceil(batch), "statistics": of_shard(gathered).div_ceil(batch) },
        "flops": { "sampling": flops(sampling), "statistics": flops(gathered), "products": products },
        "blocks": all,
        "blocks_with_sums": kept,
        "bytes": {
            "weights": weights, "statistics": sums, "activations": activations + gathering,
            "pictures": pictures, "file": sums + pictures,
            "device": weights + sums + activations + gathering,
            "host": pictures + if runtime.device.is_cpu() { weights + sums + activations + gathering } else { sums },
        },
        "free": runtime.free_memory(),
        "shard": args.shard.map(|s| format!("{}/{}", s.index, s.of)),
    });
    if args.json {
        return ui::json(&out);
    }
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
    let bytes = |key: &str| ui::bytes(number(&out["bytes"][key]));
    let size = settings.size;
    let mut lines = vec![
        format!("model       {} on {runtime}", pipeline.name),
        format!(
            "sampling    {prompts} prompts × {steps} steps at {}×{}, {} forwards of {batch}: {}",
            size.width,
            size.height,
            out["forwards"]["sampling"],
            ui::flops(flops(sampling))
        ),
        format!(
            "statistics  {states_in_sums} states, {} forwards more: {} and {} for the sums",
            out["forwards"]["statistics"],
            ui::flops(flops(gathered)),
            ui::flops(products)
        ),
        format!(
            "sums        {kept} of {all} blocks, {} ({} each)",
            bytes("statistics"),
            ui::bytes(gather::bytes_of_sums(config) as f64)
        ),
        format!("weights     {}", bytes("weights")),
        format!("activations {}", bytes("activations")),
        format!("file        {}", bytes("file")),
    ];
    lines.push(if runtime.device.is_cpu() {
        format!("memory      {}", bytes("host"))
    } else {
        let (device, host) = (bytes("device"), bytes("host"));
        format!("memory      {device} on the device, {host} on the host")
    });
    if let Some(free) = runtime.free_memory() {
        lines.push(format!("free        {}", ui::bytes(free as f64)));
    }
    ui::data(lines.join("\n"))
}

/// `merge-stats`.
pub(super) fn merge(args: &crate::cli::MergeStatsArgs) -> Result<()> {
    save::check_free(&args.output, args.force)?;
    save::check_writable(&args.output)?;
    let mut files = args.files.iter();
    let first = files
        .next()
        .context("merge-stats takes at least one file")?;
    let mut sum = Calibration::read(first, &Device::Cpu)?;
    for path in files {
        sum.add(Calibration::read(path, &Device::Cpu)?)
            .with_context(|| {
                format!("`{}` does not add to `{}`", path.display(), first.display())
            })?;
    }
    let header = &sum.header;
    if !header.is_complete() {
        let missing: Vec<String> = (0..header.units)
            .filter(|unit| !header.done.contains(unit))
            .map(|unit| unit.to_string())
            .collect();
        bail!(
            "units are missing: {} of {} are there, not {}\nhint: name the statistics files of all shards",
            header.done.len(),
            header.units,
            missing.join(", ")
        );
    }
    write(&sum, &args.output)?;
    report(&sum, &args.output, args.json)
}
