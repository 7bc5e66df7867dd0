//! `calibrate`: one pass over the model's own states, its sums into a statistics file; and what it will take.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::{
    demand::Demand,
    gather::{self, Gathering},
    session::{Session, Settings},
};
use crate::{
    calibrate::{file::Calibration, pass::Shard, recipe::StateSource},
    checkpoint::{advise, target},
    cli::{CalibrateArgs, CalibrationArgs},
    pipeline::{Pipeline, placement::MemoryBudget, prompts},
    prune::recipe::PruneRecipe,
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
    let mut recipe = match &args.recipe.recipe {
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
    c.samples = args.prompts.num_prompts.or(c.samples);
    c.steps = args.steps.or(c.steps);
    c.width = args.size.width.or(c.width);
    c.height = args.size.height.or(c.height);
    c.seed = args.seed.seed.unwrap_or(c.seed);
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
    let (prompts, images) = match (&args.images, &args.prompts.prompts) {
        (Some(folder), _) => {
            let (prompts, images) = captioned(folder)?;
            (prompts, Some(images))
        }
        (None, Some(path)) => (prompts::read("--prompts", path)?, None),
        (None, None) => (prompts::bundled(pipeline), None),
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
        sums,
        more: true,
    }
}

pub(super) fn run(args: &CalibrateArgs) -> Result<()> {
    let recipe = recipe(&args.calibration)?;
    if !args.dry_run.dry_run {
        target::check_file(&args.output.path, args.output.force)?;
    }
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let Input { settings, images } = input(&args.calibration, &recipe, &pipeline)?;
    let shard = args.shard.unwrap_or(Shard::WHOLE);
    if args.dry_run.dry_run {
        let demand = Demand {
            shard,
            sums: args.calibration.stats_memory,
            fitting: false,
        };
        return demand.say(&pipeline, &place, &settings, args.output.print.json);
    }
    target::check_writable(&args.output.path)?;
    let sums = args.calibration.stats_memory;
    let session = Session::open(
        &pipeline,
        &runtime,
        &place,
        settings,
        images.as_deref(),
        sums,
    )?;
    let gathering = Gathering {
        shard,
        more: false, // the output is written at once
        ..gathering(&args.calibration, &args.output.path, true)
    };
    let calibration = gather::gather(&session, &gathering)?;
    write(&calibration, &args.output.path)?;
    remove_partial(&gathering.partial)?;
    report(&calibration, &args.output.path, args.output.print.json)
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
            "output": output.display().to_string(),
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
            let seen = |value: f64| {
                if m.tokens > 0.0 {
                    format!("{value:.4}")
                } else {
                    "-".to_owned()
                }
            };
            vec![
                block.id.to_string(),
                ui::count(block.txt.rows),
                ui::count(block.img.rows),
                seen((m.change_sq / m.input_sq).sqrt()),
                seen(1.0 - m.cosine / m.tokens),
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
    let blocks = &calibration.stats.blocks;
    if blocks.iter().all(|block| block.moments().tokens == 0.0) {
        out.push_str("\n\npictures to compare by, and no statistics: its units are all held out");
    }
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

/// `merge-stats`.
pub(super) fn merge(args: &crate::cli::MergeStatsArgs) -> Result<()> {
    target::check_file(&args.output.path, args.output.force)?;
    target::check_writable(&args.output.path)?;
    let inputs: Vec<_> = args.files.iter().map(|path| Some(path.as_path())).collect();
    target::check_other(&args.output.path, &inputs)?;
    let mut files = args.files.iter();
    let first = files
        .next()
        .context("merge-stats takes at least one file")?;
    // sums stay in the files and are added up a part at a time while the result is written
    let mut sum = advise(Calibration::open(first), gather::AGAIN)?;
    for path in files {
        sum.add(advise(Calibration::open(path), gather::AGAIN)?)
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
            "{} of {} units are there; missing: {}\nhint: name the statistics files of all shards",
            header.done.len(),
            header.units,
            missing.join(", ")
        );
    }
    write(&sum, &args.output.path)?;
    report(&sum, &args.output.path, args.output.print.json)
}
