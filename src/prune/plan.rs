//! Which blocks give way to what: a plan is data that a person can read, edit, commit and replay.

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::layout::{BlockId, BlockSpec, FluxConfig, Form, Replacement};

/// A plan as a person writes one.
const EXAMPLE: &str = r#"{"replace": [{"replaces": ["single.07"], "form": "linear"}]}"#;

/// Why a plan cannot be carried out on a model.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PlanError {
    /// A block that the model does not have, or that was replaced before.
    #[error("the plan names {0}, which the model does not have (or has replaced already)")]
    UnknownBlock(BlockId),
    /// A block named twice.
    #[error("the plan names {0} twice")]
    Twice(BlockId),
    /// A replacement of no block.
    #[error("the plan has a replacement of no block: name at least one in `replaces`")]
    Empty,
    /// One layer for blocks that do not follow each other.
    #[error("the plan replaces {0} and {1} by one layer, but they are not neighbours")]
    NotNeighbours(BlockId, BlockId),
    /// A modulated layer for several blocks or both streams.
    #[error(
        "the plan: a modulated layer at {0} keeps one block's modulation and one stream's, it cannot stand for more"
    )]
    Modulated(BlockId),
    /// Nothing would be left to tell the model's sizes from.
    #[error("the plan replaces every block; at least one must stay")]
    NothingLeft,
    /// A ratio that is no share.
    #[error("--ratio {0}: expected a share of the blocks above 0 and below 1, such as 0.2")]
    Ratio(f64),
    /// A ratio that rounds to no block at all.
    #[error(
        "--ratio {ratio} of {blocks} blocks rounds to none: the smallest share that replaces one is {smallest:.3}"
    )]
    NoBlock {
        /// What was asked for.
        ratio: f64,
        /// How many blocks the model has.
        blocks: usize,
        /// The smallest share that rounds to one block.
        smallest: f64,
    },
}

/// The blocks to replace and what stands in their place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PruningPlan {
    /// [`fingerprint`](crate::checkpoint::record::fingerprint) of the model it was made for; empty in a plan for any model.
    #[serde(default)]
    pub source: String,
    /// What to do, in network order.
    pub replace: Vec<Replacement>,
    /// How the blocks were chosen, for people.
    #[serde(default)]
    pub reason: String,
}

impl PruningPlan {
    /// A plan that replaces `blocks`; with `collapse`, neighbours in the model's layout become one layer.
    ///
    /// Modulated layers keep their own block's modulation and never collapse; removed blocks need no layer to share.
    pub fn new(
        config: &FluxConfig,
        source: String,
        mut blocks: Vec<BlockId>,
        form: Form,
        joint: bool,
        collapse: bool,
        reason: String,
    ) -> Self {
        blocks.sort();
        let entry = |id: BlockId| {
            config
                .layout
                .iter()
                .position(|s| *s == BlockSpec::Original(id))
        };
        let collapse = collapse && matches!(form, Form::Linear | Form::Conditioned);
        let mut replace: Vec<Replacement> = Vec::new();
        for id in blocks {
            let follows = |r: &Replacement| {
                let last = r.replaces.last().and_then(|last| entry(*last));
                last.is_some() && last.map(|i| i + 1) == entry(id)
            };
            match replace.last_mut() {
                Some(run) if collapse && follows(run) => run.replaces.push(id),
                _ => replace.push(Replacement {
                    replaces: vec![id],
                    form,
                    joint,
                }),
            }
        }
        Self {
            source,
            replace,
            reason,
        }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// When the file cannot be read, is not JSON, or has an unknown key or block name.
    pub fn read(path: &std::path::Path) -> anyhow::Result<Self> {
        let name = path.display();
        let text = std::fs::read(path).with_context(|| format!("--plan: cannot read `{name}`"))?;
        let is_list = text.trim_ascii_start().starts_with(b"[");
        anyhow::ensure!(
            !is_list,
            "--plan: `{name}` is a list, not a plan\nhint: a plan is an object, such as {EXAMPLE}"
        );
        let plan: Self = serde_json::from_slice(&text).with_context(|| {
            format!("--plan: `{name}` is not a plan\nhint: a plan is an object, such as {EXAMPLE}")
        })?;
        anyhow::ensure!(
            !plan.replace.is_empty(),
            "--plan: `{name}` replaces nothing\nhint: name blocks, such as {EXAMPLE}"
        );
        Ok(plan)
    }

    /// The blocks it replaces.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.replace.iter().flat_map(|r| r.replaces.iter().copied())
    }

    /// Checks the plan against a model.
    ///
    /// # Errors
    /// When it names a block twice, one the model does not have, blocks that are no neighbours for one layer, or leaves
    /// none.
    pub fn validate(&self, config: &FluxConfig) -> Result<(), PlanError> {
        let originals = config.kept_ids();
        let mut seen = std::collections::BTreeSet::new();
        for id in self.blocks() {
            if !seen.insert(id) {
                return Err(PlanError::Twice(id));
            }
            if !originals.contains(&id) {
                return Err(PlanError::UnknownBlock(id));
            }
        }
        let entry = |id: &BlockId| {
            let spec = BlockSpec::Original(*id);
            config.layout.iter().position(|s| *s == spec)
        };
        for replacement in &self.replace {
            let Some(first) = replacement.replaces.first() else {
                return Err(PlanError::Empty);
            };
            for pair in replacement.replaces.windows(2) {
                if entry(&pair[0]).map(|i| i + 1) != entry(&pair[1]) {
                    return Err(PlanError::NotNeighbours(pair[0], pair[1]));
                }
            }
            let several = replacement.replaces.len() > 1 || replacement.joint;
            if replacement.form == Form::Modulated && several {
                return Err(PlanError::Modulated(*first));
            }
        }
        if seen.len() == originals.len() {
            return Err(PlanError::NothingLeft);
        }
        Ok(())
    }

    /// The layout of the pruned model. The plan must be [valid](Self::validate).
    pub fn layout(&self, config: &FluxConfig) -> Vec<BlockSpec> {
        let mut layout = Vec::new();
        for spec in &config.layout {
            let BlockSpec::Original(id) = spec else {
                layout.push(spec.clone());
                continue;
            };
            match self.replace.iter().find(|r| r.replaces.contains(id)) {
                None => layout.push(spec.clone()),
                Some(r) if r.replaces.first() == Some(id) => {
                    layout.push(BlockSpec::Replaced(r.clone()));
                }
                Some(_) => {} // a later block of a run that collapsed into its first
            }
        }
        layout
    }
}

/// The blocks of a list such as `double.05,single.20-24`.
///
/// # Errors
/// When a name is no block, a range runs backwards, or the model has no such block left; the message names `flag`.
pub fn parse_blocks(flag: &str, text: &str, config: &FluxConfig) -> anyhow::Result<Vec<BlockId>> {
    let known = config.kept_ids();
    let mut out = Vec::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = match part.split_once('-') {
            None => (part, None),
            Some((first, last)) => (first, Some(last)),
        };
        let first: BlockId = first.parse().with_context(|| format!("{flag} `{text}`"))?;
        let last = match last {
            None => first.index,
            Some(last) => last
                .parse()
                .ok()
                .filter(|last| *last >= first.index)
                .with_context(|| {
                    format!("{flag} `{text}`: `{part}` is not a range such as single.20-24")
                })?,
        };
        for index in first.index..=last {
            let id = BlockId { index, ..first };
            anyhow::ensure!(
                known.contains(&id),
                "{flag} `{text}`: the model has no block {id} (or has replaced it already)"
            );
            if !out.contains(&id) {
                out.push(id);
            }
        }
    }
    anyhow::ensure!(!out.is_empty(), "{flag} `{text}` names no block");
    Ok(out)
}

/// How many blocks a share of all blocks of the unpruned model is, rounded (0.2 of 57 = 11).
///
/// # Errors
/// When `ratio` is not in (0, 1), rounds to none, or to all.
pub fn blocks_of_ratio(ratio: f64, config: &FluxConfig) -> Result<usize, PlanError> {
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(PlanError::Ratio(ratio));
    }
    let blocks = config.original_ids().count();
    let count = (ratio * blocks as f64).round() as usize;
    if count == 0 {
        return Err(PlanError::NoBlock {
            ratio,
            blocks,
            smallest: 0.5 / blocks as f64,
        });
    }
    if count >= config.kept_ids().len() {
        return Err(PlanError::NothingLeft);
    }
    Ok(count)
}

#[cfg(test)]
mod arbitrary_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::unpruned;

    pub(super) fn config(double: usize, single: usize) -> FluxConfig {
        FluxConfig {
            in_channels: 64,
            out_channels: 64,
            hidden_size: 8,
            num_heads: 1,
            mlp_size: 32,
            context_in_dim: 4,
            vec_in_dim: 4,
            guidance_embed: false,
            axes_dims: vec![2, 2, 4],
            theta: 1e4,
            family: crate::layout::Family::FLUX1,
            layout: unpruned(double, single),
        }
    }

    fn plan(blocks: &[BlockId]) -> PruningPlan {
        let model = config(2, 4);
        PruningPlan::new(
            &model,
            "x".into(),
            blocks.to_vec(),
            Form::Linear,
            false,
            true,
            String::new(),
        )
    }

    #[test]
    fn a_ratio_is_a_rounded_share_of_all_blocks() {
        assert_eq!(blocks_of_ratio(0.2, &config(19, 38)), Ok(11));
        assert_eq!(blocks_of_ratio(0.2, &config(5, 10)), Ok(3));
        for bad in [0.0, 1.0, -0.1, 1.5, f64::NAN, f64::INFINITY] {
            assert!(
                matches!(
                    blocks_of_ratio(bad, &config(5, 10)),
                    Err(PlanError::Ratio(_))
                ),
                "{bad}"
            );
        }
        assert!(matches!(
            blocks_of_ratio(0.01, &config(5, 10)),
            Err(PlanError::NoBlock { .. })
        ));
        assert_eq!(
            blocks_of_ratio(0.99, &config(5, 10)),
            Err(PlanError::NothingLeft)
        );
    }

    #[test]
    fn plans_are_checked_against_the_model() {
        let model = config(2, 2);
        assert_eq!(plan(&[BlockId::double(1)]).validate(&model), Ok(()));
        assert_eq!(
            plan(&[BlockId::single(2)]).validate(&model),
            Err(PlanError::UnknownBlock(BlockId::single(2)))
        );
        let twice = plan(&[BlockId::single(1), BlockId::single(1)]);
        assert_eq!(
            twice.validate(&model),
            Err(PlanError::Twice(BlockId::single(1)))
        );
        let all = model.kept_ids();
        assert_eq!(plan(&all).validate(&model), Err(PlanError::NothingLeft));
    }

    #[test]
    fn a_plan_is_json_that_a_person_can_edit() {
        let plan = plan(&[BlockId::single(3), BlockId::double(1)]);
        let json = serde_json::to_string(&plan).unwrap();
        assert!(
            json.contains(r#"{"replaces":["double.01"],"form":"linear"}"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<PruningPlan>(&json).unwrap(), plan);
        let misspelt = json.replace("reason", "raison");
        let by_hand = r#"{"replace": [{"replaces": ["double.01"], "form": "linear"}]}"#;
        let by_hand: PruningPlan = serde_json::from_str(by_hand).unwrap();
        assert_eq!(by_hand.validate(&config(2, 4)), Ok(()));
        assert!(by_hand.source.is_empty());
        let nothing = serde_json::from_str::<PruningPlan>("{}").unwrap_err();
        assert!(nothing.to_string().contains("replace"), "{nothing}");
        assert!(serde_json::from_str::<PruningPlan>(&misspelt).is_err());
    }

    #[test]
    fn neighbours_collapse_into_one_layer_even_where_the_kinds_meet() {
        let plan = plan(&[BlockId::single(0), BlockId::double(1), BlockId::single(2)]);
        let runs: Vec<_> = plan.replace.iter().map(|r| r.replaces.clone()).collect();
        assert_eq!(
            runs,
            [
                vec![BlockId::double(1), BlockId::single(0)],
                vec![BlockId::single(2)]
            ]
        );
        assert_eq!(plan.layout(&config(2, 4)).len(), 5);
    }
}
