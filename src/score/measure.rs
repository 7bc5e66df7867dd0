//! Measures every score of every block of a calibrated model.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::json;

use super::{BlockScore, Metric, Scores, moments};
use crate::{
    calibrate::{
        Calibrator,
        file::Calibration,
        held_out::HeldOut,
        run::RunOptions,
        stats::{BlockStats, CalibrationStats, StreamStats},
    },
    fit::{
        layers::{Fitted, LayerMap, Layers},
        ridge,
    },
    layout::{BlockId, BlockSpec},
    model::{Block, ReplacementBlock},
};

/// Ridge of the fits that blocks are compared by.
const SCORING_RIDGE: f64 = 1e-4;

/// All scores of every block, ranked by `metric`. Those that follow from the sums are always there; ablation and removal
/// cost forwards, and are measured if `metric` is one of them.
///
/// # Errors
/// When a fit is singular, a forward fails, or a score is NaN or infinite.
pub fn score(
    calibrator: &Calibrator,
    calibration: &Calibration,
    metric: Metric,
    ridge: Option<f64>,
    run: &RunOptions,
) -> Result<Scores> {
    let fits = fits(&calibration.stats, ridge)?;
    let mut measured: BTreeMap<Metric, BTreeMap<BlockId, f64>> = BTreeMap::new();
    if !metric.is_cheap() {
        let noised = calibrator.noised(calibration)?;
        let held_out = calibrator.compared_in(run, &noised, &json!({ "ridge": ridge }))?;
        for metric in [Metric::Ablation, Metric::Removal] {
            measured.insert(metric, ablate(calibrator, &held_out, &fits, metric)?);
        }
    }
    let scores = Scores {
        model: calibrator.pipeline.name.clone(),
        source: calibration.header.model.clone(),
        metric,
        blocks: of_blocks(&calibration.stats, &fits, &measured),
    };
    scores.validate()?;
    Ok(scores)
}

/// The plain layers of a block from its statistics alone; `relative_ridge` is relative to the mean diagonal.
///
/// # Errors
/// When no tokens were seen or the problem is singular.
pub fn plain_fit(block: &BlockStats, relative_ridge: Option<f64>) -> Result<Layers> {
    let fit = |stats: &StreamStats| -> Result<Box<Fitted>> {
        let sums = stats
            .sums()?
            .with_context(|| format!("block {}: no tokens were seen", block.id))?;
        let solution = ridge::solve(&sums, relative_ridge.unwrap_or(SCORING_RIDGE))
            .with_context(|| format!("block {}", block.id))?;
        let width = solution.coefficients.ncols();
        Ok(Box::new(Fitted {
            weight: ridge::weight(&solution.coefficients, 0..width)?,
            bias: ridge::bias(&solution.coefficients)?,
            vec: None,
            modulation: None,
            error: solution.residual_sq / sums.target_sq.max(f64::MIN_POSITIVE),
            ridge: solution.ridge,
        }))
    };
    Ok(Layers::Streams {
        txt: fit(&block.txt)?,
        img: fit(&block.img)?,
    })
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
    calibrator: &Calibrator,
    held_out: &HeldOut,
    fits: &LayerMap,
    metric: Metric,
) -> Result<BTreeMap<BlockId, f64>> {
    let trunk = &calibrator.flux.trunk;
    let (device, dtype) = (&calibrator.runtime.device, calibrator.runtime.dtype);
    let mut candidates = BTreeMap::new();
    for (index, (spec, _)) in trunk.entries().iter().enumerate() {
        let block = match (metric, fits.get(&spec.id())) {
            (Metric::Removal, _) if matches!(spec, BlockSpec::Original(_)) => {
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
    let progress = calibrator
        .pipeline
        .reporter
        .progress(candidates.len() * held_out.batches(), what);
    let kind = metric.to_string();
    let errors = held_out.ablate(&calibrator.flux, trunk, &candidates, &kind, &progress)?;
    calibrator.pipeline.reporter.done(&progress, done);
    let id = |index: usize| trunk.entries().get(index).map(|(spec, _)| spec.id());
    Ok(errors
        .into_iter()
        .filter_map(|(index, error)| Some((id(index)?, error)))
        .collect())
}

/// All scores of every block: those of its sums, and what was `measured` in addition.
pub fn of_blocks(
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
