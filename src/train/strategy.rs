//! Decides what training keeps on the device: what was asked for, or the first strategy that fits into memory.

use anyhow::{Result, bail};

use super::{
    memory::{MemoryEstimate, Workload, estimate},
    phase::FINETUNE,
    sandwich::Sandwich,
    setup::TrainSetup,
};
use crate::{
    model::{
        memory::{ElementSizes, OffloadPlan},
        ops,
    },
    pipeline::placement::UNCOUNTED_ON_GPU,
    ui,
};

/// A run whose estimate, an upper one, is this many times the memory there is cannot fit.
const HOPELESS: f64 = 4.0;

/// Bytes of a limit that blocks which could be read leave free on a GPU: an allocator cannot use again all that it was
/// given. With so much left an H200 held 20.2 GiB within a limit of 24.
const LEFT_BY_BLOCKS: u64 = 4 << 30;

/// What is not kept on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStrategy {
    /// Only the inputs of blocks are kept, the rest is computed again on the way back.
    pub gradient_checkpointing: bool,
    /// Blocks that are not trained are read when they are run.
    pub offload: bool,
    /// Bytes for those of them that stay on the device all the same.
    pub room: u64,
    /// Batches that pass through such a block each time it is read.
    pub batches_per_load: usize,
}

/// What the user asks for and allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryRequest {
    /// Compute activations again on the way back.
    pub gradient_checkpointing: bool,
    /// Keep blocks that are not trained off the device.
    pub offload: bool,
    /// Most bytes to use, if the user says so.
    pub max_bytes: Option<u64>,
    /// Bytes that are free; `None` if unknown.
    pub free: Option<u64>,
    /// Whether nothing will be trained.
    pub dry_run: bool,
}

/// One phase: its name, its steps, and the memory it takes.
#[derive(Clone, Debug)]
pub(super) struct PhaseEstimate {
    pub(super) name: String,
    pub(super) steps: usize,
    pub(super) memory: MemoryEstimate,
}

impl TrainSetup {
    /// The strategy that `request` names, or the first that fits.
    ///
    /// # Errors
    /// When none fits into a limit that the user set, or the run is far beyond the memory there is.
    pub fn strategy(&self, request: MemoryRequest) -> Result<MemoryStrategy> {
        let asked = MemoryStrategy {
            gradient_checkpointing: request.gradient_checkpointing
                || request.offload
                || self.options.size.is_large(),
            offload: request.offload,
            room: 0,
            batches_per_load: 1,
        };
        let Some(limit) = request.max_bytes.or(request.free) else {
            return Ok(self.with_batches(asked, None));
        };
        let on_gpu = !self.runtime.device.is_cpu();
        // of what is free the driver has taken its part already
        let uncounted = match request.max_bytes {
            Some(_) if on_gpu => UNCOUNTED_ON_GPU,
            _ => 0,
        };
        let usable = limit.saturating_sub(uncounted);
        let checkpointing = MemoryStrategy {
            gradient_checkpointing: true,
            ..asked
        };
        let least = MemoryStrategy {
            gradient_checkpointing: true,
            offload: true,
            room: 0,
            batches_per_load: 1,
        };
        for strategy in [asked, checkpointing, least] {
            if peak(&self.phases(strategy)) > usable as f64 {
                continue;
            }
            let mut strategy = self.with_batches(strategy, Some(usable));
            if strategy.offload && !asked.offload {
                let left_free = if on_gpu { LEFT_BY_BLOCKS } else { 0 };
                let taken = peak(&self.phases(strategy)) as u64;
                strategy.room = limit.saturating_sub(left_free + taken);
            }
            if strategy.offload != asked.offload
                || strategy.gradient_checkpointing != asked.gradient_checkpointing
            {
                let limit = ui::bytes(limit as f64);
                self.pair.pruned.reporter.note(if strategy.offload {
                    let plan = self.offload_plan(strategy);
                    format!(
                        "within {limit}: {} of {} blocks stay on the device, and those that a sandwich trains; the others are read when they are run",
                        plan.count(),
                        plan.total()
                    )
                } else {
                    format!("within {limit}: activations are computed again on the way back (--gradient-checkpointing)")
                });
            }
            return Ok(strategy);
        }
        self.refuse(&self.phases(least), limit, request)?;
        Ok(least)
    }

    /// Fails unless there is hope that a run fits that should not.
    fn refuse(&self, phases: &[PhaseEstimate], limit: u64, request: MemoryRequest) -> Result<()> {
        let peak = peak(phases);
        let text = format!(
            "{} of memory are too little: training takes {} with nothing on the device that need not be there",
            ui::bytes(limit as f64),
            ui::bytes(peak)
        );
        if request.max_bytes.is_some() {
            bail!(
                "--max-vram: {text}\nhint: a smaller --batch, smaller images (--width, --height) or a smaller --rank take less"
            );
        }
        let hopeless = peak > HOPELESS * limit as f64;
        if hopeless || request.dry_run {
            bail!(
                "{text}\nhint: {} takes less; --max-vram says how much there is, if it is more",
                self.what_to_lower(phases)
            );
        }
        self.pair
            .pruned
            .reporter
            .warn(format!("{text}; trying all the same"));
        Ok(())
    }

    /// What to lower in the phase that takes most.
    fn what_to_lower(&self, phases: &[PhaseEstimate]) -> &'static str {
        let all = phases.iter().map(|phase| phase.memory);
        let Some(most) = all.max_by(|a, b| a.bytes().total_cmp(&b.bytes())) else {
            return "a smaller --batch";
        };
        let half = most.bytes() / 2.0;
        match self.options.recipe.data.cache {
            0 if most.samples > half => "a smaller `data.held-out` of the recipe",
            _ if most.samples > half => "a smaller --cache",
            _ if most.optimiser > half => "a smaller --rank",
            _ if most.weights > half => "another number format (see `fastflux convert`)",
            _ => "a smaller --batch or smaller images (--width, --height)",
        }
    }

    /// `strategy` with as many batches for each load of an offloaded block as there is room for.
    fn with_batches(&self, strategy: MemoryStrategy, limit: Option<u64>) -> MemoryStrategy {
        let recipe = &self.options.recipe;
        let room = limit.map(|limit| limit as f64 - peak(&self.phases(strategy)));
        let steps = recipe.steps.max(recipe.finetune.steps) * recipe.data.accumulate;
        let held_out = self.options.held_out.div_ceil(self.options.batch.max(1));
        let samples = match recipe.data.cache {
            0 => steps,
            cache => cache.min(steps),
        };
        let config = &self.pair.pruned.config;
        let workload = self.workload(strategy);
        MemoryStrategy {
            batches_per_load: workload.max_batches_per_load(config, samples.max(held_out), room),
            ..strategy
        }
    }

    /// Which of the teacher's blocks stay on the device if blocks are read when they are run.
    pub(super) fn offload_plan(&self, strategy: MemoryStrategy) -> OffloadPlan {
        OffloadPlan::filled(&self.pair.teacher.config, self.sizes(), strategy.room)
    }

    fn sizes(&self) -> ElementSizes {
        let dtype = self.runtime.dtype;
        ElementSizes {
            element: dtype.size_in_bytes() as u64,
            weight: self.pair.teacher.bytes_of_a_weight(dtype),
            scores: false,
        }
    }

    fn workload(&self, strategy: MemoryStrategy) -> Workload {
        let runtime = &self.runtime;
        let plan = self.offload_plan(strategy);
        let resident = plan.bytes_of_blocks(&self.pair.teacher.config, self.sizes());
        Workload {
            element: runtime.dtype.size_in_bytes() as f64,
            weight: self.pair.teacher.bytes_of_a_weight(runtime.dtype),
            cpu: runtime.device.is_cpu(),
            scores: ops::holds_scores_backward(
                &runtime.device,
                runtime.dtype,
                self.pair.pruned.config.head_dim(),
            ),
            batch: self.options.batch,
            tokens: (self.options.text_tokens, self.options.size.tokens()),
            gradient_checkpointing: strategy.gradient_checkpointing,
            offload: strategy.offload,
            resident: resident as f64,
            batches_per_load: strategy.batches_per_load,
        }
    }

    /// How many phases there are.
    pub(super) fn phase_count(&self) -> usize {
        let recipe = &self.options.recipe;
        let sandwiches = if recipe.steps > 0 {
            self.sandwiches.len()
        } else {
            0
        };
        sandwiches + usize::from(recipe.finetune.steps > 0)
    }

    /// What each phase takes.
    pub(super) fn phases(&self, strategy: MemoryStrategy) -> Vec<PhaseEstimate> {
        let recipe = &self.options.recipe;
        let workload = self.workload(strategy);
        let (pruned, teacher) = (&self.pair.pruned.config, &self.pair.teacher.config);
        let memory = |sandwich: Option<&Sandwich>| {
            estimate(
                pruned,
                teacher,
                &self.sandwiches,
                sandwich,
                recipe,
                workload,
            )
        };
        let mut phases = Vec::new();
        if recipe.steps > 0 {
            phases.extend(self.sandwiches.iter().map(|sandwich| PhaseEstimate {
                name: sandwich.to_string(),
                steps: recipe.steps,
                memory: memory(Some(sandwich)),
            }));
        }
        if recipe.finetune.steps > 0 {
            phases.push(PhaseEstimate {
                name: FINETUNE.to_owned(),
                steps: recipe.finetune.steps,
                memory: memory(None),
            });
        }
        phases
    }
}

/// Bytes of the phase that takes most.
pub(super) fn peak(phases: &[PhaseEstimate]) -> f64 {
    let all = phases.iter().map(|phase| phase.memory.bytes());
    all.fold(0.0, f64::max)
}
