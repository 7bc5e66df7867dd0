//! `bench`: how long steps and blocks take, beside what the machine reaches at most.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::{
    bench_growth,
    bench_inputs::{Given, kinds, random_weights, replaced, with_layers},
    init,
};
use crate::{
    checkpoint::{record, transformer_json},
    cli::BenchArgs,
    device::Runtime,
    eval::latency::{self, Effort, Machine, Peak, Timing},
    layout::{BlockKind, BlockSpec, FluxConfig},
    model::{
        Flux, Trunk, cost,
        demand::{self, Format},
        ops,
    },
    pipeline::{ModelChoice, Pipeline, defaults::MAX_TEXT_TOKENS, load},
    sample::size::{ImageSize, MAX_SIDE},
    ui,
};

/// Beyond these a number is a slip of the finger.
const LARGEST_BATCH: usize = 1024;
const MOST_SECONDS: f64 = 3600.0;

/// What is timed: a model's shape with its weights, or random ones.
pub(super) struct Subject {
    pub(super) name: String,
    pub(super) config: FluxConfig,
    /// `None`: random weights in the format that is timed.
    pipeline: Option<Pipeline>,
    size: usize,
    text: usize,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// The model, or the shape whose blocks these are.
    model: String,
    /// `step`, or the kind of block.
    what: String,
    dtype: String,
    batch: usize,
    image_tokens: usize,
    text_tokens: usize,
    /// In seconds.
    time: Timing,
    flops: u64,
    /// Weights and tokens read and written once.
    bytes: u64,
    flops_per_second: f64,
    bytes_per_second: f64,
    /// Share of the measured matrix product's speed.
    share_of_peak_flops: f64,
    /// Share of the measured copy's speed.
    share_of_peak_bytes: f64,
    /// Median of the first model's step by this one's, where there are two.
    #[serde(skip_serializing_if = "Option::is_none")]
    speed_up: Option<f64>,
}

pub(super) fn run(args: &BenchArgs) -> Result<()> {
    check_numbers(args)?;
    let subjects = subjects(args)?;
    let first = subjects.first().context("there is something to time")?;
    let sizes = match args.size.as_slice() {
        [] => vec![first.size],
        sizes => sizes.to_vec(),
    };
    let text = args.text_tokens.unwrap_or(first.text);
    let pruned = args.replaced.map(|count| first.replaced(count));
    let pruned = pruned.transpose()?;
    if let Some(output) = &args.growth {
        let dtype = args.dtype.first().copied().unwrap_or_default();
        let runtime = Runtime::resolve(args.device.device, dtype)?;
        return bench_growth::run(args, first, text, &runtime, output);
    }
    let (mut rows, mut peaks) = (Vec::new(), Vec::new());
    for dtype in &args.dtype {
        let runtime = Runtime::resolve(args.device.device, *dtype)?;
        check_memory(&subjects, &runtime)?;
        let peak = latency::peak(&runtime.device, runtime.dtype)?;
        peaks.push(json!({ "dtype": runtime.dtype.as_str(), "flops_per_second": peak.flops, "bytes_per_second": peak.bytes }));
        ui::note(format!(
            "{runtime}: a matrix product reaches {}/s, a copy {}/s",
            ui::flops(peak.flops),
            ui::bytes(peak.bytes)
        ));
        let bench = Bench {
            runtime: &runtime,
            peak,
            effort: Effort {
                warm_up: 1,
                least: 3,
                most: 1000,
                seconds: args.seconds,
            },
        };
        let mut models: Vec<(&Subject, Flux)> = subjects
            .iter()
            .map(|subject| Ok((subject, subject.load(&runtime)?)))
            .collect::<Result<_>>()?;
        if let (Some(pruned), Some((_, flux))) = (&pruned, models.first()) {
            let flux = with_layers(flux, &pruned.config, &runtime)?;
            models.push((pruned, flux));
        }
        let kinds = if args.step_only {
            None
        } else {
            Some(kinds(&first.config, &runtime)?)
        };
        for &size in &sizes {
            for &batch in &args.batch {
                let given = Given::new(&first.config, size, text, batch, &runtime)?;
                rows.extend(bench.steps(&models, &given)?);
                if let (Some((config, trunk)), Some((_, flux))) = (&kinds, models.first()) {
                    rows.extend(bench.blocks(&first.name, config, trunk, flux, &given)?);
                }
            }
        }
    }
    if args.print.json {
        return ui::json(&json!({
            "tool": record::software(),
            "machine": Machine::this(),
            "peaks": peaks,
            "rows": rows,
        }));
    }
    ui::data(table(&rows))
}

fn check_numbers(args: &BenchArgs) -> Result<()> {
    for batch in &args.batch {
        ensure!(
            (1..=LARGEST_BATCH).contains(batch),
            "--batch {batch}: expected 1 to {LARGEST_BATCH}"
        );
    }
    for size in &args.size {
        ensure!(
            (ImageSize::STEP..=MAX_SIDE).contains(size) && size.is_multiple_of(ImageSize::STEP),
            "--size {size}: expected a multiple of {} up to {}",
            ImageSize::STEP,
            MAX_SIDE
        );
    }
    if let Some(text) = args.text_tokens {
        ensure!(
            (1..=MAX_TEXT_TOKENS).contains(&text),
            "--text-tokens {text}: expected 1 to {MAX_TEXT_TOKENS}"
        );
    }
    ensure!(
        args.seconds >= 0.0 && args.seconds <= MOST_SECONDS,
        "--seconds {}: expected 0 to {MOST_SECONDS}",
        args.seconds
    );
    Ok(())
}

/// Fails before memory runs out where the weights alone do not fit into what is free.
fn check_memory(subjects: &[Subject], runtime: &Runtime) -> Result<()> {
    let bytes = |s: &Subject| demand::weights(&s.config, s.format(runtime));
    let bytes: u64 = subjects.iter().map(bytes).sum();
    let free = runtime.free_memory().unwrap_or(u64::MAX);
    ensure!(
        bytes <= free,
        "the weights take {} in {}, and {} are free\nhint: --dtype bf16 halves float32; or time a smaller --config",
        ui::bytes(bytes as f64),
        runtime.dtype.as_str(),
        ui::bytes(free as f64)
    );
    Ok(())
}

/// The model or shape, and the one beside it.
fn subjects(args: &BenchArgs) -> Result<Vec<Subject>> {
    let open = |model: Option<&String>| -> Result<Subject> {
        let pipeline = super::open(&ModelChoice {
            model: model.cloned(),
            ..ModelChoice::default()
        })?;
        Ok(Subject {
            name: pipeline.name.clone(),
            config: pipeline.config.clone(),
            size: pipeline.default_size()?,
            text: pipeline.default_text_length()?,
            pipeline: Some(pipeline),
        })
    };
    let first = match &args.config {
        None => open(args.model.as_ref())?,
        Some(name) => {
            let (config, _) = transformer_json::read(&init::read_config(name)?)?;
            Subject {
                name: format!("random {}", Path::new(name).display()),
                size: 1024,
                text: if config.guidance_embed { 512 } else { 256 },
                config,
                pipeline: None,
            }
        }
    };
    let mut out = vec![first];
    if let Some(other) = &args.against {
        let other = open(Some(other)).context("--against")?;
        let widths = |s: &Subject| {
            (
                s.config.in_channels,
                s.config.context_in_dim,
                s.config.vec_in_dim,
            )
        };
        ensure!(
            widths(&other) == widths(&out[0]),
            "--against `{}`: it does not take the same inputs as `{}` (channels, T5 and CLIP width {:?} and {:?})",
            other.name,
            out[0].name,
            widths(&other),
            widths(&out[0])
        );
        out.push(other);
    }
    Ok(out)
}

impl Subject {
    /// What a forward is computed with: weights as they are held, packed ones in fewer bytes.
    pub(super) fn format(&self, runtime: &Runtime) -> Format {
        let element = runtime.dtype.size_in_bytes();
        let weight = self.pipeline.as_ref().map_or(element as f64, |pipeline| {
            pipeline.bytes_of_a_weight(runtime.dtype)
        });
        Format {
            element: element as u64,
            weight,
            scores: ops::holds_scores(&runtime.device, runtime.dtype, self.config.head_dim()),
        }
    }

    /// This shape with `count` of its single blocks replaced.
    fn replaced(&self, count: usize) -> Result<Self> {
        let of = self.config.layout.len();
        Ok(Self {
            name: format!("{}, {count} of {of} blocks replaced", self.name),
            config: replaced(&self.config, count)?,
            pipeline: None,
            ..*self
        })
    }

    fn load(&self, runtime: &Runtime) -> Result<Flux> {
        self.load_part(&self.config, runtime)
    }

    /// A model of the first blocks of each kind.
    pub(super) fn load_part(&self, config: &FluxConfig, runtime: &Runtime) -> Result<Flux> {
        load::check_kernels(runtime);
        let random = self.pipeline.is_none();
        let random = random.then(|| random_weights(config, runtime));
        let vb = match (&self.pipeline, random.transpose()?) {
            (None, Some(random)) => random,
            (pipeline, _) => pipeline
                .as_ref()
                .context("a model or random weights")?
                .transformer
                .var_builder(runtime.dtype, &runtime.device),
        };
        Flux::new(config, vb)
            .with_context(|| format!("cannot load the transformer of `{}`", self.name))
    }
}

/// Milliseconds, where they are known.
pub(super) fn row_of_time(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |s| format!("{:.3}", 1e3 * s))
}

fn kind(spec: &BlockSpec) -> String {
    match spec {
        BlockSpec::Original(id) if id.kind == BlockKind::Double => "double".to_owned(),
        BlockSpec::Original(_) => "single".to_owned(),
        BlockSpec::Replaced(r) if r.joint => format!("{}, joint", r.form),
        BlockSpec::Replaced(r) => r.form.to_string(),
    }
}

/// What is read and written once.
struct Moved {
    /// Bytes of weights, as they are held.
    weights: u64,
    /// Values of one sample that go in and out.
    tokens: usize,
}

/// How to measure on one device in one format.
struct Bench<'a> {
    runtime: &'a Runtime,
    peak: Peak,
    effort: Effort,
}

impl Bench<'_> {
    /// Whole steps of all models, in turn.
    fn steps(&self, models: &[(&Subject, Flux)], given: &Given) -> Result<Vec<Row>> {
        let inputs = given.inputs();
        let mut works: Vec<Box<dyn FnMut() -> Result<()>>> = Vec::new();
        for (_, flux) in models {
            works.push(Box::new(|| {
                flux.forward(&inputs, &mut ())?;
                Ok(())
            }));
        }
        let mut borrowed: Vec<&mut dyn FnMut() -> Result<()>> = Vec::new();
        for work in &mut works {
            borrowed.push(work.as_mut());
        }
        let timings = latency::measure(&self.runtime.device, self.effort, &mut borrowed)?;
        let reference = timings.first().copied().unwrap_or_default();
        let rows = models.iter().zip(timings).map(|((subject, _), time)| {
            let cost = cost::model(&subject.config, given.image_tokens, given.text_tokens);
            let tokens =
                given.image_tokens * (subject.config.in_channels + subject.config.out_channels);
            let weights = demand::weights(&subject.config, subject.format(self.runtime));
            let moved = Moved { weights, tokens };
            let mut row = self.row(&subject.name, "step", given, time, cost, moved);
            row.speed_up = (models.len() > 1).then(|| reference.median / time.median);
            row
        });
        Ok(rows.collect())
    }

    /// Every kind of block on the tokens that the model's embedding gives.
    fn blocks(
        &self,
        model: &str,
        config: &FluxConfig,
        trunk: &Trunk,
        flux: &Flux,
        given: &Given,
    ) -> Result<Vec<Row>> {
        let (stream, conditioning) = flux.embed(&given.inputs())?;
        let mut rows = Vec::new();
        for (spec, block) in trunk.entries() {
            let work = &mut || {
                block.forward(&stream, &conditioning)?;
                Ok(())
            };
            let time = latency::measure(&self.runtime.device, self.effort, &mut [work])?;
            let time = time.first().copied().unwrap_or_default();
            let cost = cost::block(config, spec, given.image_tokens, given.text_tokens);
            let tokens = 2 * config.hidden_size * (given.image_tokens + given.text_tokens);
            let weights = cost.parameters * self.runtime.dtype.size_in_bytes() as u64;
            let moved = Moved { weights, tokens };
            rows.push(self.row(model, &kind(spec), given, time, cost, moved));
        }
        Ok(rows)
    }

    fn row(
        &self,
        model: &str,
        what: &str,
        given: &Given,
        time: Timing,
        cost: cost::Cost,
        moved: Moved,
    ) -> Row {
        let width = self.runtime.dtype.size_in_bytes() as u64;
        let (batch, flops) = (given.batch as u64, cost.flops() * given.batch as u64);
        let bytes = moved.weights + width * batch * moved.tokens as u64;
        let (flops_per_second, bytes_per_second) =
            (flops as f64 / time.median, bytes as f64 / time.median);
        Row {
            model: model.to_owned(),
            what: what.to_owned(),
            dtype: self.runtime.dtype.as_str().to_owned(),
            batch: given.batch,
            image_tokens: given.image_tokens,
            text_tokens: given.text_tokens,
            time,
            flops,
            bytes,
            flops_per_second,
            bytes_per_second,
            share_of_peak_flops: flops_per_second / self.peak.flops,
            share_of_peak_bytes: bytes_per_second / self.peak.bytes,
            speed_up: None,
        }
    }
}

fn table(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let t = &row.time;
            let speed_up = row
                .speed_up
                .map_or_else(String::new, |s| format!("{s:.2}x"));
            vec![
                row.model.clone(),
                row.what.clone(),
                row.dtype.clone(),
                row.batch.to_string(),
                format!("{} + {}", row.image_tokens, row.text_tokens),
                format!("{:.3}", 1e3 * t.median),
                format!("{:.3} to {:.3}", 1e3 * t.low, 1e3 * t.high),
                ui::flops(row.flops as f64),
                ui::bytes(row.bytes as f64),
                format!("{:.0} %", 100.0 * row.share_of_peak_flops),
                format!("{:.0} %", 100.0 * row.share_of_peak_bytes),
                speed_up,
            ]
        })
        .collect();
    let header = [
        "model",
        "what",
        "dtype",
        "batch",
        "tokens",
        "ms",
        "quartiles",
        "FLOPs",
        "bytes",
        "of product",
        "of copy",
        "speed",
    ];
    ui::table(&header, &cells, &[3, 4, 5, 6, 7, 8, 9, 10, 11])
}
