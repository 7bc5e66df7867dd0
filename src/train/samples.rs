//! Batches at the entry of what is trained: drawn by number, run through the frozen blocks of pruned model and teacher.
//!
//! If those blocks are not on the device, several batches pass through each before the next one is read. A batch
//! depends on seed, phase and number alone, so neither that nor where a run went on after a kill changes any of them.

use std::{borrow::Cow, collections::VecDeque, ops::Range};

use anyhow::{Context, Result};

use super::{
    Training,
    data::Key,
    phase::{Kind, Phase, Sample},
    recipe::Target,
    trainables,
};
use crate::{
    calibrate::noised::Batch,
    model::{Conditioning, Stream, Trunk},
};

impl Training<'_> {
    /// Batches to take through the entries `range` of `trunk` at once.
    pub(super) fn batches_per_load(&self, trunk: &Trunk, range: Range<usize>) -> usize {
        if trunk.has_offloaded(range) {
            self.batches_per_load.max(1)
        } else {
            1
        }
    }

    /// The held-out noised latents at the entry of `phase`.
    pub(super) fn held_out_samples(&self, phase: &Phase) -> Result<Vec<Sample>> {
        let count = self.num_held_out;
        let starts = (0..count).step_by(self.batch);
        let batches: Vec<(u64, usize)> = starts
            .enumerate()
            .map(|(index, start)| (index as u64, self.batch.min(count - start)))
            .collect();
        let mut out = Vec::new();
        for some in batches.chunks(self.batches_at_once(phase)) {
            let drawn = some.iter().map(|(index, count)| {
                let (seed, purpose, index) = (self.recipe.seed, Key::HELD_OUT, *index);
                self.held_out.draw(
                    Key {
                        seed,
                        purpose,
                        index,
                    },
                    *count,
                )
            });
            out.extend(self.samples(phase, drawn)?);
        }
        Ok(out)
    }

    /// Entries at the start that still compute what the teacher's do.
    fn untouched(&self) -> usize {
        let entries = self.student.trunk.entries();
        let touched = entries.iter().position(|(_, block)| block.has_lora());
        touched.map_or(self.shared, |touched| touched.min(self.shared))
    }

    /// Batches to take at once through the frozen blocks that a sample of `phase` needs.
    fn batches_at_once(&self, phase: &Phase) -> usize {
        let teacher = &self.teacher.trunk;
        self.batches_per_load(teacher, 0..teacher.len())
            .max(self.batches_per_load(&self.student.trunk, 0..phase.range.start))
    }

    /// Runs batches up to what the phase trains, and what it is to put out.
    fn samples(
        &self,
        phase: &Phase,
        batches: impl Iterator<Item = Result<Batch>>,
    ) -> Result<Vec<Sample>> {
        let teacher = &self.teacher.trunk;
        let (mut common, mut conditionings) = (Vec::new(), Vec::new());
        for batch in batches {
            let (stream, conditioning) = self.teacher.embed(&batch?.inputs())?;
            common.push(stream);
            conditionings.push(conditioning);
        }
        let borrowed: Vec<&Conditioning> = conditionings.iter().collect();
        let run = |trunk: &Trunk, range, streams: &mut [Stream]| {
            trunk.forward_each(range, streams, &borrowed)
        };
        let (low, shared) = (phase.range.start, self.untouched().min(phase.range.start));
        // the entries before the first that differs are computed once for both
        run(teacher, 0..shared, &mut common)?;
        let mut streams = common.clone();
        run(
            &trainables::frozen(&self.student.trunk),
            shared..low,
            &mut streams,
        )?;
        let targets: Vec<_> = match &phase.kind {
            Kind::Finetune => {
                run(teacher, shared..teacher.len(), &mut common)?;
                let ends = common.iter().zip(&conditionings);
                ends.map(|(end, conditioning)| self.teacher.head(end, conditioning))
                    .collect::<candle::Result<_>>()?
            }
            Kind::Sandwich(sandwich) => {
                match self.recipe.sandwich.target {
                    Target::Global => run(teacher, shared..sandwich.teacher.end, &mut common)?,
                    Target::Local => {
                        common.clone_from(&streams);
                        run(teacher, sandwich.teacher.clone(), &mut common)?;
                    }
                }
                common.into_iter().map(|stream| stream.tokens).collect()
            }
        };
        let samples = streams.into_iter().zip(conditionings).zip(targets);
        Ok(samples
            .map(|((stream, conditioning), target)| Sample {
                stream,
                conditioning,
                target,
            })
            .collect())
    }
}

/// The samples of a phase by their numbers, some prefetched, some kept.
pub(super) struct Samples<'a> {
    training: &'a Training<'a>,
    phase: &'a Phase,
    purpose: u64,
    /// Those that are used again and again, if that is asked for.
    kept: Vec<Option<Sample>>,
    /// The next ones, and the number of the first of them.
    prefetched: (usize, VecDeque<Sample>),
}

impl<'a> Samples<'a> {
    /// None yet, of the phase with number `purpose`.
    pub(super) fn new(training: &'a Training<'a>, phase: &'a Phase, purpose: u64) -> Self {
        let mut kept = Vec::new();
        kept.resize_with(training.recipe.data.cache, || None);
        Self {
            training,
            phase,
            purpose,
            kept,
            prefetched: (0, VecDeque::new()),
        }
    }

    /// Sample `index` of the phase. They are asked for in order.
    pub(super) fn get(&mut self, index: usize) -> Result<Cow<'_, Sample>> {
        let all = self.phase.steps * self.training.recipe.data.accumulate;
        let Some(slot) = index.checked_rem(self.kept.len()) else {
            if self.prefetched.0 != index || self.prefetched.1.is_empty() {
                self.prefetched = (index, self.make(index..all)?.into());
            }
            self.prefetched.0 += 1;
            let next = self.prefetched.1.pop_front();
            return next.map(Cow::Owned).context("a sample for every step");
        };
        if self.kept[slot].is_none() {
            let missing = self.kept[slot..].iter().take_while(|s| s.is_none()).count();
            let made = self.make(slot..slot + missing)?;
            for (place, sample) in self.kept[slot..].iter_mut().zip(made) {
                *place = Some(sample);
            }
        }
        let kept = self.kept[slot].as_ref();
        kept.map(Cow::Borrowed).context("a sample for every step")
    }

    /// The first of `range`, as many as pass through the blocks at once.
    fn make(&self, range: Range<usize>) -> Result<Vec<Sample>> {
        let training = self.training;
        let some = range.take(training.batches_at_once(self.phase));
        let drawn = some.map(|index| {
            let key = Key {
                seed: training.recipe.seed,
                purpose: self.purpose,
                index: index as u64,
            };
            training.images.draw(key, training.batch)
        });
        training.samples(self.phase, drawn)
    }
}

#[cfg(test)]
mod tests;
