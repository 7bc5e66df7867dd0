//! Times whole transformer steps and each kind of block, next to what the machine reaches at most.

use anyhow::{Context, Result, ensure};

pub mod doctor;
pub mod inputs;
mod report;
pub mod subject;
pub mod timing;

use inputs::{StepInputs, one_of_each_kind, with_layers};
use report::kind;
pub use report::{PeakRow, Report, Row};
pub use subject::Subject;
use timing::{Effort, Machine, MemoryWatch, Peak, Timing};

use crate::{
    checkpoint::record,
    device::{DTypeChoice, DeviceChoice, Runtime},
    layout::FluxConfig,
    model::{Flux, Trunk, cost, memory},
    pipeline::defaults::MAX_TEXT_TOKENS,
    sample::size::{ImageSize, MAX_SIDE},
    ui::{self, Reporter},
};

/// Beyond these a number is a slip of the finger.
const MAX_BATCH: usize = 1024;
const MAX_SECONDS: f64 = 3600.0;

/// What to time, and how long.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Sides of square images, in pixels; empty: the first subject's own.
    pub sizes: Vec<usize>,
    /// Images in one forward.
    pub batches: Vec<usize>,
    /// Text tokens; `None`: the first subject's own.
    pub text_tokens: Option<usize>,
    /// Number formats.
    pub dtypes: Vec<DTypeChoice>,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Each row is measured for about this long, in seconds.
    pub seconds: f64,
    /// Whole steps only, no blocks.
    pub step_only: bool,
    /// Also the first subject with this many of its single blocks replaced.
    pub replaced: Option<usize>,
    /// Who is told what is timed.
    pub reporter: Reporter,
}

impl BenchOptions {
    /// Fails at a number out of range.
    ///
    /// # Errors
    /// The message names the flag.
    pub fn validate(&self) -> Result<()> {
        for batch in &self.batches {
            ensure!(
                (1..=MAX_BATCH).contains(batch),
                "--batch {batch}: expected 1 to {MAX_BATCH}"
            );
        }
        for size in &self.sizes {
            ensure!(
                (ImageSize::STEP..=MAX_SIDE).contains(size) && size.is_multiple_of(ImageSize::STEP),
                "--size {size}: expected a multiple of {} up to {}",
                ImageSize::STEP,
                MAX_SIDE
            );
        }
        if let Some(text) = self.text_tokens {
            ensure!(
                (1..=MAX_TEXT_TOKENS).contains(&text),
                "--text-tokens {text}: expected 1 to {MAX_TEXT_TOKENS}"
            );
        }
        ensure!(
            self.seconds >= 0.0 && self.seconds <= MAX_SECONDS,
            "--seconds {}: expected 0 to {MAX_SECONDS}",
            self.seconds
        );
        Ok(())
    }
}

/// Times every number format, size and batch of `options`.
///
/// # Errors
/// When an option is out of range, the weights do not fit into memory, or a forward fails.
pub fn run(options: &BenchOptions, subjects: &[Subject]) -> Result<Report> {
    options.validate()?;
    let first = subjects.first().context("no model to time")?;
    let sizes = match options.sizes.as_slice() {
        [] => &[first.default_size],
        sizes => sizes,
    };
    let text_tokens = options.text_tokens.unwrap_or(first.default_text_tokens);
    let pruned = options.replaced.map(|count| first.replaced(count));
    let pruned = pruned.transpose()?;
    let mut report = Report {
        tool: record::software(),
        machine: Machine::this(),
        peaks: Vec::new(),
        rows: Vec::new(),
    };
    for dtype in &options.dtypes {
        let runtime = Runtime::resolve(options.device, *dtype)?;
        subject::check_memory(subjects, &runtime)?;
        let peak = timing::peak(&runtime.device, runtime.dtype)?;
        report.peaks.push(PeakRow {
            dtype: runtime.dtype.as_str().to_owned(),
            flops_per_second: peak.flops,
            bytes_per_second: peak.bytes,
        });
        options.reporter.note(format!(
            "{runtime}: a matrix product reaches {}/s, a copy {}/s",
            ui::flops(peak.flops),
            ui::bytes(peak.bytes)
        ));
        let bench = Bench {
            runtime: &runtime,
            peak,
            effort: Effort {
                warm_up: 1,
                min_runs: 3,
                max_runs: 1000,
                seconds: options.seconds,
            },
        };
        let mut models: Vec<(&Subject, Flux)> = subjects
            .iter()
            .map(|subject| Ok((subject, subject.load(&runtime, &options.reporter)?)))
            .collect::<Result<_>>()?;
        if let (Some(pruned), Some((_, flux))) = (&pruned, models.first()) {
            let flux = with_layers(flux, &pruned.config, &runtime)?;
            models.push((pruned, flux));
        }
        let kinds = if options.step_only {
            None
        } else {
            Some(one_of_each_kind(&first.config, &runtime)?)
        };
        for &size in sizes {
            for &batch in &options.batches {
                let inputs = StepInputs::new(&first.config, size, text_tokens, batch, &runtime)?;
                report.rows.extend(bench.steps(&models, &inputs)?);
                if let (Some((config, trunk)), Some((_, flux))) = (&kinds, models.first()) {
                    let rows = bench.blocks(&first.name, config, trunk, flux, &inputs)?;
                    report.rows.extend(rows);
                }
            }
        }
    }
    Ok(report)
}

/// What is read and written once.
struct Moved {
    /// Bytes of weights, as they are held.
    weights: u64,
    /// Values of one sample that go in and out.
    tokens: usize,
}

/// How to measure on one device in one number format.
struct Bench<'a> {
    runtime: &'a Runtime,
    peak: Peak,
    effort: Effort,
}

impl Bench<'_> {
    /// Whole steps of all models, in turn.
    fn steps(&self, models: &[(&Subject, Flux)], inputs: &StepInputs) -> Result<Vec<Row>> {
        let model_inputs = inputs.model_inputs();
        let mut works: Vec<Box<dyn FnMut() -> Result<()>>> = Vec::new();
        for (_, flux) in models {
            works.push(Box::new(|| {
                flux.forward(&model_inputs, &mut ())?;
                Ok(())
            }));
        }
        let mut borrowed: Vec<&mut dyn FnMut() -> Result<()>> = Vec::new();
        for work in &mut works {
            borrowed.push(work.as_mut());
        }
        // an allocator of a device keeps what it had, which says nothing of one step
        let watched = models.len() == 1 && self.runtime.device.is_cpu();
        let before = MemoryWatch::host_now();
        let watch = MemoryWatch::start(None);
        let timings = timing::measure(&self.runtime.device, self.effort, &mut borrowed)?;
        let peak = watch.host_without_files();
        let activations = watched.then(|| Some(peak?.saturating_sub(before?)));
        let reference = timings.first().copied().unwrap_or_default();
        let tokens = inputs.image_tokens + inputs.text_tokens;
        let rows = models.iter().zip(timings).map(|((subject, _), time)| {
            let config = &subject.config;
            let cost = cost::model(config, inputs.image_tokens, inputs.text_tokens);
            let moved = Moved {
                weights: subject.weight_bytes(self.runtime),
                tokens: inputs.image_tokens * (config.in_channels + config.out_channels),
            };
            let mut row = self.row(&subject.name, "step", inputs, time, cost, moved);
            let format = subject.format(self.runtime);
            row.speed_up = (models.len() > 1).then(|| reference.median / time.median);
            row.activation_bytes = activations.flatten();
            row.estimated_activation_bytes =
                Some(memory::activations(config, inputs.batch, tokens, format));
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
        inputs: &StepInputs,
    ) -> Result<Vec<Row>> {
        let (stream, conditioning) = flux.embed(&inputs.model_inputs())?;
        let mut rows = Vec::new();
        for (spec, block) in trunk.entries() {
            let work = &mut || {
                block.forward(&stream, &conditioning)?;
                Ok(())
            };
            let time = timing::measure(&self.runtime.device, self.effort, &mut [work])?;
            let time = time.first().copied().unwrap_or_default();
            let cost = cost::block(config, spec, inputs.image_tokens, inputs.text_tokens);
            let moved = Moved {
                weights: cost.parameters * self.runtime.dtype.size_in_bytes() as u64,
                tokens: 2 * config.hidden_size * (inputs.image_tokens + inputs.text_tokens),
            };
            rows.push(self.row(model, &kind(spec), inputs, time, cost, moved));
        }
        Ok(rows)
    }

    fn row(
        &self,
        model: &str,
        what: &str,
        inputs: &StepInputs,
        time: Timing,
        cost: cost::Cost,
        moved: Moved,
    ) -> Row {
        let width = self.runtime.dtype.size_in_bytes() as u64;
        let (batch, flops) = (inputs.batch as u64, cost.flops() * inputs.batch as u64);
        let bytes = moved.weights + width * batch * moved.tokens as u64;
        let (flops_per_second, bytes_per_second) =
            (flops as f64 / time.median, bytes as f64 / time.median);
        Row {
            model: model.to_owned(),
            what: what.to_owned(),
            dtype: self.runtime.dtype.as_str().to_owned(),
            batch: inputs.batch,
            image_tokens: inputs.image_tokens,
            text_tokens: inputs.text_tokens,
            time,
            flops,
            bytes,
            flops_per_second,
            bytes_per_second,
            share_of_peak_flops: flops_per_second / self.peak.flops,
            share_of_peak_bytes: bytes_per_second / self.peak.bytes,
            speed_up: None,
            activation_bytes: None,
            estimated_activation_bytes: None,
        }
    }
}
