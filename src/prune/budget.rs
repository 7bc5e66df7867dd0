//! How far to prune: a number of blocks, or a budget of parameters, memory or time. Blocks of the two kinds differ in
//! cost (in FLUX.1 a double block frees 2.4 times the memory of a single one at equal time), so a budget is a knapsack
//! over importance and cost, not a ranking.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::{
    estimate::{ModelCost, Workload},
    plan::PruningPlan,
};
use crate::layout::{BlockId, BlockKind, FluxConfig, Form};

/// What a plan must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// This many blocks replaced.
    Blocks(usize),
    /// At most this many parameters.
    Parameters(u64),
    /// At most this much device memory, in bytes.
    Memory(u64),
    /// At least this many times faster, by arithmetic.
    SpeedUp(f64),
}

/// A goal for one model: says of any set of blocks whether replacing them reaches it.
#[derive(Clone, Debug)]
pub struct Budget<'a> {
    /// The goal.
    pub goal: Goal,
    /// The model.
    pub config: &'a FluxConfig,
    /// Where it is to run.
    pub workload: Workload,
    /// What takes the place of a block.
    pub form: Form,
    /// One layer for both streams.
    pub joint: bool,
    /// Neighbours become one layer.
    pub collapse: bool,
}

impl crate::score::ablation::Goal for Budget<'_> {
    fn is_reached(&self, chosen: &[BlockId]) -> bool {
        self.reaches(chosen)
    }

    fn worth(&self, block: BlockId) -> f64 {
        let before = ModelCost::for_config(self.config, self.workload);
        let after = self.estimate(&[block]);
        match self.goal {
            Goal::Blocks(_) => 1.0,
            Goal::Parameters(_) => before.parameters as f64 - after.parameters as f64,
            Goal::Memory(_) => before.memory_bytes as f64 - after.memory_bytes as f64,
            Goal::SpeedUp(_) => before.flops as f64 - after.flops as f64,
        }
    }
}

impl Budget<'_> {
    /// The plan that replaces `blocks`.
    pub fn plan(&self, blocks: &[BlockId], source: String, reason: String) -> PruningPlan {
        let (form, joint, collapse) = (self.form, self.joint, self.collapse);
        PruningPlan::new(
            self.config,
            source,
            blocks.to_vec(),
            form,
            joint,
            collapse,
            reason,
        )
    }

    fn estimate(&self, blocks: &[BlockId]) -> ModelCost {
        let plan = self.plan(blocks, String::new(), String::new());
        ModelCost::of_plan(self.config, &plan, self.workload)
    }

    /// Whether replacing `blocks` reaches the goal.
    pub fn reaches(&self, blocks: &[BlockId]) -> bool {
        match self.goal {
            Goal::Blocks(count) => blocks.len() >= count,
            Goal::Parameters(most) => self.estimate(blocks).parameters <= most,
            Goal::Memory(most) => self.estimate(blocks).memory_bytes <= most,
            Goal::SpeedUp(least) => {
                let before = ModelCost::for_config(self.config, self.workload);
                self.estimate(blocks).speed_up(&before) >= least
            }
        }
    }

    /// Fails when even replacing all of `free` misses the goal, and says what is possible.
    ///
    /// # Errors
    /// As said.
    pub fn check(&self, free: &[BlockId]) -> Result<()> {
        // one block must stay: the model's sizes are read off it
        let all = self.config.kept_ids();
        let most: &[BlockId] = if free.len() < all.len() {
            free
        } else {
            free.split_first().map_or(&[], |(_, rest)| rest)
        };
        if self.reaches(most) && !most.is_empty() {
            return Ok(());
        }
        let best = self.estimate(most);
        let before = ModelCost::for_config(self.config, self.workload);
        let count = most.len();
        if free.is_empty() {
            bail!("no block may be replaced\nhint: name fewer blocks with --protect");
        }
        if most.is_empty() {
            bail!("no block may be replaced: the one that is left must stay");
        }
        match self.goal {
            Goal::Blocks(wanted) => bail!(
                "{wanted} {} to be replaced, but only {count} may be\nhint: lower --ratio or protect fewer blocks",
                if wanted == 1 {
                    "block is"
                } else {
                    "blocks are"
                }
            ),
            Goal::Parameters(wanted) => bail!(
                "--budget-params {wanted}: replacing all {count} blocks that may go leaves {} parameters, no fewer",
                best.parameters
            ),
            Goal::Memory(wanted) => bail!(
                "--budget-vram of {}: with all {count} blocks replaced that may go, drawing still takes {}\nhint: draw smaller images (--width, --height)",
                binary(wanted),
                binary(best.memory_bytes)
            ),
            Goal::SpeedUp(wanted) => bail!(
                "--target-speedup {wanted}: replacing all {count} blocks that may go makes a step {:.2} times faster, no more",
                best.speed_up(&before)
            ),
        }
    }

    /// The cheapest set of `importance`'s blocks that reaches the goal, taking importances as sums.
    ///
    /// Blocks of a kind cost the same, so for each number of double blocks the best are the least important ones, with
    /// the fewest single blocks that still do: a few hundred sets, tried in full.
    ///
    /// # Errors
    /// When the goal cannot be reached.
    pub fn knapsack(&self, importance: &BTreeMap<BlockId, f64>) -> Result<Vec<BlockId>> {
        let free: Vec<BlockId> = importance.keys().copied().collect();
        self.check(&free)?;
        let of_kind = |kind: BlockKind| {
            let mut blocks: Vec<BlockId> =
                free.iter().copied().filter(|b| b.kind == kind).collect();
            blocks.sort_by(|a, b| importance[a].total_cmp(&importance[b]));
            blocks
        };
        let (doubles, singles) = (of_kind(BlockKind::Double), of_kind(BlockKind::Single));
        let all = self.config.kept_ids().len();
        let mut best: Option<(f64, Vec<BlockId>)> = None;
        for double in 0..=doubles.len() {
            let set = |single: usize| [&doubles[..double], &singles[..single]].concat();
            let enough = |single: &usize| {
                let set = set(*single);
                !set.is_empty() && set.len() < all && self.reaches(&set)
            };
            let Some(single) = (0..=singles.len()).find(enough) else {
                continue;
            };
            let set = set(single);
            let total: f64 = set.iter().map(|b| importance[b]).sum();
            if best.as_ref().is_none_or(|(least, _)| total < *least) {
                best = Some((total, set));
            }
        }
        match best {
            Some((_, set)) => Ok(set),
            None => bail!("no choice of blocks reaches the budget and leaves one block"),
        }
    }
}

/// Bytes in the largest unit that they fill, with what tells a budget from a little more.
fn binary(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, size)| bytes >= *size) {
        Some((unit, size)) => format!("{:.3} {unit}", bytes as f64 / size as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::unpruned;

    fn dev() -> FluxConfig {
        FluxConfig {
            in_channels: 64,
            out_channels: 64,
            hidden_size: 3072,
            num_heads: 24,
            mlp_size: 12_288,
            context_in_dim: 4096,
            vec_in_dim: 768,
            guidance_embed: true,
            axes_dims: vec![16, 56, 56],
            theta: 1e4,
            family: crate::layout::Family::FLUX1,
            layout: unpruned(19, 38),
        }
    }

    fn budget(config: &FluxConfig, goal: Goal) -> Budget<'_> {
        Budget {
            goal,
            config,
            workload: Workload {
                image_tokens: 4096,
                text_tokens: 512,
                element: 2,
                weight_bytes: 2.0,
                file_bytes: 2.0,
            },
            form: Form::Linear,
            joint: false,
            collapse: true,
        }
    }

    /// Equal importance for all blocks but the named.
    fn importance(config: &FluxConfig, others: &[(BlockId, f64)]) -> BTreeMap<BlockId, f64> {
        let mut out: BTreeMap<_, _> = config.kept_ids().into_iter().map(|id| (id, 1.0)).collect();
        out.extend(others.iter().copied());
        out
    }

    #[test]
    fn memory_is_freed_by_double_blocks_and_time_by_either() {
        let config = dev();
        let parameters = budget(&config, Goal::Parameters(9_500_000_000));
        let set = parameters.knapsack(&importance(&config, &[])).unwrap();
        // (11.90 − 9.5) B / (339.8 − 18.9) M = 7.5, a little less as neighbours share a layer; of single blocks 20
        assert_eq!(set.len(), 8);
        let doubles = set.iter().filter(|id| id.kind == BlockKind::Double);
        assert!(doubles.count() >= 7, "{set:?}");
        let cheap: Vec<_> = (0..12).map(|i| (BlockId::single(i), 0.01)).collect();
        let speed = budget(&config, Goal::SpeedUp(1.2));
        let set = speed.knapsack(&importance(&config, &cheap)).unwrap();
        assert!(set.iter().all(|id| id.kind == BlockKind::Single), "{set:?}");
        assert!(speed.reaches(&set) && !speed.reaches(&set[1..]));
    }

    #[test]
    fn the_set_is_the_best_of_all_sets() {
        let config = FluxConfig {
            layout: unpruned(3, 4),
            ..dev()
        };
        let values = [0.5, 0.2, 0.9, 0.11, 0.3, 0.07, 0.4];
        let ids = config.kept_ids();
        let importance: BTreeMap<_, _> = ids.iter().copied().zip(values).collect();
        for share in [0.9, 0.7, 0.5, 0.3] {
            let whole = ModelCost::for_config(&config, budget(&config, Goal::Blocks(1)).workload);
            let most = (whole.parameters as f64 * share) as u64;
            let budget = budget(&config, Goal::Parameters(most));
            let total = |set: &[BlockId]| set.iter().map(|b| importance[b]).sum::<f64>();
            let best = (1u32..(1 << ids.len()) - 1)
                .map(|mask| {
                    let chosen = ids.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1);
                    chosen.map(|(_, id)| *id).collect::<Vec<_>>()
                })
                .filter(|set| budget.reaches(set))
                .map(|set| total(&set))
                .fold(f64::INFINITY, f64::min);
            let found = total(&budget.knapsack(&importance).unwrap());
            assert!((found - best).abs() < 1e-12, "{share}: {found} {best}");
        }
    }

    #[test]
    fn an_impossible_budget_says_what_is_possible() {
        let config = dev();
        let error = budget(&config, Goal::Parameters(100))
            .knapsack(&importance(&config, &[]))
            .unwrap_err();
        assert!(error.to_string().contains("leaves"), "{error}");
        let error = budget(&config, Goal::SpeedUp(1e3))
            .check(&config.kept_ids())
            .unwrap_err();
        assert!(error.to_string().contains("times faster"), "{error}");
        let of =
            |goal, free: &[BlockId]| budget(&config, goal).check(free).unwrap_err().to_string();
        let error = of(Goal::Memory(3 << 10), &config.kept_ids());
        assert!(error.contains("of 3.000 KiB:"), "{error}");
        let error = of(Goal::Blocks(1), &[]);
        assert!(
            error.contains("--protect") && !error.contains("--ratio"),
            "{error}"
        );
        let error = of(Goal::Blocks(3), &config.kept_ids()[..2]);
        assert!(
            error.contains("3 blocks are") && error.contains("only 2"),
            "{error}"
        );
    }
}
