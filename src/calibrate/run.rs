//! Runs a calibration: chooses the blocks whose sums fit into memory, goes through the units, saves as it goes and picks
//! up where a killed run left off.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use candle::Tensor;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Calibrator, NoisedSplit,
    file::{self, Calibration},
    header::Header,
    held_out::HeldOut,
    journal::Journal,
    memory::{blocks_within, bytes_of_sums},
    noised::{NoisedLatents, Share},
    options::{AGAIN, ResolvedOptions},
    pass::Shard,
    sampling,
    stats::CalibrationStats,
};
use crate::{
    checkpoint::{record, target, with_hint},
    layout::{BlockId, FluxConfig},
    model::{Block, ReplacementBlock, memory::BATCHES_PER_LOAD},
    pipeline::load,
    ui,
    ui::Reporter,
};

/// Between two saves at least this many times as long as one save takes.
const SAVING_SHARE: u32 = 20;
/// Tokens for each channel below which a fit suffers visibly: at 12 its error is some 11 % above that of many more.
const ROWS_PER_CHANNEL: f64 = 12.0;

/// How a calibration is run; none of this changes the sums.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Which units.
    pub shard: Shard,
    /// Where unfinished work is kept.
    pub partial: PathBuf,
    /// How often it is saved.
    pub save_every: Duration,
    /// Whether sums are wanted, or the images alone.
    pub sums: bool,
    /// Whether more work follows: then a finished calibration that took longer than `save_every` is saved there too.
    pub more: bool,
}

/// Where unfinished work on `output` is kept: `stats.safetensors.partial`.
fn partial(output: &Path) -> PathBuf {
    // by its components: `pruned/` too is saved next to the folder, not in it
    let mut name = output.components().as_path().as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Goes through the units of `options.shard` that are not done yet.
fn run(calibrator: &Calibrator, options: &RunOptions) -> Result<Calibration> {
    let config = &calibrator.pipeline.config;
    let path = &options.partial;
    let mut pass = calibrator.pass()?;
    if !options.sums {
        pass.noise_levels_per_image = 0.0;
    }
    let mut header = header(calibrator, pass.units())?;
    let mut out = if path.exists() {
        let restart = "delete the file to start again";
        let (_, before) = with_hint(file::open(path), restart)?;
        header.products.clone_from(&before.products); // chosen by the run that began
        if let Some(difference) = header.difference(&before)? {
            bail!(
                "`{}` is unfinished work with other options ({difference})\nhint: give the same options to go on, or delete the file to start again",
                path.display()
            );
        }
        if before.products.is_empty() == options.sums {
            bail!(
                "`{}` is unfinished work of another kind\nhint: delete the file to start again",
                path.display()
            );
        }
        let read = with_hint(Calibration::read(path, &calibrator.runtime.device), restart)?;
        calibrator.pipeline.reporter.note(format!(
            "going on from `{}`: {} of {} units are done",
            path.display(),
            read.header.done.len(),
            header.units
        ));
        read
    } else {
        calibrator.probe()?;
        if options.sums {
            header.products = products(calibrator)?;
        }
        Calibration::new(header, &config.layout)
    };
    let todo: Vec<usize> = (0..pass.units())
        .filter(|unit| options.shard.has(*unit) && !out.header.done.contains(unit))
        .collect();
    let forwards = todo.iter().map(|unit| pass.forwards_of(*unit)).sum();
    let progress = calibrator
        .pipeline
        .reporter
        .progress(forwards, "calibrating");
    let begun = Instant::now();
    let (mut last, mut cost) = (Instant::now(), Duration::ZERO);
    for (position, unit) in todo.iter().enumerate() {
        let images = pass.run(*unit, &mut out.stats, &progress)?;
        out.images.insert(*unit, images);
        out.header.done.insert(*unit);
        let due = last.elapsed() >= options.save_every.max(cost * SAVING_SHARE);
        let last_one = position + 1 == todo.len();
        let finished = last_one && options.more && begun.elapsed() >= options.save_every;
        if finished || due && !last_one {
            let start = Instant::now();
            if let Err(error) = out.write(path) {
                // the output may fit all the same, and all that was computed is in memory
                calibrator
                    .pipeline
                    .reporter
                    .warn(format!("unfinished work is not saved: {error:#}"));
            }
            (last, cost) = (Instant::now(), start.elapsed());
        }
    }
    let seen = out.stats.blocks.iter().any(|b| b.moments().tokens > 0.0);
    let what = match (options.sums, calibrator.options.recipe.source) {
        _ if todo.is_empty() => "nothing was left to calibrate".to_owned(),
        (true, _) if !seen => {
            "this shard holds only held-out images; nothing to accumulate".to_owned()
        }
        (true, _) if options.shard != Shard::WHOLE => {
            let done = out.header.done.len();
            format!("calibrated {done} of {} units", out.header.units)
        }
        (true, _) => format!(
            "calibrated on {}",
            ui::counted(pass.num_noised(), "noised latent")
        ),
        (false, _) => format!(
            "sampled {}",
            ui::counted(calibrator.options.prompts.len(), "image")
        ),
    };
    calibrator.pipeline.reporter.done(&progress, what);
    load::check_kernels(calibrator.runtime, &calibrator.pipeline.reporter);
    if options.sums && out.header.is_complete() {
        warn_of_few_rows(&out.stats, config, &calibrator.pipeline.reporter);
    }
    Ok(out)
}

fn header(calibrator: &Calibrator, units: usize) -> Result<Header> {
    let ResolvedOptions {
        recipe,
        prompts,
        num_prompts,
        ..
    } = &calibrator.options;
    Ok(Header {
        version: Header::VERSION,
        model: record::fingerprint(&calibrator.pipeline.transformer)?,
        model_name: calibrator.pipeline.public_name_with_lora(),
        runtime: calibrator.runtime.to_string(),
        recipe: recipe.clone(),
        prompts: prompts.clone(),
        num_prompts: *num_prompts,
        products: Vec::new(),
        units,
        done: BTreeSet::new(),
    })
}

/// Says when a fit will have little to go by; the ridge keeps it sane.
fn warn_of_few_rows(stats: &CalibrationStats, config: &FluxConfig, reporter: &Reporter) {
    let per_channel = stats.fewest_rows() / config.hidden_size as f64;
    if per_channel < ROWS_PER_CHANNEL {
        reporter.warn(format!(
            "{per_channel:.1} tokens for each of {} channels are few: fits get better up to about {ROWS_PER_CHANNEL} and more\nhint: raise --num-prompts",
            config.hidden_size
        ));
    }
}

/// Images that the first, cheap choice of candidates looks at.
const CHEAP_IMAGES: usize = 4;

/// The blocks whose sums are kept: all if they fit, otherwise those whose removal changes the velocity least.
fn products(calibrator: &Calibrator) -> Result<Vec<BlockId>> {
    let config = &calibrator.pipeline.config;
    let all = config.kept_ids();
    let count = blocks_within(config, calibrator.stats_memory);
    if count >= all.len() {
        return Ok(all);
    }
    let importance = removal(calibrator)?;
    let mut order = all;
    order.sort_by(|a, b| {
        let of = |id: &BlockId| {
            importance
                .iter()
                .find(|(i, _)| i == id)
                .map_or(0.0, |x| x.1)
        };
        of(a).total_cmp(&of(b))
    });
    calibrator.pipeline.reporter.note(format!(
        "the sums of {} blocks take {}, for which there is no room: keeping those of the {count} blocks whose removal costs least (see --stats-memory)",
        order.len(),
        ui::bytes(order.len() as f64 * bytes_of_sums(config) as f64)
    ));
    order.truncate(count);
    order.sort();
    Ok(order)
}

/// The velocity error of removing each block alone, on a few noised images: half a forward for each block and state.
fn removal(calibrator: &Calibrator) -> Result<Vec<(BlockId, f64)>> {
    let pass = calibrator.pass()?;
    let count = CHEAP_IMAGES.min(calibrator.options.num_prompts);
    let prompts = pass.prompts.range(0..count)?;
    let images: Tensor = match pass.images {
        Some(images) => images.narrow(0, 0, count)?,
        None => {
            let progress = calibrator
                .pipeline
                .reporter
                .progress(pass.denoise.steps * count.div_ceil(pass.batch), "sampling");
            let (denoise, seed) = (&pass.denoise, pass.seed);
            sampling::sample(
                denoise,
                &prompts,
                pass.channels,
                pass.batch,
                BATCHES_PER_LOAD,
                seed,
                &progress,
            )?
        }
    };
    let share = Share {
        first: 0,
        of: count,
        num_noised: count,
    };
    let (size, guidance) = (pass.denoise.size, pass.denoise.guidance);
    let noised = NoisedLatents::share(images, prompts, share, size, guidance, pass.seed)?
        .with_levels(pass.levels.clone());
    let runtime = calibrator.runtime;
    let held_out = HeldOut::new(
        &calibrator.flux,
        &noised,
        pass.batch,
        &runtime.device,
        runtime.dtype,
    )?;
    let trunk = &calibrator.flux.trunk;
    let candidates = (0..trunk.len()).map(|index| (index, Block::from(ReplacementBlock::Remove)));
    let progress = calibrator
        .pipeline
        .reporter
        .progress(trunk.len() * held_out.batches(), "choosing candidates");
    let errors = held_out.ablate(
        &calibrator.flux,
        trunk,
        &candidates.collect(),
        "removal",
        &progress,
    )?;
    calibrator
        .pipeline
        .reporter
        .done(&progress, "chose candidates by removing each block");
    let id = |index: usize| trunk.entries().get(index).map(|(spec, _)| spec.id());
    Ok(errors
        .into_iter()
        .filter_map(|(index, error)| Some((id(index)?, error)))
        .collect())
}

impl RunOptions {
    /// Those of a command that calibrates for `output` on the way.
    pub fn for_output(output: &Path, save_every: Duration) -> Self {
        let options = Self {
            shard: Shard::WHOLE,
            partial: partial(output),
            save_every,
            sums: true,
            more: true,
        };
        target::resumes_from(&options.partial);
        target::resumes_from(&options.journal());
        options
    }

    /// The folder that unfinished work is kept in: on the disk that the output goes to, so with room.
    pub fn folder(&self) -> &Path {
        match self.partial.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        }
    }

    /// Where the comparison of candidates is kept while it is unfinished: `scores.json.partial.json`.
    fn journal(&self) -> PathBuf {
        let mut name = self.partial.as_os_str().to_owned();
        name.push(".json");
        name.into()
    }

    /// Removes unfinished work that is finished now.
    ///
    /// # Errors
    /// When a file is there and cannot be removed.
    pub fn remove_partial(&self) -> Result<()> {
        for path in [&self.partial, &self.journal()] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("cannot remove `{}`", path.display()))?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Calibrator<'_> {
    /// Calibrates: what an earlier, killed run of the same options saved is not done again.
    ///
    /// # Errors
    /// When unfinished work of another kind is in the way, a forward fails, or a disk is full.
    pub fn run(&self, options: &RunOptions) -> Result<Calibration> {
        run(self, options)
    }

    /// The part of `noised` that blocks are compared on with the unpruned model's velocity on it; comparisons are saved as they go.
    /// `settings` say what they depend on besides the calibration.
    ///
    /// # Errors
    /// As [`Self::compared`]; when unfinished work of another kind is in the way.
    pub fn compared_in(
        &self,
        run: &RunOptions,
        noised: &NoisedSplit,
        settings: &Value,
    ) -> Result<HeldOut> {
        let options = &self.options;
        let settings = json!({
            "calibration": serde_json::to_value(header(self, 0)?)?,
            "held_out": options.compared,
            "settings": settings,
        });
        let hash = Sha256::digest(settings.to_string());
        let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        let (path, reporter) = (run.journal(), &self.pipeline.reporter);
        let journal = Journal::open(&path, hash, run.save_every, reporter)?;
        Ok(self.compared(noised)?.with_journal(Some(journal)))
    }

    /// The calibration that was made before, if the options name one, otherwise one made now.
    ///
    /// # Errors
    /// As [`Self::run`]; when the file is damaged or holds images of another model.
    pub fn load_or_run(&self, options: &RunOptions) -> Result<Calibration> {
        let Some(path) = &self.options.stats else {
            return self.run(options);
        };
        let calibration = with_hint(Calibration::open(path), AGAIN).context("--stats")?;
        let channels = self.pipeline.config.out_channels;
        for images in calibration.images.values() {
            let found = images.dims().last().copied().unwrap_or(0);
            ensure!(
                found == channels,
                "--stats: `{}` holds images of {found} channels, this model's have {channels}\nhint: run `fastflux calibrate` on this model",
                path.display()
            );
        }
        warn_of_few_rows(
            &calibration.stats,
            &self.pipeline.config,
            &self.pipeline.reporter,
        );
        Ok(calibration)
    }
}
