//! Which blocks are trained together: replaced ones between their nearest unpruned neighbours (FastFLUX, arXiv
//! 2506.10035). Blocks and weights are not touched here.

use std::{fmt, ops::Range};

use anyhow::{Context, Result};

use super::recipe::{LayersRecipe, Order};
use crate::layout::{BlockId, BlockSpec};

/// Entries of the pruned model's layout that are trained together, and those of the original that they stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandwich {
    /// Entries of the pruned model: neighbours below, replaced ones, neighbours above.
    pub student: Range<usize>,
    /// The same blocks in the original model.
    pub teacher: Range<usize>,
    /// The replaced blocks.
    pub filling: Vec<BlockId>,
}

impl fmt::Display for Sandwich {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.filling.iter().map(ToString::to_string).collect();
        f.pad(&names.join("+"))
    }
}

/// The blocks of the original that entry `spec` stands for.
fn blocks(spec: &BlockSpec) -> &[BlockId] {
    match spec {
        BlockSpec::Original(id) => std::slice::from_ref(id),
        BlockSpec::Replaced(r) => &r.replaces,
    }
}

/// All sandwiches of a pruned layout, in the order of training: one for every replaced entry or run of neighbouring
/// replaced entries, with up to `neighbours` unpruned entries on each side.
///
/// # Errors
/// When the pruned model has a block that the original lacks.
pub fn sandwiches(
    pruned: &[BlockSpec],
    original: &[BlockSpec],
    recipe: &LayersRecipe,
) -> Result<Vec<Sandwich>> {
    let replaced = |i: usize| matches!(pruned.get(i), Some(BlockSpec::Replaced(_)));
    let mut out = Vec::new();
    let mut start = 0;
    while start < pruned.len() {
        if !replaced(start) {
            start += 1;
            continue;
        }
        let mut end = start;
        while replaced(end) {
            end += 1;
        }
        let (mut low, mut high) = (start, end);
        while low > 0 && start - low < recipe.neighbours && !replaced(low - 1) {
            low -= 1;
        }
        while high < pruned.len() && high - end < recipe.neighbours && !replaced(high) {
            high += 1;
        }
        let position = |id: BlockId| {
            let entry = original
                .iter()
                .position(|spec| *spec == BlockSpec::Original(id));
            entry.with_context(|| format!("the original model has no block {id}"))
        };
        let first = blocks(&pruned[low]).first().copied();
        let last = blocks(&pruned[high - 1]).last().copied();
        let (Some(first), Some(last)) = (first, last) else {
            anyhow::bail!("a replacement of no block")
        };
        out.push(Sandwich {
            student: low..high,
            teacher: position(first)?..position(last)? + 1,
            filling: pruned[start..end]
                .iter()
                .flat_map(blocks)
                .copied()
                .collect(),
        });
        start = end;
    }
    if recipe.order == Order::Downwards {
        out.reverse();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Form, Replacement, unpruned};

    fn replace(layout: &mut Vec<BlockSpec>, blocks: &[BlockId]) {
        let at = layout
            .iter()
            .position(|s| *s == BlockSpec::Original(blocks[0]))
            .unwrap();
        let replaced = BlockSpec::Replaced(Replacement {
            replaces: blocks.to_vec(),
            form: Form::Linear,
            joint: false,
        });
        layout.splice(at..at + blocks.len(), [replaced]);
    }

    #[test]
    fn a_sandwich_is_a_run_and_its_neighbours() {
        let original = unpruned(4, 4);
        let mut pruned = original.clone();
        replace(&mut pruned, &[BlockId::double(1)]);
        replace(&mut pruned, &[BlockId::double(3), BlockId::single(0)]);
        replace(&mut pruned, &[BlockId::single(3)]);
        let recipe = LayersRecipe::default();
        let found = sandwiches(&pruned, &original, &recipe).unwrap();
        let ranges: Vec<_> = found
            .iter()
            .map(|s| (s.student.clone(), s.teacher.clone()))
            .collect();
        // d0 [d1] d2 [d3 s0] s1 s2 [s3]
        assert_eq!(ranges, [(0..3, 0..3), (2..5, 2..6), (5..7, 6..8)]);
        assert_eq!(found[1].to_string(), "double.03+single.00");
        let downwards = LayersRecipe {
            order: Order::Downwards,
            ..recipe
        };
        let mut again = sandwiches(&pruned, &original, &downwards).unwrap();
        again.reverse();
        assert_eq!(again, found);
    }

    #[test]
    fn neighbours_end_at_the_model_and_at_other_sandwiches() {
        let original = unpruned(3, 2);
        let mut pruned = original.clone();
        replace(&mut pruned, &[BlockId::double(0)]);
        replace(&mut pruned, &[BlockId::double(2)]);
        let recipe = LayersRecipe {
            neighbours: 3,
            ..LayersRecipe::default()
        };
        let found = sandwiches(&pruned, &original, &recipe).unwrap();
        let ranges: Vec<_> = found.iter().map(|s| s.student.clone()).collect();
        assert_eq!(ranges, [0..2, 1..5]);
    }

    #[test]
    fn a_block_that_the_original_lacks_is_named() {
        let mut pruned = unpruned(3, 2);
        replace(&mut pruned, &[BlockId::double(1)]);
        let error = sandwiches(&pruned, &unpruned(2, 2), &LayersRecipe::default()).unwrap_err();
        assert!(error.to_string().contains("double.02"), "{error}");
    }
}
