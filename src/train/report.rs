//! What a run did, or would take, as tables and as `--json` has them.

use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    log::PhaseReport,
    memory::MemoryEstimate,
    recipe::SandwichRecipe,
    setup::TrainSetup,
    strategy::{MemoryStrategy, peak},
};
use crate::{checkpoint::target, ui};

/// The file with a [`TrainReport`].
pub const REPORT: &str = "training.json";

/// What became of a run: `training.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// The folder that was written.
    pub output: String,
    /// Relative mean squared error of the velocity on held-out noised latents.
    pub velocity_error: BeforeAfter,
    /// What became of each phase.
    pub phases: Vec<PhaseReport>,
    /// How long training took; not in the file, which is the same after a resumed run.
    #[serde(default)]
    pub seconds: f64,
    /// With a value for everything.
    pub recipe: SandwichRecipe,
    /// Everything that a run depends on, as one text: a parsed float may be off by its last bit.
    pub settings: String,
}

/// A number before and after training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// Of the pruned model.
    pub before: f64,
    /// Of the trained one.
    pub after: f64,
}

impl TrainReport {
    /// What a terminal shows.
    pub fn table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .phases
            .iter()
            .map(|phase| {
                vec![
                    phase.phase.clone(),
                    phase.steps.to_string(),
                    ui::count(phase.trainables as f64),
                    format!("{:.5}", phase.before),
                    format!("{:.5}", phase.after),
                    if phase.kept == 0 {
                        "no better: left as it was".to_owned()
                    } else {
                        String::new()
                    },
                ]
            })
            .collect();
        let header = ["trained", "steps", "values", "before", "after", ""];
        format!(
            "held-out loss before and after each phase\n{}\n\nthe velocity of the pruned model is off by {:.4} instead of {:.4}\n(relative MSE, held-out noised latents)",
            ui::table(&header, &rows, &[1, 2, 3, 4]),
            self.velocity_error.after,
            self.velocity_error.before
        )
    }
}

/// What a run would take.
#[derive(Clone, Debug, Serialize)]
pub struct DryRunReport {
    /// One for each phase.
    pub phases: Vec<PhaseMemory>,
    /// Most bytes on the device.
    pub peak_bytes: f64,
    /// Operations of everything.
    pub flops: f64,
    /// Seconds for them; `None` until the speed was measured.
    pub seconds: Option<f64>,
    /// Bytes of memory that are free; `None` if unknown.
    pub free: Option<u64>,
    /// Bytes that are written.
    pub disk: u64,
    /// Free bytes on that disk; `None` if unknown.
    pub free_disk: Option<u64>,
    /// Images to sample.
    pub images: usize,
    /// Noised latents in a forward.
    pub batch: usize,
    /// Text and image tokens of a state.
    pub tokens: usize,
    /// Whether activations are computed again on the way back.
    pub gradient_checkpointing: bool,
    /// Whether blocks that are not trained stay off the device.
    pub offload: bool,
    /// Batches that pass through such a block each time it is read.
    pub batches_per_load: usize,
    /// With a value for everything.
    pub recipe: SandwichRecipe,
}

/// What one phase would take.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseMemory {
    /// `double.01`, or `finetune`.
    pub phase: String,
    /// Steps.
    pub steps: usize,
    /// Bytes on the device.
    pub memory: MemoryEstimate,
}

impl DryRunReport {
    /// What `setup` takes with `strategy`.
    pub fn new(setup: &TrainSetup, strategy: MemoryStrategy) -> Self {
        let phases = setup.phases(strategy);
        let options = &setup.options;
        Self {
            peak_bytes: peak(&phases),
            flops: setup.flops(strategy),
            seconds: None,
            free: setup.runtime.free_memory(),
            disk: 0,
            free_disk: None,
            phases: phases
                .into_iter()
                .map(|phase| PhaseMemory {
                    phase: phase.name,
                    steps: phase.steps,
                    memory: phase.memory,
                })
                .collect(),
            images: options.prompts.len(),
            batch: options.batch,
            tokens: options.text_tokens + options.size.tokens(),
            gradient_checkpointing: strategy.gradient_checkpointing,
            offload: strategy.offload,
            batches_per_load: strategy.batches_per_load,
            recipe: options.recipe.clone(),
        }
    }

    /// At a speed, in operations per second, and with `bytes` of a model that are written to `output`.
    #[must_use]
    pub fn with_machine(mut self, flops_per_second: f64, output: &Path, bytes: u64) -> Self {
        self.seconds = Some(self.flops / flops_per_second);
        // the run is saved next to its output, with values, best values and moments
        let trained = self.phases.iter().map(|phase| phase.memory.trainables);
        self.disk = bytes + 16 * trained.fold(0.0, f64::max) as u64;
        self.free_disk = target::free_space(output);
        self
    }

    /// Fails if the disk is too small; memory is checked when the strategy is chosen.
    ///
    /// # Errors
    /// The message says how much is missing.
    pub fn check(&self) -> Result<()> {
        match self.free_disk {
            Some(free) if free < self.disk => bail!(
                "it cannot work here: {} are written, {} are free on the disk of the output\nhint: free some space, or choose another --output",
                ui::bytes(self.disk as f64),
                ui::bytes(free as f64)
            ),
            _ => Ok(()),
        }
    }

    /// What a terminal shows.
    pub fn table(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .phases
            .iter()
            .map(
                |PhaseMemory {
                     phase,
                     steps,
                     memory: m,
                 }| {
                    let sizes = [m.weights, m.optimiser, m.activations, m.samples, m.bytes()];
                    let name = format!("{phase} ({steps})");
                    let mut row = vec![name, ui::count(m.trainables)];
                    row.extend(sizes.map(ui::bytes));
                    row
                },
            )
            .collect();
        let header = [
            "phase (steps)",
            "values",
            "weights",
            "optimiser",
            "activations",
            "batches",
            "all",
        ];
        let loads = if self.offload {
            format!(
                "a block that is read serves {} of them\n",
                self.batches_per_load
            )
        } else {
            String::new()
        };
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let free = |free: Option<u64>| {
            free.map_or_else(String::new, |free| format!(", {} are free", size(free)))
        };
        let mut rest = free(self.free);
        if self.disk > 0 {
            rest += &format!("\nwritten: {}{}", size(self.disk), free(self.free_disk));
        }
        if let Some(seconds) = self.seconds {
            let time = ui::duration(seconds);
            rest += &format!(
                "\ntime: about {time} at the speed of a large product here ({})",
                ui::flops(self.flops)
            );
        }
        format!(
            "{}\n\n{}, {} of {} tokens in a forward\n{loads}peak on the device: {}{rest}",
            ui::table(&header, &rows, &[1, 2, 3, 4, 5, 6]),
            ui::counted(self.images, "image"),
            ui::counted(self.batch, "noised latent"),
            self.tokens,
            ui::bytes(self.peak_bytes)
        )
    }
}

/// The report of the run of these `settings` that wrote `folder`; `None` if it is of another run or damaged.
pub fn finished(folder: &Path, settings: &Value) -> Option<TrainReport> {
    let text = std::fs::read(folder.join(REPORT)).ok()?;
    let report: TrainReport = serde_json::from_slice(&text).ok()?;
    let settings = settings.to_string();
    (report.settings == settings).then_some(report)
}
