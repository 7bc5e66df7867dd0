//! The loop: phases, steps, evaluations of the held-out loss, saving. What a step computes is in `backward`, `loss`, `optimiser`.

use anyhow::{Context, Result, bail, ensure};
use candle::{Tensor, Var};

use super::{
    backward,
    data::Images,
    log::{Entry, PhaseReport},
    optimiser::{self, Optimiser},
    phase::{Kind, Measure, Phase, Sample, phases},
    recipe::SandwichRecipe,
    samples::Samples,
    sandwich::Sandwich,
    state::{Progress, Saved},
    trainables::{self, Trainable, Values},
};
use crate::model::{Block, Flux, Trunk};

/// A held-out loss this many times that from before is no accident.
const DIVERGED: f64 = 10.0;

/// Is told what happens during a run.
pub trait TrainObserver {
    /// After every step and every evaluation of the held-out loss.
    ///
    /// # Errors
    /// When the log cannot be written.
    fn entry(&mut self, entry: &Entry) -> Result<()>;
    /// When a phase begins: its name and number, and how many steps it has.
    fn phase(&mut self, name: &str, index: usize, steps: usize, done: usize);
    /// When the run should be saved.
    ///
    /// # Errors
    /// When it cannot.
    fn save(&mut self, saved: &Saved) -> Result<()>;
}

/// Everything that stays the same during a run, and the model that is trained.
pub struct Training<'a> {
    /// The unpruned model.
    pub teacher: &'a Flux,
    /// The pruned model; it shares the weights that are the teacher's.
    pub student: Flux,
    /// Entries at the start of the pruned model that are the teacher's own.
    pub shared: usize,
    /// What is trained together, in order.
    pub sandwiches: Vec<Sandwich>,
    /// What is trained on.
    pub images: Images,
    /// What the held-out loss is taken on.
    pub held_out: Images,
    /// Noised latents in a forward.
    pub batch: usize,
    /// Held-out noised latents.
    pub num_held_out: usize,
    /// The recipe.
    pub recipe: &'a SandwichRecipe,
    /// Steps after which a run is saved.
    pub save_every: usize,
    /// Whether to keep the input of each block only and compute the rest again on the way back.
    pub gradient_checkpointing: bool,
    /// Batches that pass through a block together if it is read whenever it is run; at least 1. Changes no number.
    pub batches_per_load: usize,
}

impl Training<'_> {
    /// Trains from the start or from where `saved` was; returns the trained values and what became of every phase.
    ///
    /// # Errors
    /// When a loss becomes NaN or infinite or diverges, a pass fails, or the run cannot be saved.
    pub fn run(&mut self, saved: Option<Saved>, observer: &mut dyn TrainObserver) -> Result<Saved> {
        let mut saved = saved.unwrap_or_default();
        let phases = phases(self.recipe, &self.sandwiches, self.student.trunk.len());
        let stored = self.student.trunk.clone();
        for (index, phase) in phases.iter().enumerate() {
            let trainables = self.attach(phase, &saved.values)?;
            ensure!(
                !trainables.is_empty(),
                "{}: nothing to train (no layer, and no LoRA without a rank)",
                phase.name
            );
            if index >= saved.progress.phase {
                observer.phase(&phase.name, index, phase.steps, saved.progress.step);
                self.phase(phase, &trainables, &mut saved, observer)
                    .with_context(|| phase.name.clone())?;
            }
            self.put_away(phase, &stored);
        }
        Ok(saved)
    }

    /// Relative mean squared error of the velocity on held-out noised latents.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn velocity_error(&self) -> Result<f64> {
        let phase = Phase {
            name: String::new(),
            kind: Kind::Finetune,
            range: 0..self.student.trunk.len(),
            trained: Vec::new(),
            steps: 0,
            lr: 0.0,
        };
        let held_out = self.held_out_samples(&phase)?;
        let measure = self.measure(&phase, &held_out)?;
        self.held_out_loss(&phase, &held_out, &measure)
    }

    /// Blocks that were not on the device before the phase leave it again.
    fn put_away(&mut self, phase: &Phase, stored: &Trunk) {
        let entries = self.student.trunk.entries_mut().iter_mut();
        for (i, ((_, block), (_, before))) in entries.zip(stored.entries()).enumerate() {
            if phase.range.contains(&i) && matches!(before, Block::Offloaded(_)) {
                let resident = block.clone();
                if !matches!(resident, Block::Offloaded(_)) {
                    *block = before.with_lora_of(resident);
                }
            }
        }
    }

    fn attach(&mut self, phase: &Phase, values: &Values) -> Result<Vec<Trainable>> {
        let device = self.images.device().clone();
        let mut out = Vec::new();
        for range in &phase.trained {
            out.extend(trainables::attach(
                &mut self.student.trunk,
                range.clone(),
                &self.recipe.lora,
                self.recipe.seed,
                values,
                &device,
                matches!(phase.kind, Kind::Finetune),
            )?);
        }
        Ok(out)
    }

    fn phase(
        &self,
        phase: &Phase,
        trainables: &[Trainable],
        saved: &mut Saved,
        observer: &mut dyn TrainObserver,
    ) -> Result<()> {
        let recipe = self.recipe;
        let vars: Vec<Var> = trainables.iter().map(|t| t.var.clone()).collect();
        let held_out = self.held_out_samples(phase)?;
        let measure = self.measure(phase, &held_out)?;
        let mut optimiser = self.optimiser(trainables, saved)?;
        forget(trainables, saved);
        if saved.progress.before.is_none() {
            let before = self.held_out_loss(phase, &held_out, &measure)?;
            ensure!(
                before.is_finite(),
                "the held-out loss is NaN or infinite before the first step"
            );
            saved.progress.before = Some(before);
            saved.progress.best = Some((before, 0));
            saved.best = trainables::values(trainables)?;
            Self::log(phase, &mut saved.progress, None, Some(before), observer)?;
        }
        let before = saved.progress.before.unwrap_or(f64::INFINITY);
        let mut samples = Samples::new(self, phase, saved.progress.phase as u64);
        while saved.progress.step < phase.steps {
            let step = saved.progress.step;
            let lr = recipe.optimiser.rate(phase.lr, step, phase.steps);
            let at = || format!("step {}, learning rate {lr:.2e}", step + 1);
            let (loss, grads) = self
                .step(phase, &vars, &measure, step, &mut samples)
                .with_context(at)?;
            let norm = optimiser::norm(&grads)?;
            if !loss.is_finite() || !norm.is_finite() {
                bail!(
                    "the loss became NaN or infinite at {}\nhint: the run is saved as it was before; a lower --lr (with --restart) may help",
                    at()
                );
            }
            let clip = recipe.optimiser.clip;
            let scale = if clip > 0.0 && norm > clip {
                clip / norm
            } else {
                1.0
            };
            let rates: Vec<f64> = trainables
                .iter()
                .map(|t| {
                    lr * if t.is_lora() {
                        1.0
                    } else {
                        recipe.optimiser.layer_lr
                    }
                })
                .collect();
            optimiser.step(&vars, (&grads, scale), &rates, &recipe.optimiser)?;
            drop(grads);
            saved.progress.step = step + 1;
            let evaluates =
                (step + 1).is_multiple_of(recipe.evaluate_every) || step + 1 == phase.steps;
            let held_out_loss = evaluates
                .then(|| self.held_out_loss(phase, &held_out, &measure))
                .transpose()?;
            let entry = Some((loss, lr, norm));
            Self::log(phase, &mut saved.progress, entry, held_out_loss, observer)?;
            if let Some(now) = held_out_loss {
                if now.is_nan() || now >= before * DIVERGED {
                    bail!(
                        "training diverges: the held-out loss went from {before:.3e} to {now:.3e} at {}\nhint: the run is saved as it was before; a lower --lr (with --restart) may help",
                        at()
                    );
                }
                if saved.progress.best.is_none_or(|(best, _)| now < best) {
                    saved.progress.best = Some((now, step + 1));
                    saved.progress.evaluations = 0;
                    saved.best = trainables::values(trainables)?;
                } else {
                    saved.progress.evaluations += 1;
                    if recipe.patience > 0 && saved.progress.evaluations >= recipe.patience {
                        break;
                    }
                }
            }
            if (step + 1).is_multiple_of(self.save_every.max(1)) && step + 1 < phase.steps {
                saved.values.extend(trainables::values(trainables)?);
                saved.moments = moments(trainables, &optimiser)?;
                observer.save(saved)?;
                forget(trainables, saved);
            }
        }
        trainables::restore(trainables, &saved.best)?;
        saved.values.extend(std::mem::take(&mut saved.best));
        let Progress {
            step, before, best, ..
        } = saved.progress;
        let (after, kept) = best.context("a phase starts with its held-out loss")?;
        let elements = vars.iter().map(|v| v.elem_count()).sum();
        let mut reports = std::mem::take(&mut saved.progress.reports);
        reports.push(PhaseReport {
            phase: phase.name.clone(),
            steps: step,
            kept,
            before: before.unwrap_or(after),
            after,
            trainables: elements,
        });
        saved.progress = Progress {
            phase: saved.progress.phase + 1,
            reports,
            log: std::mem::take(&mut saved.progress.log),
            ..Progress::default()
        };
        observer.save(saved)
    }

    fn log(
        phase: &Phase,
        progress: &mut Progress,
        step: Option<(f64, f64, f64)>,
        held_out: Option<f64>,
        observer: &mut dyn TrainObserver,
    ) -> Result<()> {
        let entry = Entry {
            phase: phase.name.clone(),
            step: progress.step,
            loss: step.map(|(loss, ..)| loss),
            held_out,
            lr: step.map(|(_, lr, _)| lr),
            gradient: step.map(|(.., norm)| norm),
        };
        observer.entry(&entry)?;
        progress.log.push(entry);
        Ok(())
    }

    fn optimiser(&self, trainables: &[Trainable], saved: &Saved) -> Result<Optimiser> {
        let vars: Vec<Var> = trainables.iter().map(|t| t.var.clone()).collect();
        let method = self.recipe.optimiser.method;
        if saved.progress.step == 0 {
            return Optimiser::new(&vars, method);
        }
        let of = |values: &Values, t: &Trainable| -> Result<Tensor> {
            let value = values
                .get(&t.name)
                .with_context(|| format!("no moment of `{}` was saved", t.name))?;
            Ok(value.to_device(t.var.device())?)
        };
        let [mean, square] = &saved.moments;
        let means = trainables.iter().map(|t| of(mean, t));
        let squares = trainables.iter().map(|t| {
            let needed = optimiser::squared(method, &t.var);
            needed.then(|| of(square, t)).transpose()
        });
        Ok(Optimiser::resumed(
            means.collect::<Result<_>>()?,
            squares.collect::<Result<_>>()?,
            saved.progress.step,
        ))
    }

    /// Loss and gradients of one step, over all its forwards.
    fn step(
        &self,
        phase: &Phase,
        vars: &[Var],
        measure: &Measure,
        step: usize,
        samples: &mut Samples,
    ) -> Result<(f64, Vec<Tensor>)> {
        let accumulate = self.recipe.data.accumulate;
        let mut total: Option<(f64, Vec<Tensor>)> = None;
        for part in 0..accumulate {
            let sample = samples.get(step * accumulate + part)?;
            let sample = &*sample;
            let got = backward::gradients(
                &self.student.trunk,
                phase.range.clone(),
                &sample.stream,
                &sample.conditioning,
                vars,
                self.gradient_checkpointing,
                &|output| measure.judge(&self.student, output, sample),
            )?;
            total = Some(match total {
                None => (got.loss, got.of),
                Some((loss, sums)) => {
                    let sums = sums.iter().zip(&got.of).map(|(a, b)| a + b);
                    (loss + got.loss, sums.collect::<candle::Result<_>>()?)
                }
            });
        }
        let (loss, grads) = total.context("a step has at least one forward")?;
        if accumulate == 1 {
            return Ok((loss, grads));
        }
        let share = 1.0 / accumulate as f64;
        let grads = grads.iter().map(|g| g * share);
        Ok((loss * share, grads.collect::<candle::Result<_>>()?))
    }

    fn measure(&self, phase: &Phase, held_out: &[Sample]) -> Result<Measure> {
        let entries = self.student.trunk.len();
        Measure::new(
            phase,
            held_out,
            self.teacher,
            entries,
            self.recipe,
            self.gradient_checkpointing,
        )
    }

    fn held_out_loss(&self, phase: &Phase, held_out: &[Sample], measure: &Measure) -> Result<f64> {
        let student = trainables::frozen(&self.student.trunk);
        let mut sum = (0.0, 0);
        for samples in held_out.chunks(self.batches_per_load(&student, phase.range.clone())) {
            let (mut streams, conditionings): (Vec<_>, Vec<_>) = samples
                .iter()
                .map(|s| (s.stream.clone(), &s.conditioning))
                .unzip();
            student.forward_each(phase.range.clone(), &mut streams, &conditionings)?;
            for (output, sample) in streams.iter().zip(samples) {
                let weight = output.tokens.dim(0)?;
                sum.0 += measure.judge(&self.student, output, sample)?.0 * weight as f64;
                sum.1 += weight;
            }
        }
        Ok(sum.0 / f64::from(sum.1.max(1) as u32))
    }
}

/// Drops what was saved of values that are trained right now: on the CPU it would be in memory twice.
fn forget(trainables: &[Trainable], saved: &mut Saved) {
    saved.moments = Default::default();
    for trainable in trainables {
        saved.values.remove(&trainable.name);
    }
}

fn moments(trainables: &[Trainable], optimiser: &Optimiser) -> Result<[Values; 2]> {
    let (mean, square) = optimiser.moments();
    let named = |pairs: &mut dyn Iterator<Item = (&Trainable, &Tensor)>| -> Result<Values> {
        pairs
            .map(|(t, tensor)| Ok((t.name.clone(), tensor.to_device(&candle::Device::Cpu)?)))
            .collect()
    };
    let squares = square.iter().map(Option::as_ref);
    Ok([
        named(&mut trainables.iter().zip(mean))?,
        named(
            &mut trainables
                .iter()
                .zip(squares)
                .filter_map(|(t, s)| Some((t, s?))),
        )?,
    ])
}
