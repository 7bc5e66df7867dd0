//! The ranges of a recipe's numbers.

use anyhow::{Result, ensure};

use super::SandwichRecipe;
use crate::{
    calibrate::recipe::{MAX_BATCH, MAX_PROMPTS},
    pipeline::defaults::MAX_STEPS_OF_DATA,
};

/// Beyond these a number is a slip of the finger, and would take for ever or exhaust memory.
const MAX_TRAINING_STEPS: usize = 10_000_000;
const MAX_HELD_OUT: usize = 1_000_000;
const MAX_CACHE: usize = 100_000;
const MAX_ACCUMULATE: usize = 10_000;

impl SandwichRecipe {
    /// Checks the ranges of all numbers for a model `width` wide.
    ///
    /// # Errors
    /// When one is out of range; the message names it and the range.
    pub fn validate(&self, width: usize) -> Result<()> {
        if let Some(rank) = self.lora.rank {
            ensure!(
                (1..=width).contains(&rank),
                "--rank {rank}: a LoRA of this model has a rank between 1 and its width, {width}"
            );
        }
        let positive = |name: &str, value: f64| -> Result<()> {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name} {value}: expected a number above 0"
            );
            Ok(())
        };
        let o = &self.optimiser;
        positive("--lr", o.lr)?;
        positive("recipe: `finetune.lr`", self.finetune.lr.unwrap_or(1.0))?;
        positive("--alpha", self.lora.alpha.unwrap_or(1.0))?;
        positive("recipe: `optimiser.epsilon`", o.epsilon)?;
        for (name, share) in [
            ("momentum", o.momentum),
            ("beta1", o.beta1),
            ("beta2", o.beta2),
            ("final-lr", o.final_lr),
        ] {
            ensure!(
                (0.0..1.0).contains(&share),
                "recipe: `optimiser.{name}` must be at least 0 and below 1"
            );
        }
        for (name, value) in [
            ("optimiser.weight-decay", o.weight_decay),
            ("optimiser.clip", o.clip),
            ("optimiser.layer-lr", o.layer_lr),
            ("loss.text-weight", self.loss.text_weight),
        ] {
            ensure!(
                value.is_finite() && value >= 0.0,
                "recipe: `{name}` must be a number of at least 0"
            );
        }
        self.validate_counts()?;
        ensure!(
            self.steps + self.finetune.steps > 0,
            "--steps 0 and --finetune 0: nothing would be trained"
        );
        Ok(())
    }

    /// The numbers that count something, with the flag or the key that sets them.
    fn validate_counts(&self) -> Result<()> {
        let d = &self.data;
        for (name, value, least, most) in [
            ("--batch", d.batch.unwrap_or(1), 1, MAX_BATCH),
            ("--num-prompts", d.num_prompts.unwrap_or(1), 1, MAX_PROMPTS),
            ("--steps", self.steps, 0, MAX_TRAINING_STEPS),
            ("--finetune", self.finetune.steps, 0, MAX_TRAINING_STEPS),
            ("--accumulate", d.accumulate, 1, MAX_ACCUMULATE),
            ("--cache", d.cache, 0, MAX_CACHE),
            ("`data.steps`", d.steps.unwrap_or(1), 1, MAX_STEPS_OF_DATA),
            ("`data.held-out`", d.held_out.unwrap_or(1), 1, MAX_HELD_OUT),
        ] {
            let from = if name.starts_with('-') {
                ""
            } else {
                "recipe: "
            };
            ensure!(
                (least..=most).contains(&value),
                "{from}{name} {value}: expected a number from {least} to {most}"
            );
        }
        for (name, value) in [
            ("sandwich.neighbours", self.sandwich.neighbours),
            ("evaluate-every", self.evaluate_every),
        ] {
            ensure!(value > 0, "recipe: `{name}` must be at least 1");
        }
        ensure!(
            d.guidance.is_none_or(|g| g.is_finite() && g >= 0.0),
            "recipe: `data.guidance` must be a number of at least 0"
        );
        Ok(())
    }
}
