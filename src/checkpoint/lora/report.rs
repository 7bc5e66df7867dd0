//! What became of a LoRA file's tensors, in numbers and in words.

use std::collections::{BTreeMap, BTreeSet};

use crate::layout::BlockId;

/// What became of a file's tensors.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Tensors in the file.
    pub total: usize,
    /// Tensors that act on the transformer.
    pub tensors: usize,
    /// Tensors that act on text encoders.
    pub text: usize,
    /// Tensors of blocks that are replaced.
    pub of_blocks: BTreeMap<BlockId, usize>,
    /// Tensors of other modules that the model has not got.
    pub of_modules: usize,
    modules: BTreeSet<&'static str>,
}

impl Applied {
    pub(super) fn new(total: usize) -> Self {
        Self {
            total,
            tensors: 0,
            text: 0,
            of_blocks: BTreeMap::new(),
            of_modules: 0,
            modules: BTreeSet::new(),
        }
    }

    pub(super) fn leave_out(
        &mut self,
        block: Option<BlockId>,
        module: &'static str,
        tensors: usize,
    ) {
        if let Some(block) = block {
            *self.of_blocks.entry(block).or_default() += tensors;
        } else {
            self.of_modules += tensors;
            self.modules.insert(module);
        }
    }

    /// Which tensors fell away, and why; empty if all apply.
    pub fn left_out(&self) -> String {
        let mut parts = Vec::new();
        let tensors: usize = self.of_blocks.values().sum();
        if tensors > 0 {
            let blocks: Vec<String> = self.of_blocks.keys().map(ToString::to_string).collect();
            let (word, verb) = match blocks.len() {
                1 => ("block", "is"),
                _ => ("blocks", "are"),
            };
            parts.push(format!(
                "{tensors} of its {} tensors fall away, as the {word} {} {verb} replaced",
                self.total,
                blocks.join(", ")
            ));
        }
        if self.of_modules > 0 {
            let modules: Vec<&str> = self.modules.iter().copied().collect();
            parts.push(format!(
                "{} of its {} tensors fall away, as this model has no {}",
                self.of_modules,
                self.total,
                modules.join(", ")
            ));
        }
        parts.join("; ")
    }
}
