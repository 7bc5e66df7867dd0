//! Carries out the calibration of a session: chooses the blocks whose sums fit into memory, goes through the units,
//! saves as it goes and picks up where a killed run left off.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use candle::Tensor;

use super::session::{Session, Settings};
use crate::{
    calibrate::{
        file::{self, Calibration, Header},
        pass::Shard,
        states::{Share, States},
        stats::CalibrationStats,
    },
    checkpoint::{advise, record},
    layout::{BlockId, FluxConfig},
    model::{Block, ReplacementBlock, memory::BATCHES_PER_LOAD},
    pipeline::{
        Pipeline,
        placement::{Activity, MemoryBudget},
    },
    prune::plan::originals,
    score::ablation::HeldOut,
    ui,
};

/// Between two saves at least this many times as long as one save takes.
const SAVING_SHARE: u32 = 20;
/// Tokens for each channel below which a fit suffers visibly: at 12 its error is some 11 % above that of many more.
const ROWS_PER_CHANNEL: f64 = 12.0;

/// How a calibration is carried out; none of this changes the sums.
#[derive(Clone, Debug)]
pub(super) struct Gathering {
    /// Which units.
    pub(super) shard: Shard,
    /// Where unfinished work is kept.
    pub(super) partial: PathBuf,
    /// How often it is saved.
    pub(super) save_every: Duration,
    /// Whether sums are wanted, or the pictures alone.
    pub(super) sums: bool,
    /// Whether more work follows: then a finished calibration that took longer than `save_every` is saved there too.
    pub(super) more: bool,
}

/// What to do about a statistics file that is damaged.
pub(super) const AGAIN: &str = "make it again with `fastflux calibrate`";

/// Where unfinished work on `output` is kept: `stats.safetensors.partial`.
pub(super) fn partial(output: &Path) -> PathBuf {
    // by its components: `pruned/` too is saved beside the folder, not in it
    let mut name = output.components().as_path().as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Bytes of the sums of one block: ZᵀZ and ZᵀR of both streams, in f64.
pub(super) fn bytes_of_sums(config: &FluxConfig) -> u64 {
    let d = config.hidden_size as u64;
    2 * 8 * (d + 1) * (2 * d + 1)
}

/// How many blocks' sums fit into `memory`, at least one.
pub(super) fn blocks_within(config: &FluxConfig, memory: Option<u64>) -> usize {
    let all = originals(config).len();
    let fit = memory.map_or(all, |bytes| (bytes / bytes_of_sums(config)) as usize);
    fit.clamp(1, all.max(1))
}

/// Bytes of the sums that are kept where there is room for `memory` bytes of them; 0 where nobody says.
pub(super) fn bytes_of_kept(config: &FluxConfig, memory: Option<u64>) -> u64 {
    memory.map_or(0, |bytes| {
        blocks_within(config, Some(bytes)) as u64 * bytes_of_sums(config)
    })
}

/// What is on the device during a calibration beside the blocks, and the bytes that its sums may take: `given` ones, or
/// half of what is left; the other half is for solving.
pub(super) fn need(
    pipeline: &Pipeline,
    place: &MemoryBudget,
    settings: &Settings,
    given: Option<u64>,
) -> (Activity, Option<u64>) {
    let config = &pipeline.config;
    let (batch, tokens) = (
        settings.batch,
        settings.size.tokens() + settings.text_tokens,
    );
    // one stream of one block in f32 (f64 on the CPU), its change, and the fresh products beside the sums
    let wide = if place.on_cpu() { 8 } else { 4 };
    let stream = (batch * tokens * config.hidden_size) as u64;
    // and, at other times, candidates that are scored together, pictures that are drawn together
    let waiting = place.waiting(config, batch, tokens);
    let mut need = Activity {
        batch,
        tokens,
        extra_bytes: (2 * stream * wide).max(waiting) + bytes_of_sums(config),
    };
    let sums = given.or_else(|| Some(place.headroom(config, need)? / 2));
    let kept = blocks_within(config, sums) as u64 * bytes_of_sums(config);
    // layers and solver are on the host
    need.extra_bytes += if place.on_cpu() { 2 * kept } else { kept };
    (need, sums)
}

/// Goes through the units of `gathering.shard` that are not done yet.
pub(super) fn gather(session: &Session, gathering: &Gathering) -> Result<Calibration> {
    let config = &session.pipeline.config;
    let path = &gathering.partial;
    let mut pass = session.pass()?;
    if !gathering.sums {
        pass.draws = 0.0;
    }
    let mut header = header(session, pass.units())?;
    let mut out = if path.exists() {
        let anew = "delete the file to start anew";
        let (_, before) = advise(file::open(path), anew)?;
        header.products.clone_from(&before.products); // chosen by the run that began
        if let Some(difference) = header.difference(&before)? {
            bail!(
                "`{}` is unfinished work with other settings ({difference})\nhint: give the same settings to go on, or delete the file to start anew",
                path.display()
            );
        }
        if before.products.is_empty() == gathering.sums {
            bail!(
                "`{}` is unfinished work of another kind\nhint: delete the file to start anew",
                path.display()
            );
        }
        let read = advise(Calibration::read(path, &session.runtime.device), anew)?;
        ui::note(format!(
            "going on from `{}`: {} of {} units are done",
            path.display(),
            read.header.done.len(),
            header.units
        ));
        read
    } else {
        session.probe()?;
        if gathering.sums {
            header.products = products(session)?;
        }
        Calibration::new(header, &config.layout)
    };
    let todo: Vec<usize> = (0..pass.units())
        .filter(|unit| gathering.shard.has(*unit) && !out.header.done.contains(unit))
        .collect();
    let forwards = todo.iter().map(|unit| pass.forwards_of(*unit)).sum();
    let progress = ui::progress(forwards, "calibrating");
    let begun = Instant::now();
    let (mut last, mut cost) = (Instant::now(), Duration::ZERO);
    for (position, unit) in todo.iter().enumerate() {
        let pictures = pass.run(*unit, &mut out.stats, &progress)?;
        out.pictures.insert(*unit, pictures);
        out.header.done.insert(*unit);
        let due = last.elapsed() >= gathering.save_every.max(cost * SAVING_SHARE);
        let last_one = position + 1 == todo.len();
        let finished = last_one && gathering.more && begun.elapsed() >= gathering.save_every;
        if finished || due && !last_one {
            let start = Instant::now();
            out.write(path, true)?;
            (last, cost) = (Instant::now(), start.elapsed());
        }
    }
    let seen = out.stats.blocks.iter().any(|b| b.moments().tokens > 0.0);
    let what = match (gathering.sums, session.settings.recipe.source) {
        _ if todo.is_empty() => "nothing was left to calibrate".to_owned(),
        (true, _) if !seen => "pictures to compare by are there".to_owned(),
        (true, _) if gathering.shard != Shard::WHOLE => {
            let done = out.header.done.len();
            format!("calibrated {done} of {} units", out.header.units)
        }
        (true, source) => format!("calibrated on {} states ({source})", pass.states()),
        (false, _) => format!("sampled {} pictures", session.settings.prompts.len()),
    };
    ui::done(&progress, what);
    if gathering.sums && out.header.is_complete() {
        warn_of_few_rows(&out.stats, config);
    }
    Ok(out)
}

fn header(session: &Session, units: usize) -> Result<Header> {
    let Settings {
        recipe,
        prompts,
        samples,
        ..
    } = &session.settings;
    Ok(Header {
        version: Header::VERSION,
        model: record::fingerprint(&session.pipeline.transformer)?,
        model_name: session.pipeline.name.clone(),
        runtime: session.runtime.to_string(),
        recipe: recipe.clone(),
        prompts: prompts.clone(),
        samples: *samples,
        products: Vec::new(),
        units,
        done: BTreeSet::new(),
    })
}

/// Says when a fit will have little to go by; the ridge keeps it sane.
pub(super) fn warn_of_few_rows(stats: &CalibrationStats, config: &FluxConfig) {
    let per_channel = stats.fewest_rows() / config.hidden_size as f64;
    if per_channel < ROWS_PER_CHANNEL {
        ui::warn(format!(
            "{per_channel:.1} tokens for each of {} channels are few: fits get better up to about {ROWS_PER_CHANNEL} and more\nhint: raise --num-prompts",
            config.hidden_size
        ));
    }
}

/// Pictures that the first, cheap choice of candidates looks at.
const CHEAP_PICTURES: usize = 4;

/// The blocks whose sums are kept: all where they fit, otherwise those whose removal changes the velocity least.
fn products(session: &Session) -> Result<Vec<BlockId>> {
    let config = &session.pipeline.config;
    let all = originals(config);
    let count = blocks_within(config, session.sums);
    if count >= all.len() {
        return Ok(all);
    }
    let importance = removal(session)?;
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
    ui::note(format!(
        "the sums of {} blocks take {}, for which there is no room: keeping those of the {count} blocks whose removal costs least (see --stats-memory)",
        order.len(),
        ui::bytes(order.len() as f64 * bytes_of_sums(config) as f64)
    ));
    order.truncate(count);
    order.sort();
    Ok(order)
}

/// The velocity error of removing each block alone, on a few noised pictures: half a forward for each block and state.
fn removal(session: &Session) -> Result<Vec<(BlockId, f64)>> {
    let pass = session.pass()?;
    let count = CHEAP_PICTURES.min(session.settings.samples);
    let prompts = pass.prompts.range(0..count)?;
    let pictures: Tensor = match pass.images {
        Some(images) => images.narrow(0, 0, count)?,
        None => {
            let progress =
                ui::progress(pass.denoise.steps * count.div_ceil(pass.batch), "sampling");
            let (denoise, seed) = (&pass.denoise, pass.seed);
            crate::calibrate::sample(
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
        states: count,
    };
    let (size, guidance) = (pass.denoise.size, pass.denoise.guidance);
    let states = States::share(pictures, prompts, share, size, guidance, pass.seed)?;
    let runtime = session.runtime;
    let held_out = HeldOut::new(
        &session.flux,
        &states,
        pass.batch,
        &runtime.device,
        runtime.dtype,
    )?;
    let trunk = &session.flux.trunk;
    let candidates = (0..trunk.len()).map(|index| (index, Block::from(ReplacementBlock::Remove)));
    let progress = ui::progress(trunk.len() * held_out.batches(), "choosing candidates");
    let errors = held_out.ablate(&session.flux, trunk, &candidates.collect(), &progress)?;
    ui::done(&progress, "chose candidates by removing each block");
    let id = |index: usize| trunk.entries().get(index).map(|(spec, _)| spec.id());
    Ok(errors
        .into_iter()
        .filter_map(|(index, error)| Some((id(index)?, error)))
        .collect())
}

/// The calibration of `stats` where it is given, otherwise one made now.
pub(super) fn obtain(
    session: &Session,
    stats: Option<&Path>,
    gathering: &Gathering,
) -> Result<Calibration> {
    match stats {
        Some(path) => {
            let calibration = advise(Calibration::open(path), AGAIN).context("--stats")?;
            let pictures = calibration.pictures.values();
            let channels = session.pipeline.config.out_channels;
            for pictures in pictures {
                let found = pictures.dims().last().copied().unwrap_or(0);
                anyhow::ensure!(
                    found == channels,
                    "--stats: `{}` holds pictures of {found} channels, this model's have {channels}\nhint: run `fastflux calibrate` on this model",
                    path.display()
                );
            }
            Ok(calibration)
        }
        None => gather(session, gathering),
    }
}

/// The header of a complete calibration of this model.
pub(super) fn read_header(pipeline: &Pipeline, path: &Path) -> Result<Header> {
    let name = path.display();
    let (_, header) = advise(file::open(path), AGAIN).context("--stats")?;
    let found = record::fingerprint(&pipeline.transformer)?;
    anyhow::ensure!(
        header.model == found,
        "--stats `{name}`: the statistics are of another model (`{}`, fingerprint {}; this one has {found})\nhint: run `fastflux calibrate` on this model",
        header.model_name,
        header.model
    );
    anyhow::ensure!(
        header.is_complete(),
        "--stats `{name}` holds {} of {} units\nhint: add the other shards with `fastflux merge-stats`",
        header.done.len(),
        header.units
    );
    Ok(header)
}
