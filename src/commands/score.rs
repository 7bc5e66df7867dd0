//! `score`: every block with all its scores, as a file, a table and a chart.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};

use super::{
    calibrate, gather,
    select::{self, plain_fit},
    session::Session,
};
use crate::{
    calibrate::stats::{BlockStats, CalibrationStats},
    checkpoint::{output, record, save, target},
    cli::ScoreArgs,
    layout::BlockId,
    model::{Block, ReplacementBlock},
    pipeline::placement::MemoryBudget,
    prune::layers::{LayerMap, Layers},
    score::{BlockScore, Metric, Scores, ablation::HeldOut, chart, moments},
    ui,
};

pub(super) fn run(args: &ScoreArgs) -> Result<()> {
    let mut recipe = calibrate::recipe(&args.calibration)?;
    let picture = args.output.path.with_extension("svg");
    ensure!(
        picture != args.output.path,
        "--output `{}` is the name of the chart that is put beside the scores\nhint: name a .json file",
        picture.display()
    );
    target::check_file(&args.output.path, args.output.force)?;
    target::check_file(&picture, args.output.force)?;
    let runtime = super::runtime(args.run)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let place = MemoryBudget::new(super::memory(args.memory), &runtime).of(&pipeline);
    let (settings, images) = calibrate::settings(
        &args.calibration,
        args.stats.stats.as_deref(),
        &mut recipe,
        &pipeline,
    )?;
    target::check_writable(&args.output.path)?;
    target::check_writable(&picture)?;
    target::check_other(&args.output.path, &[args.stats.stats.as_deref()])?;
    let sums = args.calibration.stats_memory;
    let session = Session::open(
        &pipeline,
        &runtime,
        &place,
        settings,
        images.as_deref(),
        sums,
    )?;
    let gathering = calibrate::gathering(&args.calibration, &args.output.path, true);
    let calibration = gather::obtain(&session, args.stats.stats.as_deref(), &gathering)?;

    let fits = fits(&calibration.stats, recipe.fit.ridge)?;
    let mut measured: BTreeMap<Metric, BTreeMap<BlockId, f64>> = BTreeMap::new();
    if !args.metric.is_cheap() {
        let states = session.states(&calibration)?.held_out;
        let (device, dtype) = (&runtime.device, runtime.dtype);
        let batch = session.settings.batch;
        let held_out = HeldOut::new(&session.flux, &states, batch, device, dtype)?;
        for metric in [Metric::Ablation, Metric::Removal] {
            measured.insert(metric, ablate(&session, &held_out, &fits, metric)?);
        }
    }
    let scores = Scores {
        model: pipeline.name.clone(),
        source: record::fingerprint(&pipeline.transformer)?,
        metric: args.metric,
        blocks: of_blocks(&calibration.stats, &fits, &measured),
    };
    scores.validate()?;
    write(&scores, &args.output.path, &picture)?;
    calibrate::remove_partial(&gathering.partial)?;
    if args.output.print.json {
        ui::json(&scores)?;
    } else {
        ui::data(table(&scores))?;
    }
    ui::note(format!(
        "wrote `{}` and `{}`",
        args.output.path.display(),
        picture.display()
    ));
    Ok(())
}

/// Writes the scores and their chart.
pub(super) fn write(scores: &Scores, path: &Path, picture: &Path) -> Result<()> {
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
    }
    output::write_json(path, &serde_json::to_value(scores)?)?;
    save::write_bytes(picture, chart::svg(scores)?.as_bytes())
}

/// The plain fit of every block whose sums were gathered.
fn fits(stats: &CalibrationStats, ridge: Option<f64>) -> Result<LayerMap> {
    let mut out = LayerMap::new();
    for block in stats.blocks.iter().filter(|b| b.img.has_sums()) {
        out.insert(block.id, plain_fit(block, ridge)?);
    }
    Ok(out)
}

/// The velocity error of each block replaced by its fit, or removed.
fn ablate(
    session: &Session,
    held_out: &HeldOut,
    fits: &LayerMap,
    metric: Metric,
) -> Result<BTreeMap<BlockId, f64>> {
    let trunk = &session.flux.trunk;
    let (device, dtype) = (&session.runtime.device, session.runtime.dtype);
    let mut candidates = BTreeMap::new();
    for (index, (spec, _)) in trunk.entries().iter().enumerate() {
        let block = match (metric, fits.get(&spec.id())) {
            (Metric::Removal, _) if select::is_original(spec) => {
                Some(Block::from(ReplacementBlock::Remove))
            }
            (Metric::Ablation, Some(layers)) => Some(layers.block(device, dtype)?),
            _ => None,
        };
        candidates.extend(block.map(|block| (index, block)));
    }
    let (what, done) = match metric {
        Metric::Removal => ("removing", "removed each block in turn"),
        _ => ("replacing", "replaced each block by its fit in turn"),
    };
    let progress = ui::progress(candidates.len() * held_out.batches(), what);
    let errors = held_out.ablate(&session.flux, trunk, &candidates, &progress)?;
    ui::done(&progress, done);
    let id = |index: usize| trunk.entries().get(index).map(|(spec, _)| spec.id());
    Ok(errors
        .into_iter()
        .filter_map(|(index, error)| Some((id(index)?, error)))
        .collect())
}

/// All scores of every block: those of its sums, and what was `measured` beside them.
pub(super) fn of_blocks(
    stats: &CalibrationStats,
    fits: &LayerMap,
    measured: &BTreeMap<Metric, BTreeMap<BlockId, f64>>,
) -> Vec<BlockScore> {
    let blocks = stats.blocks.iter();
    blocks
        .map(|block| of_block(block, fits.get(&block.id), measured))
        .collect()
}

fn of_block(
    block: &BlockStats,
    fit: Option<&Layers>,
    measured: &BTreeMap<Metric, BTreeMap<BlockId, f64>>,
) -> BlockScore {
    let whole = moments::part(&block.moments());
    let mut scores = BTreeMap::from([
        (Metric::RelativeChange, whole.relative_change),
        (Metric::Cosine, whole.cosine),
    ]);
    let (mut txt, mut img) = (
        moments::part(&block.txt.moments()),
        moments::part(&block.img.moments()),
    );
    if let Some([txt_fit, img_fit]) = fit.and_then(Layers::fits) {
        (txt.fit_error, img.fit_error) = (Some(txt_fit.error), Some(img_fit.error));
        // what the fits leave of all tokens, also of those that subsampling passed over
        let change = [block.txt.moments().change_sq, block.img.moments().change_sq];
        let residual = txt_fit.error * change[0] + img_fit.error * change[1];
        let total = (change[0] + change[1]).max(f64::MIN_POSITIVE);
        scores.insert(Metric::FitError, residual / total);
        scores.insert(
            Metric::FitResidual,
            residual / block.moments().tokens.max(1.0),
        );
    }
    for (metric, values) in measured {
        scores.extend(values.get(&block.id).map(|value| (*metric, *value)));
    }
    BlockScore {
        block: block.id,
        scores,
        txt,
        img,
        timesteps: moments::timesteps(block),
    }
}

fn table(scores: &Scores) -> String {
    let columns: Vec<Metric> = Metric::ALL
        .into_iter()
        .filter(|metric| scores.blocks.iter().any(|b| b.scores.contains_key(metric)))
        .collect();
    let mut header: Vec<String> = vec!["block".to_owned()];
    header.extend(columns.iter().map(Metric::to_string));
    header.push("rank".to_owned());
    let value = |block: &BlockScore| block.scores.get(&scores.metric).copied();
    let rows: Vec<Vec<String>> = scores
        .blocks
        .iter()
        .map(|block| {
            let cell = |metric: &Metric| {
                let value = block.scores.get(metric);
                value.map_or_else(|| "-".to_owned(), |v| format!("{v:.5}"))
            };
            // 1 is the least important of those that have a value
            let rank = value(block).map_or_else(
                || "-".to_owned(),
                |own| {
                    let others = scores.blocks.iter().filter_map(value);
                    (1 + others.filter(|v| v.total_cmp(&own).is_lt()).count()).to_string()
                },
            );
            let mut row = vec![block.block.to_string()];
            row.extend(columns.iter().map(cell));
            row.push(rank);
            row
        })
        .collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    let table = ui::table(&header, &rows, &right);
    format!(
        "{table}\n\nrank 1 is the least important block by {}",
        scores.metric
    )
}
