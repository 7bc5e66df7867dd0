//! Greedy choice by ablation: the error of the model's final velocity when one block after another is replaced.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use crate::{
    calibrate::held_out::HeldOut,
    layout::BlockId,
    model::{Block, Flux, Trunk},
};

/// One step of the greedy choice.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The block that was given up.
    pub block: BlockId,
    /// Velocity error with it and all earlier choices replaced.
    pub error: f64,
}

/// What the greedy choice found.
#[derive(Clone, Debug)]
pub struct Greedy {
    /// The chosen blocks, in the order of choice.
    pub choices: Vec<Choice>,
    /// Velocity error of each block replaced alone: its importance.
    pub alone: BTreeMap<BlockId, f64>,
}

/// Candidates measured at once: they share the computation of their prefixes.
const AT_ONCE: usize = 4;

/// Gives the candidates of one round, fitted for the trunk as it stands.
pub trait Candidates {
    /// The trunk entries that may still be given up, with all earlier choices replaced.
    ///
    /// # Errors
    /// When a forward or a fit fails.
    fn begin(&mut self, trunk: &Trunk, chosen: &[BlockId]) -> Result<Vec<usize>>;
    /// The replacement of one of them. Asked for no sooner than it is tried: a round tries few.
    ///
    /// # Errors
    /// When the fit fails.
    fn fit(&mut self, trunk: &Trunk, index: usize) -> Result<Block>;
}

/// When to stop giving up blocks, and what giving one up is worth.
pub trait Goal {
    /// Whether these blocks are enough.
    fn is_reached(&self, chosen: &[BlockId]) -> bool;
    /// What a block brings towards the goal; the same for all if only their number counts.
    fn worth(&self, block: BlockId) -> f64;
}

/// Chooses blocks one after another until `goal` is reached: each the one whose replacement costs least error, given the
/// earlier ones, for what it is worth.
///
/// Lazily: with more blocks replaced a candidate hardly ever costs less than before, so its last known error is taken
/// as a lower bound, and only the most promising candidates are measured again until the best is sure.
///
/// # Errors
/// When a forward fails or every candidate gives a velocity that is not finite.
pub fn greedy(
    flux: &Flux,
    candidates: &mut dyn Candidates,
    held_out: &HeldOut,
    goal: &dyn Goal,
    progress: &ProgressBar,
) -> Result<Greedy> {
    let mut trunk = flux.trunk.clone();
    let id = |index: usize| flux.trunk.entries().get(index).map(|(spec, _)| spec.id());
    let mut chosen: Vec<BlockId> = Vec::new();
    let mut left = BTreeMap::new();
    for index in candidates.begin(&trunk, &chosen)? {
        left.insert(index, candidates.fit(&trunk, index)?);
    }
    let mut bounds = held_out.ablate(flux, &trunk, &left, "greedy", progress)?;
    let alone = bounds
        .iter()
        .filter_map(|(index, error)| Some((id(*index)?, *error)));
    let mut out = Greedy {
        choices: Vec::new(),
        alone: alone.collect(),
    };
    let mut current = 0.0;
    while !goal.is_reached(&chosen) {
        let first = out.choices.is_empty();
        let mut order: Vec<usize> = if first {
            left.keys().copied().collect()
        } else {
            left.clear();
            candidates.begin(&trunk, &chosen)?
        };
        // added error for what the block is worth
        let price = |index: usize, error: f64| {
            let worth = id(index).map_or(1.0, |id| goal.worth(id));
            (error - current) / worth
        };
        order.sort_by(|a, b| price(*a, bounds[a]).total_cmp(&price(*b, bounds[b])));
        let mut best: Option<(usize, f64)> = None;
        for chunk in order.chunks(AT_ONCE) {
            let least = price(chunk[0], bounds[&chunk[0]]);
            if best.is_some_and(|(index, error)| price(index, error) <= least) {
                break;
            }
            let fresh = if first {
                chunk.iter().map(|index| (*index, bounds[index])).collect()
            } else {
                let mut some = BTreeMap::new();
                for &index in chunk {
                    some.insert(index, candidates.fit(&trunk, index)?);
                }
                let fresh = held_out.ablate(flux, &trunk, &some, "greedy", progress)?;
                left.append(&mut some);
                fresh
            };
            for (index, error) in fresh {
                bounds.insert(index, error);
                let cheaper = |(i, e)| price(index, error) < price(i, e);
                if error.is_finite() && best.is_none_or(cheaper) {
                    best = Some((index, error));
                }
            }
        }
        let (index, error) = best.context("every candidate makes the velocity NaN or infinite")?;
        let (Some(block), Some(fit)) = (id(index), left.remove(&index)) else {
            break;
        };
        trunk = trunk.with_block(index, fit)?;
        current = error;
        chosen.push(block);
        out.choices.push(Choice { block, error });
    }
    Ok(out)
}
