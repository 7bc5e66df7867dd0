//! What `train-sandwich` opens: the pruned model, its teacher, prompts, the teacher's pictures.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use candle::{Device, Tensor};
use clap::Parser;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    calibrate,
    checkpoint::{Checkpoint, Source, advise, keys, record, save},
    cli::{Cli, Command, PruneArgs, TrainArgs},
    device::Runtime,
    files::Files,
    layout::{BlockSpec, FluxConfig},
    model::{Block, Flux, Trunk},
    pipeline::{ModelChoice, Pipeline, load, prompts},
    sample::{
        denoise::{Denoise, Encoded},
        schedule::Schedule,
        size::ImageSize,
    },
    train::{data::Pictures, recipe::SandwichRecipe, state::PICTURES_STEM},
    ui,
};

/// Prompts to sample unless asked otherwise, where pictures have many tokens.
const SAMPLES_LARGE: usize = 128;
/// Share of the pictures that is held out.
const HELD_OUT_SHARE: usize = 8;
/// From the run's seed to that of the noise of its first picture. Calibration takes `seed`, `seed + 1`, … for the same
/// lists of prompts: without a distance the held-out pictures of training could be those that `prune` was fitted to.
/// Only the lower 32 bits of a seed count in drawing noise, so this is as far as two seeds can be apart.
const NOISE_OF_TRAINING: u64 = 1 << 31;
/// Tokens in one forward where the recipe names no batch.
const TOKENS_PER_FORWARD: usize = 1344;
/// Tokens in one forward of sampling.
const TOKENS_PER_SAMPLING: usize = 1536;
/// Image tokens of all held-out states where the recipe names no number, within bounds.
const HELD_OUT_TOKENS: usize = 65_536;

/// A pruned model and the model it was pruned from, checked against each other.
pub(super) struct Pair {
    pub(super) pruned: Pipeline,
    pub(super) teacher: Pipeline,
    pub(super) fingerprints: [String; 2],
}

impl Pair {
    /// Opens both; only headers and samples of tensors are read.
    pub(super) fn open(args: &TrainArgs, pruned: Pipeline) -> Result<Self> {
        let Some(record) = pruned.record.clone() else {
            bail!(
                "`{}` has nothing replaced, so there is nothing to train\nhint: make a pruned model with `fastflux prune`",
                pruned.name
            )
        };
        ensure!(
            pruned.config.replaced().next().is_some(),
            "`{}` has nothing replaced, so there is nothing to train\nhint: make a pruned model with `fastflux prune`",
            pruned.name
        );
        let teacher = match &args.teacher {
            None => pruned
                // --config is the pruned model's, whose record knows what it says of both
                .base_with(&ModelChoice {
                    config: None,
                    ..super::model_choice(&args.pipeline)
                })
                .context("the teacher\nhint: name the original model with --teacher")?,
            Some(name) => {
                let choice = ModelChoice {
                    model: Some(name.clone()),
                    ..super::model_choice(&args.pipeline)
                };
                Pipeline::open_original(&choice, Some(&record)).context("--teacher")?
            }
        };
        let found = record::fingerprint(&teacher.transformer)?;
        ensure!(
            found == record.base_fingerprint,
            "`{}` is not the model that `{}` was pruned from (fingerprint {found}, expected {})\nhint: --teacher names the original model",
            teacher.name,
            pruned.name,
            record.base_fingerprint
        );
        let sizes = |config: &FluxConfig| FluxConfig {
            layout: Vec::new(),
            ..config.clone()
        };
        ensure!(
            sizes(&teacher.config) == sizes(&pruned.config)
                && teacher
                    .config
                    .original_ids()
                    .eq(pruned.config.original_ids()),
            "`{}` and `{}` have different sizes or blocks",
            teacher.name,
            pruned.name
        );
        let fingerprints = [record::fingerprint(&pruned.transformer)?, found];
        Ok(Self {
            pruned,
            teacher,
            fingerprints,
        })
    }

    /// The unpruned model; with `offload`, its blocks are read whenever they are run.
    pub(super) fn flux(&self, offload: bool, runtime: &Runtime) -> Result<Flux> {
        if !offload {
            return load::flux(&self.teacher, runtime);
        }
        load::check_kernels(runtime);
        let vb = self
            .teacher
            .transformer
            .offloaded_var_builder(runtime.dtype, &runtime.device);
        Flux::stored(&self.teacher.config, &vb, &|_| false)
            .with_context(|| format!("cannot load the transformer of `{}`", self.teacher.name))
    }

    /// The pruned model: the teacher's blocks where the file holds the same bytes, and how many of them there are
    /// before the first other one.
    pub(super) fn student(
        &self,
        flux: &Flux,
        offload: bool,
        runtime: &Runtime,
    ) -> Result<(Flux, usize)> {
        let (ours, theirs) = (&self.pruned.transformer, &self.teacher.transformer);
        let outside = |name: &str| keys::parse(name).is_none() && !name.starts_with("final_layer.");
        for (name, source) in ours.iter().filter(|(name, _)| outside(name)) {
            ensure!(
                theirs
                    .get(name)
                    .is_some_and(|other| same(source, other).unwrap_or(false)),
                "`{}` and `{}` differ in the tensor `{name}`, which pruning leaves alone\nhint: --teacher names the original model",
                self.pruned.name,
                self.teacher.name
            );
        }
        let vb = ours.var_builder(runtime.dtype, &runtime.device);
        let config = &self.pruned.config;
        let (mut entries, mut shared, mut alike) = (Vec::new(), 0, true);
        for (spec, prefix) in config.slots() {
            let teachers = match spec {
                BlockSpec::Original(_) => self.teachers(spec, prefix.as_deref(), flux)?,
                BlockSpec::Replaced(_) => None,
            };
            alike &= teachers.is_some();
            shared += usize::from(alike);
            let block = match (teachers, &prefix) {
                (Some(block), _) => block,
                (None, Some(prefix)) if offload && matches!(spec, BlockSpec::Original(_)) => {
                    Block::stored(&Arc::new(config.clone()), spec, &vb.pp(prefix))
                }
                (None, Some(prefix)) => Block::new(config, spec, &vb.pp(prefix))?,
                (None, None) => Block::new(config, spec, &vb)?,
            };
            entries.push((spec.clone(), block));
        }
        let student = flux.with_trunk_and_head(config, Trunk::new(entries), &vb)?;
        Ok((student, shared))
    }

    /// The teacher's block of `spec`, when the pruned file holds the same weights at `prefix`.
    fn teachers(
        &self,
        spec: &BlockSpec,
        prefix: Option<&str>,
        flux: &Flux,
    ) -> Result<Option<Block>> {
        let slots = self.teacher.config.slots();
        let entry = slots.iter().position(|(other, _)| *other == spec);
        let (Some(entry), Some(prefix)) = (entry, prefix) else {
            return Ok(None);
        };
        let Some(theirs) = &slots[entry].1 else {
            return Ok(None);
        };
        let prefix = format!("{prefix}.");
        for (name, source) in self.pruned.transformer.iter() {
            let Some(tail) = name.strip_prefix(&prefix) else {
                continue;
            };
            let other = self.teacher.transformer.get(&format!("{theirs}.{tail}"));
            if !other.map_or(Ok(false), |other| same(source, other))? {
                return Ok(None);
            }
        }
        Ok(flux.trunk.entries().get(entry).map(|(_, b)| b.clone()))
    }
}

/// Prunes the bundled model at 20 % into `folder`, as `prune` does, unless an earlier run has done so.
pub(super) fn prune_bundled(args: &TrainArgs, folder: &Path) -> Result<ModelChoice> {
    if !folder.exists() {
        ui::note("pruning the bundled tiny model at 20 % first; --model names a pruned model");
        let output = folder.display().to_string();
        let words = ["fastflux", "prune", "--ratio", "0.2", "--output", &output];
        let cli = Cli::try_parse_from(words).context("cannot prune the bundled model")?;
        let Command::Prune(prune) = cli.command else {
            bail!("cannot prune the bundled model")
        };
        super::prune::make(&PruneArgs {
            run: args.run,
            memory: args.memory,
            ..prune
        })?;
    }
    Ok(ModelChoice {
        model: Some(folder.display().to_string()),
        ..super::model_choice(&args.pipeline)
    })
}

/// Bytes at each end by which tensors are compared: weights that were trained differ everywhere.
const COMPARED: usize = 4096;

/// Whether the pruned model's tensor `a` is the teacher's `b`.
fn same(a: &Source, b: &Source) -> Result<bool> {
    if a.shape() != b.shape() {
        return Ok(false);
    }
    if a.format() == b.format() {
        return Ok(a.scale() == b.scale() && a.ends(COMPARED)? == b.ends(COMPARED)?);
    }
    let equal = |a: &Source, b: &Source| {
        // what a format cannot hold is not what was written in it
        let there = b.converted(a.format(), None).ends(COMPARED);
        there.is_ok_and(|there| a.ends(COMPARED).is_ok_and(|here| here == there))
    };
    // pruning writes GGML's blocks as floats; a format that holds all numbers of another, GGUF's f32, changes none
    Ok(equal(a, b) && (b.format().dtype().is_none() || equal(b, a)))
}

/// What the recipe left open, filled in.
pub(super) struct Resolved {
    pub(super) recipe: SandwichRecipe,
    pub(super) size: ImageSize,
    pub(super) prompts: Vec<String>,
    pub(super) batch: usize,
    pub(super) held_out: usize,
}

/// The recipe with flags laid over it and everything filled in that it left open.
pub(super) fn resolve(args: &TrainArgs, teacher: &Pipeline) -> Result<Resolved> {
    let mut recipe = match &args.recipe.recipe {
        Some(path) => SandwichRecipe::read(path)?,
        None => SandwichRecipe::default(),
    };
    recipe.seed = args.seed.seed.unwrap_or(recipe.seed);
    recipe.steps = args.steps.unwrap_or(recipe.steps);
    recipe.finish.steps = args.finetune.unwrap_or(recipe.finish.steps);
    recipe.optimiser.lr = args.lr.unwrap_or(recipe.optimiser.lr);
    recipe.lora.rank = args.rank.or(recipe.lora.rank).filter(|_| !args.no_lora);
    recipe.lora.alpha = args.alpha.or(recipe.lora.alpha);
    let d = &mut recipe.data;
    d.samples = args.prompts.num_prompts.or(d.samples);
    d.batch = args.batch.or(d.batch);
    d.accumulate = args.accumulate.unwrap_or(d.accumulate);
    d.cache = args.cache.unwrap_or(d.cache);
    d.width = args.size.width.or(d.width);
    d.height = args.size.height.or(d.height);
    recipe.validate(teacher.config.hidden_size)?;
    let prompts = match &args.prompts.prompts {
        Some(path) => prompts::read("--prompts", path)?,
        None => prompts::bundled(teacher),
    };
    let size = teacher.image_size(recipe.data.width, recipe.data.height)?;
    let large = size.is_large();
    let d = &mut recipe.data;
    (d.width, d.height) = (Some(size.width), Some(size.height));
    d.steps.get_or_insert(teacher.default_steps_of_data());
    d.guidance.get_or_insert(teacher.default_guidance());
    let usual = if large { SAMPLES_LARGE } else { prompts.len() };
    let samples = *d.samples.get_or_insert(usual.max(2));
    ensure!(
        samples >= 2,
        "--num-prompts {samples}: at least two prompts are needed, one of them to be held out"
    );
    // a short list is drawn from again, with other noise
    let prompts: Vec<String> = prompts.iter().cycle().take(samples).cloned().collect();
    let text_tokens = teacher.default_text_length()?;
    let tokens = size.tokens() + text_tokens;
    let batch = *d.batch.get_or_insert((TOKENS_PER_FORWARD / tokens).max(1));
    let held_out = (HELD_OUT_TOKENS / size.tokens()).clamp(8, 192);
    let held_out = *d.held_out.get_or_insert(held_out);
    Ok(Resolved {
        recipe,
        size,
        prompts,
        batch,
        held_out,
    })
}

/// Everything that must stay the same for a saved run to go on.
pub(super) fn settings(pair: &Pair, resolved: &Resolved, runtime: &Runtime) -> Value {
    let mut hash = Sha256::new();
    for prompt in &resolved.prompts {
        hash.update(prompt);
        hash.update("\n");
    }
    let prompts: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    json!({
        "version": record::software(),
        "model": pair.fingerprints[0],
        "teacher": pair.fingerprints[1],
        "prompts": prompts,
        "recipe": resolved.recipe,
        "runtime": runtime.to_string(),
    })
}

/// The metadata key of what the teacher's pictures depend on.
const PICTURES_KEY: &str = "fastflux-pictures";

/// The teacher's pictures of all prompts: as saved in `folder` by a run of the same settings, or drawn and saved there,
/// `together` batches at a time where blocks are read.
pub(super) fn pictures(
    folder: &Path,
    pair: &Pair,
    resolved: &Resolved,
    flux: &dyn Fn() -> Result<Flux>,
    settings: &Value,
    together: usize,
    runtime: &Runtime,
) -> Result<(Flux, Pictures)> {
    let data = &resolved.recipe.data;
    let guidance = data.guidance.context("guidance is resolved")?;
    let new = |latents: Tensor, prompts: Encoded| {
        Pictures::new(latents, prompts, resolved.size.latent(), guidance, runtime)
    };
    let seed = seed_of_pictures(resolved.recipe.seed);
    // what the pictures depend on, and nothing else
    let key = json!({
        "teacher": settings["teacher"],
        "prompts": settings["prompts"],
        "runtime": settings["runtime"],
        "seed": seed,
        "steps": data.steps,
        "guidance": guidance,
        "size": [resolved.size.width, resolved.size.height],
    })
    .to_string();
    let files = Files::folder(folder);
    let path = folder.join(format!("{PICTURES_STEM}.safetensors"));
    if path.exists()
        && let Some(found) = advise(
            Checkpoint::open_if_present(&files, PICTURES_STEM),
            "delete the file to draw the pictures anew, or start over with --restart",
        )?
        && found.metadata.get(PICTURES_KEY) == Some(&key)
    {
        let tensor = |name: &str| -> Result<Tensor> {
            Ok(found.expect(name)?.tensor(&Device::Cpu)?.copy()?)
        };
        let prompts = Encoded {
            txt: tensor("txt")?,
            vec: tensor("vec")?,
        };
        return Ok((flux()?, new(tensor("latents")?, prompts)?));
    }
    let teacher = &pair.teacher;
    let encoded = load::encode_prompts(teacher, &resolved.prompts, None, runtime)?;
    let flux = flux()?;
    let schedule: Schedule = load::schedule(teacher)?;
    let denoise = Denoise {
        flux: &flux,
        dtype: runtime.dtype,
        device: &runtime.device,
        schedule: &schedule,
        steps: data.steps.context("steps are resolved")?,
        guidance,
        size: resolved.size.latent(),
    };
    let tokens = resolved.size.tokens() + encoded.txt.dim(1)?;
    let batch = (TOKENS_PER_SAMPLING / tokens).max(1);
    let progress = ui::progress(encoded.len().div_ceil(batch) * denoise.steps, "sampling");
    let channels = teacher.config.out_channels / 4;
    let latents = calibrate::sample(
        &denoise, &encoded, channels, batch, together, seed, &progress,
    )?;
    ui::done(&progress, format!("sampled {} pictures", encoded.len()));
    let mut checkpoint = Checkpoint::default();
    for (name, tensor) in [
        ("latents", &latents),
        ("txt", &encoded.txt),
        ("vec", &encoded.vec),
    ] {
        checkpoint.insert(name, Source::dense(&tensor.to_device(&Device::Cpu)?)?);
    }
    checkpoint.metadata.insert(PICTURES_KEY.to_owned(), key);
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create `{}`", folder.display()))?;
    save::write(&checkpoint, &path)?;
    Ok((flux, new(latents, encoded)?))
}

/// The seed of the first picture's noise; picture i has that of `+ i`.
fn seed_of_pictures(seed: u64) -> u64 {
    seed.wrapping_add(NOISE_OF_TRAINING)
}

/// How many of all pictures are held out.
pub(super) fn held_out_pictures(all: usize) -> usize {
    (all / HELD_OUT_SHARE).max(1)
}

/// Whether pictures have so many tokens that activations are computed again rather than kept.
pub(super) fn large(resolved: &Resolved) -> bool {
    resolved.size.is_large()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::noise::Generator;

    #[test]
    fn pictures_of_training_are_not_those_of_calibration() -> Result<()> {
        let noise = |seed| -> Result<Vec<f32>> {
            Ok(Generator::new(seed).randn(8, &Device::Cpu)?.to_vec1()?)
        };
        for seed in [0, 7, (1 << 31) - 1, u64::from(u32::MAX), u64::MAX] {
            let ours = noise(seed_of_pictures(seed))?;
            // either list may be longer than the other
            for picture in [0, 1, 639, 100_000] {
                let other = |from: u64| noise(from.wrapping_add(picture));
                assert_ne!(ours, other(seed)?, "{seed} {picture}");
                let later = seed_of_pictures(seed).wrapping_add(picture);
                assert_ne!(noise(later)?, noise(seed)?, "{seed} {picture}");
            }
            // what is compared would show it: a whole turn of 32 bits is the same noise
            assert_eq!(noise(seed)?, noise(seed.wrapping_add(1 << 32))?);
        }
        Ok(())
    }
}
