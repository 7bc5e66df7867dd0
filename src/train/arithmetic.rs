//! The arithmetic of a run, from the sizes alone: for its time in a dry run.

use super::{setup::TrainSetup, strategy::MemoryStrategy};
use crate::{
    layout::{BlockSpec, FluxConfig},
    model::cost,
};

impl TrainSetup {
    /// Operations of all phases, and of sampling the images. A backward pass counts as two forwards, and as three if
    /// activations are computed again.
    pub(super) fn flops(&self, strategy: MemoryStrategy) -> f64 {
        let (options, recipe) = (&self.options, &self.options.recipe);
        let (image, text) = (options.size.tokens(), options.text_tokens);
        let of = |config: &FluxConfig, entries: &[BlockSpec]| -> f64 {
            let blocks = entries.iter();
            blocks
                .map(|spec| cost::block(config, spec, image, text).flops() as f64)
                .sum()
        };
        let (student, teacher) = (&self.pair.pruned.config, &self.pair.teacher.config);
        let backward = if strategy.gradient_checkpointing {
            3.0
        } else {
            2.0
        };
        let whole = cost::model(teacher, image, text).flops() as f64;
        let each = (options.batch * recipe.data.accumulate) as f64;
        let sampling = options.prompts.len() * recipe.data.steps.unwrap_or(1);
        // teacher and student run up to the exit of the sandwich, and back through it
        let sandwiches = self.sandwiches.iter().map(|sandwich| {
            let (s, t) = (&sandwich.student, &sandwich.teacher);
            of(teacher, &teacher.layout[..t.end])
                + of(student, &student.layout[..s.end])
                + backward * of(student, &student.layout[s.clone()])
        });
        let finetune = whole + (1.0 + backward) * of(student, &student.layout);
        let steps = recipe.steps as f64 * sandwiches.sum::<f64>();
        sampling as f64 * whole + each * (steps + recipe.finetune.steps as f64 * finetune)
    }
}
