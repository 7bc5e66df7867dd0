//! Batches at the entry of what is trained: drawn by number, run through the frozen blocks of pruned model and teacher.
//!
//! Where those blocks are not on the device, several batches pass through each before the next one is read. A batch
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
    /// Streams to take through the entries `range` of `trunk` together.
    pub(super) fn together(&self, trunk: &Trunk, range: Range<usize>) -> usize {
        if trunk.has_stored(range) {
            self.ahead.max(1)
        } else {
            1
        }
    }

    /// The held-out states at the entry of `phase`.
    pub(super) fn held_out_samples(&self, phase: &Phase) -> Result<Vec<Sample>> {
        let states = self.held_out_states;
        let starts = (0..states).step_by(self.batch);
        let batches: Vec<(u64, usize)> = starts
            .enumerate()
            .map(|(index, start)| (index as u64, self.batch.min(states - start)))
            .collect();
        let mut out = Vec::new();
        for some in batches.chunks(self.before(phase)) {
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

    /// Batches to take together through the frozen blocks that a sample of `phase` needs.
    fn before(&self, phase: &Phase) -> usize {
        let teacher = &self.teacher.trunk;
        self.together(teacher, 0..teacher.len())
            .max(self.together(&self.student.trunk, 0..phase.range.start))
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
            Kind::Finish => {
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

/// The samples of a phase by their numbers, some made ahead, some kept.
pub(super) struct Samples<'a> {
    training: &'a Training<'a>,
    phase: &'a Phase,
    purpose: u64,
    /// Those that are used again and again, where that is asked for.
    kept: Vec<Option<Sample>>,
    /// The next ones, and the number of the first of them.
    ahead: (usize, VecDeque<Sample>),
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
            ahead: (0, VecDeque::new()),
        }
    }

    /// Sample `index` of the phase. They are asked for in order.
    pub(super) fn get(&mut self, index: usize) -> Result<Cow<'_, Sample>> {
        let all = self.phase.steps * self.training.recipe.data.accumulate;
        let Some(slot) = index.checked_rem(self.kept.len()) else {
            if self.ahead.0 != index || self.ahead.1.is_empty() {
                self.ahead = (index, self.make(index..all)?.into());
            }
            self.ahead.0 += 1;
            let next = self.ahead.1.pop_front();
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

    /// The first of `range`, as many as pass through the blocks together.
    fn make(&self, range: Range<usize>) -> Result<Vec<Sample>> {
        let training = self.training;
        let some = range.take(training.before(self.phase));
        let drawn = some.map(|index| {
            let key = Key {
                seed: training.recipe.seed,
                purpose: self.purpose,
                index: index as u64,
            };
            training.pictures.draw(key, training.batch)
        });
        training.samples(self.phase, drawn)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use candle::{DType, Device, Shape, Tensor};
    use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
    use indicatif::ProgressBar;

    use super::*;
    use crate::{
        calibrate,
        device::Runtime,
        layout::{BlockId, BlockSpec, FluxConfig, Form, Replacement, flux_dev, unpruned},
        model::{Block, Flux},
        sample::{
            denoise::{Denoise, Encoded, LatentSize},
            noise::Generator,
            schedule::Schedule,
        },
        train::{
            Entry, Watch, data::Pictures, recipe::SandwichRecipe, sandwich::sandwiches,
            state::Saved,
        },
    };

    /// Random weights, and how often each was read.
    #[derive(Clone, Default)]
    struct Asked(Arc<Mutex<Vec<String>>>);

    impl Asked {
        fn times(&self, name: &str) -> usize {
            let names = self.0.lock().unwrap();
            names.iter().filter(|other| *other == name).count()
        }
    }

    fn random(name: &str, shape: impl Into<Shape>) -> Tensor {
        let seed = name.bytes().fold(7u64, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        let normal = Generator::new(seed).randn(shape, &Device::Cpu);
        (normal.unwrap() * 0.2).unwrap()
    }

    impl SimpleBackend for Asked {
        fn get(
            &self,
            s: Shape,
            name: &str,
            _: Init,
            _: DType,
            _: &Device,
        ) -> candle::Result<Tensor> {
            self.0.lock().unwrap().push(name.to_owned());
            Ok(random(name, s))
        }

        fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle::Result<Tensor> {
            candle::bail!("`{name}` without a shape")
        }

        fn contains_tensor(&self, name: &str) -> bool {
            !name.contains('@') // nothing is packed
        }
    }

    /// Keeps what is saved, and is killed when it was so often.
    #[derive(Default)]
    struct Killed {
        after: Option<usize>,
        saves: Vec<Saved>,
    }

    impl Watch for Killed {
        fn entry(&mut self, _: &Entry) -> Result<()> {
            Ok(())
        }

        fn phase(&mut self, _: &str, _: usize, _: usize, _: usize) {}

        fn save(&mut self, saved: &Saved) -> Result<()> {
            self.saves.push(saved.clone());
            anyhow::ensure!(Some(self.saves.len()) != self.after, "killed");
            Ok(())
        }
    }

    fn recipe(finish: usize, cache: usize) -> SandwichRecipe {
        let mut recipe = SandwichRecipe {
            steps: 6,
            evaluate_every: 2,
            ..SandwichRecipe::default()
        };
        recipe.lora.rank = Some(2);
        recipe.data.cache = cache;
        recipe.finish.steps = finish;
        recipe
    }

    fn config() -> FluxConfig {
        FluxConfig {
            in_channels: 8,
            out_channels: 8,
            hidden_size: 32,
            num_heads: 2,
            context_in_dim: 20,
            vec_in_dim: 10,
            axes_dims: vec![4, 6, 6],
            mlp_size: 96,
            layout: unpruned(1, 4),
            ..flux_dev()
        }
    }

    /// Trains a model of one double and four single blocks, of which the third one is replaced, all but the sandwich
    /// being read whenever they are run; with the number of times that the first single block was read.
    fn train(
        recipe: &SandwichRecipe,
        ahead: usize,
        saved: Option<Saved>,
        watch: &mut Killed,
    ) -> (Result<Saved>, usize) {
        let config = config();
        let asked = Asked::default();
        let weights = VarBuilder::from_backend(Box::new(asked.clone()), DType::F32, Device::Cpu);
        let teacher = Flux::stored(&config, &weights, &|_| false).unwrap();
        let mut pruned = config.clone();
        pruned.layout[3] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(2)],
            form: Form::Linear,
            joint: false,
        });
        let mut student = teacher.clone();
        let layer = Block::new(&pruned, &pruned.layout[3], &weights.pp("single_blocks.2"));
        student.trunk.entries_mut()[3] = (pruned.layout[3].clone(), layer.unwrap());
        let prompts = Encoded {
            txt: random("txt", (6, 4, config.context_in_dim)),
            vec: random("vec", (6, config.vec_in_dim)),
        };
        let size = LatentSize {
            height: 4,
            width: 6,
        };
        let runtime = Runtime {
            device: Device::Cpu,
            dtype: DType::F32,
        };
        let pictures = Pictures::new(random("img", (6, 6, 8)), prompts, size, 3.5, &runtime);
        let (pictures, held_out) = pictures.unwrap().split(2).unwrap();
        let mut training = Training {
            teacher: &teacher,
            student,
            shared: 3,
            sandwiches: sandwiches(&pruned.layout, &config.layout, &recipe.sandwich).unwrap(),
            pictures,
            held_out,
            batch: 2,
            held_out_states: 3,
            recipe,
            save_every: 1,
            recompute: true,
            ahead,
        };
        let done = training.run(saved, watch);
        (done, asked.times("single_blocks.0.linear1.weight"))
    }

    #[test]
    fn pictures_are_drawn_together_through_stored_blocks() {
        let (config, asked) = (config(), Asked::default());
        let weights = VarBuilder::from_backend(Box::new(asked.clone()), DType::F32, Device::Cpu);
        let prompts = Encoded {
            txt: random("txt", (5, 4, config.context_in_dim)),
            vec: random("vec", (5, config.vec_in_dim)),
        };
        let draw = |flux: &Flux, together: usize| {
            let denoise = Denoise {
                flux,
                dtype: DType::F32,
                device: &Device::Cpu,
                schedule: &Schedule::flux_dev(),
                steps: 3,
                guidance: 3.5,
                size: LatentSize {
                    height: 4,
                    width: 6,
                },
            };
            let hidden = ProgressBar::hidden();
            let drawn = calibrate::sample(&denoise, &prompts, 2, 2, together, 0, &hidden).unwrap();
            drawn.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let want = draw(&Flux::new(&config, weights.clone()).unwrap(), 8);
        assert!(want.iter().all(|x| x.is_finite()));
        let stored = Flux::stored(&config, &weights, &|_| false).unwrap();
        // once for the whole model, then in each of three steps for three batches, or for two and one
        for (together, reads) in [(1, 9), (2, 6), (8, 3)] {
            let before = asked.times("single_blocks.0.linear1.weight");
            assert!(draw(&stored, together) == want, "{together}");
            let after = asked.times("single_blocks.0.linear1.weight");
            assert_eq!(after - before, reads, "{together}");
        }
    }

    fn bits(saved: &Saved) -> Vec<(String, Vec<u32>)> {
        let values = saved.values.iter().map(|(name, value)| {
            let values = value.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (name.clone(), values.into_iter().map(f32::to_bits).collect())
        });
        values.collect()
    }

    #[test]
    fn a_stored_block_is_read_once_for_several_batches_which_changes_nothing() {
        for (recipe, one) in [(recipe(0, 0), 2 + 6), (recipe(0, 4), 2 + 4)] {
            let (want, reads) = train(&recipe, 1, None, &mut Killed::default());
            assert_eq!(reads, one, "two held-out batches and those of six steps");
            let want = bits(&want.unwrap());
            assert!(!want.is_empty());
            for (ahead, most) in [(2, 1 + 3), (4, 1 + 2), (64, 1 + 1)] {
                let (got, reads) = train(&recipe, ahead, None, &mut Killed::default());
                assert!(reads <= most, "{ahead}: {reads}");
                assert!(bits(&got.unwrap()) == want, "{ahead}");
            }
        }
    }

    #[test]
    fn a_run_goes_on_in_the_middle_of_batches_made_ahead() {
        let recipe = recipe(3, 0);
        let want = train(&recipe, 1, None, &mut Killed::default()).0.unwrap();
        assert_eq!(want.progress.reports.len(), 2);
        // within the sandwich, at its end, within the finish
        for after in [2, 4, 6, 7] {
            let mut killed = Killed {
                after: Some(after),
                ..Killed::default()
            };
            assert!(train(&recipe, 3, None, &mut killed).0.is_err());
            let saved = killed.saves.pop();
            let got = train(&recipe, 4, saved, &mut Killed::default()).0.unwrap();
            assert!(bits(&got) == bits(&want), "{after}");
            assert_eq!(got.progress.log, want.progress.log);
        }
    }
}
