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
        Entry, TrainObserver, data::Images, recipe::SandwichRecipe, sandwich::sandwiches,
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
    fn get(&self, s: Shape, name: &str, _: Init, _: DType, _: &Device) -> candle::Result<Tensor> {
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

impl TrainObserver for Killed {
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

fn recipe(finetune: usize, cache: usize) -> SandwichRecipe {
    let mut recipe = SandwichRecipe {
        steps: 6,
        evaluate_every: 2,
        ..SandwichRecipe::default()
    };
    recipe.lora.rank = Some(2);
    recipe.data.cache = cache;
    recipe.finetune.steps = finetune;
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
    batches_per_load: usize,
    saved: Option<Saved>,
    observer: &mut Killed,
) -> (Result<Saved>, usize) {
    let config = config();
    let asked = Asked::default();
    let weights = VarBuilder::from_backend(Box::new(asked.clone()), DType::F32, Device::Cpu);
    let teacher = Flux::offloaded(&config, &weights, &|_| false).unwrap();
    let mut pruned = config.clone();
    pruned.layout[3] = BlockSpec::Replaced(Replacement {
        replaces: vec![BlockId::single(2)],
        form: Form::Linear,
        joint: false,
    });
    let mut student = teacher.clone();
    let layer = Block::new(&pruned, &pruned.layout[3], &weights.pp("single_blocks.2"));
    student.trunk.entries_mut()[3] = (pruned.layout[3].clone(), layer.unwrap());
    let prompts = Encoded::new(
        random("txt", (6, 4, config.context_in_dim)),
        random("vec", (6, config.vec_in_dim)),
    );
    let size = LatentSize {
        height: 4,
        width: 6,
        family: crate::layout::Family::FLUX1,
    };
    let runtime = Runtime {
        device: Device::Cpu,
        dtype: DType::F32,
    };
    let images = Images::new(random("img", (6, 6, 8)), prompts, size, 3.5, &runtime);
    let (images, held_out) = images.unwrap().split(2).unwrap();
    let mut training = Training {
        teacher: &teacher,
        student,
        shared: 3,
        sandwiches: sandwiches(&pruned.layout, &config.layout, &recipe.sandwich).unwrap(),
        images,
        held_out,
        batch: 2,
        num_held_out: 3,
        recipe,
        save_every: 1,
        gradient_checkpointing: true,
        batches_per_load,
    };
    let done = training.run(saved, observer);
    (done, asked.times("single_blocks.0.linear1.weight"))
}

#[test]
fn images_are_sampled_together_through_stored_blocks() {
    let (config, asked) = (config(), Asked::default());
    let weights = VarBuilder::from_backend(Box::new(asked.clone()), DType::F32, Device::Cpu);
    let prompts = Encoded::new(
        random("txt", (5, 4, config.context_in_dim)),
        random("vec", (5, config.vec_in_dim)),
    );
    let draw = |flux: &Flux, together: usize| {
        let denoise = Denoise {
            flux,
            dtype: DType::F32,
            device: &Device::Cpu,
            schedule: &Schedule::flux_dev(),
            steps: 3,
            guidance: 3.5,
            cfg_scale: 1.0,
            size: LatentSize {
                height: 4,
                width: 6,
                family: crate::layout::Family::FLUX1,
            },
        };
        let hidden = ProgressBar::hidden();
        let drawn = calibrate::sample(&denoise, &prompts, 2, 2, together, 0, &hidden).unwrap();
        drawn.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let want = draw(&Flux::new(&config, weights.clone()).unwrap(), 8);
    assert!(want.iter().all(|x| x.is_finite()));
    let stored = Flux::offloaded(&config, &weights, &|_| false).unwrap();
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
        for (batches, most) in [(2, 1 + 3), (4, 1 + 2), (64, 1 + 1)] {
            let (got, reads) = train(&recipe, batches, None, &mut Killed::default());
            assert!(reads <= most, "{batches}: {reads}");
            assert!(bits(&got.unwrap()) == want, "{batches}");
        }
    }
}

#[test]
fn a_run_goes_on_in_the_middle_of_prefetched_batches() {
    let recipe = recipe(3, 0);
    let want = train(&recipe, 1, None, &mut Killed::default()).0.unwrap();
    assert_eq!(want.progress.reports.len(), 2);
    // within the sandwich, at its end, within the finetuning
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
