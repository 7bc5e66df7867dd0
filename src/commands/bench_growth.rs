//! `bench --growth`: one step of growing pictures, models and batches, as far as time and memory allow.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::{
    bench::{Subject, row_of_time},
    bench_inputs::Given,
};
use crate::{
    checkpoint::{record, save, target},
    cli::BenchArgs,
    device::Runtime,
    eval::{
        growth::{self, Axis, Point},
        latency::{self, Effort, Machine, MemoryWatch},
    },
    layout::{BlockKind, BlockSpec, FluxConfig},
    model::{
        Flux, cost,
        demand::{self, Format},
    },
    ui,
};

/// Sides of pictures.
const SIZES: [usize; 6] = [256, 512, 768, 1024, 1536, 2048];
/// The size at which blocks and batches grow.
const USUAL: usize = 512;
const BATCHES: [usize; 4] = [1, 2, 4, 8];
/// Shares of the model's blocks.
const QUARTERS: [usize; 4] = [1, 2, 3, 4];
/// A step that is forecast to take longer is not measured, in seconds.
const LONGEST: f64 = 20.0;

/// Measures and writes the chart; the table goes to standard output.
pub(super) fn run(
    args: &BenchArgs,
    subject: &Subject,
    text: usize,
    runtime: &Runtime,
    output: &Path,
) -> Result<()> {
    target::check_file(output, args.force)?;
    target::check_writable(output)?;
    let sizes = if args.size.is_empty() {
        &SIZES[..]
    } else {
        &args.size
    };
    // what the process takes before there is a model
    let host = MemoryWatch::host_now().filter(|_| runtime.device.is_cpu());
    let (before, format) = (host.unwrap_or(0), subject.format(runtime));
    let mut points = points(&subject.config, sizes, text, format, before);
    let measured = Measuring {
        subject,
        runtime,
        seconds: args.seconds,
    };
    measured.run(&mut points)?;
    growth::forecast(&mut points);
    points.sort_by_key(|p| (p.axis, p.flops));
    let title = format!(
        "one step of {} with {text} text tokens ({runtime}); {}",
        subject.name,
        Machine::this().processor.unwrap_or_default()
    );
    save::write_bytes(
        output,
        growth::svg(&points, title.trim_end_matches("; "))?.as_bytes(),
    )?;
    if args.print.json {
        ui::json(&json!({
            "tool": record::software(),
            "machine": Machine::this(),
            "model": subject.name,
            "runtime": runtime.to_string(),
            "points": points,
        }))?;
    } else {
        ui::data(table(&points))?;
    }
    ui::note(format!("wrote `{}`", output.display()));
    Ok(())
}

/// The model's first blocks: `quarters` quarters of each kind.
fn part(config: &FluxConfig, quarters: usize) -> FluxConfig {
    let of_kind = |kind: BlockKind| {
        let all: Vec<&BlockSpec> = config
            .layout
            .iter()
            .filter(|spec| spec.id().kind == kind)
            .collect();
        let count = (all.len() * quarters).div_ceil(4);
        all.into_iter().take(count).cloned().collect::<Vec<_>>()
    };
    FluxConfig {
        layout: [of_kind(BlockKind::Double), of_kind(BlockKind::Single)].concat(),
        ..config.clone()
    }
}

/// Everything there is to measure, nothing measured yet.
fn points(
    config: &FluxConfig,
    sizes: &[usize],
    text: usize,
    format: Format,
    before: u64,
) -> Vec<Point> {
    let most = sizes.iter().copied().max().unwrap_or(USUAL);
    let usual = USUAL.min(most);
    let point = |axis, size: usize, batch: usize, config: &FluxConfig| {
        let image = (size / 16) * (size / 16);
        Point {
            axis,
            size,
            image_tokens: image,
            text_tokens: text,
            blocks: config.layout.len(),
            batch,
            flops: cost::model(config, image, text).flops() * batch as u64,
            seconds: None,
            bytes: None,
            forecast_bytes: before
                + demand::weights(config, format)
                + demand::activations(config, batch, image + text, format),
            forecast_seconds: None,
        }
    };
    let mut out = Vec::new();
    for quarters in QUARTERS {
        let config = part(config, quarters);
        if out.iter().all(|p: &Point| p.blocks != config.layout.len()) {
            out.push(point(Axis::Blocks, usual, 1, &config));
        }
    }
    out.extend(BATCHES.map(|batch| point(Axis::Batch, usual, batch, config)));
    out.extend(sizes.iter().map(|size| point(Axis::Size, *size, 1, config)));
    out
}

struct Measuring<'a> {
    subject: &'a Subject,
    runtime: &'a Runtime,
    seconds: f64,
}

impl Measuring<'_> {
    /// The smallest first: what an allocator keeps is then no more than what comes needs.
    fn run(&self, points: &mut [Point]) -> Result<()> {
        points.sort_by_key(|p| (p.blocks, p.forecast_bytes));
        let progress = ui::progress(points.len(), "measuring");
        let mut model: Option<Flux> = None;
        let mut rate: Option<f64> = None;
        let mut known: Vec<Point> = Vec::new();
        for point in points.iter_mut() {
            progress.inc(1);
            let same =
                |p: &&Point| (p.size, p.blocks, p.batch) == (point.size, point.blocks, point.batch);
            if let Some(same) = known.iter().find(same) {
                (point.seconds, point.bytes) = (same.seconds, same.bytes);
                continue;
            }
            let long = rate.is_some_and(|rate| point.flops as f64 / rate > LONGEST);
            let free = self.runtime.free_memory().unwrap_or(u64::MAX);
            let held = model.is_some() && known.last().is_some_and(|p| p.blocks == point.blocks);
            let needed = if held {
                let weights =
                    demand::weights(&self.config(point), self.subject.format(self.runtime));
                point.forecast_bytes.saturating_sub(weights)
            } else {
                model = None;
                point.forecast_bytes
            };
            if long || needed > free {
                continue;
            }
            let flux = match model.take() {
                Some(flux) => flux,
                None => self.subject.load_part(&self.config(point), self.runtime)?,
            };
            self.measure(point, &flux)?;
            model = Some(flux);
            rate = point.seconds.map(|s| point.flops as f64 / s).or(rate);
            known.push(*point);
        }
        ui::done(&progress, format!("measured {} steps", known.len()));
        Ok(())
    }

    fn config(&self, point: &Point) -> FluxConfig {
        let all = &self.subject.config;
        let parts = QUARTERS.into_iter().map(|quarters| part(all, quarters));
        let mut parts = parts.filter(|config| config.layout.len() == point.blocks);
        parts.next().unwrap_or_else(|| all.clone())
    }

    fn measure(&self, point: &mut Point, flux: &Flux) -> Result<()> {
        let device = &self.runtime.device;
        let given = Given::new(
            &self.subject.config,
            point.size,
            point.text_tokens,
            point.batch,
            self.runtime,
        )?;
        let inputs = given.inputs();
        let effort = Effort {
            warm_up: usize::from(point.flops < 1 << 40),
            least: 2,
            most: 100,
            seconds: self.seconds.min(2.0),
        };
        let memory = MemoryWatch::start(None);
        let work = &mut || {
            flux.forward(&inputs, &mut ())?;
            Ok(())
        };
        let time = latency::measure(device, effort, &mut [work])?;
        point.seconds = time.first().map(|t| t.median);
        // an allocator of a device keeps what it had, which says nothing of one step
        let on_cpu = device.is_cpu();
        point.bytes = on_cpu.then(|| memory.host_without_files()).flatten();
        Ok(())
    }
}

fn table(points: &[Point]) -> String {
    let rows: Vec<Vec<String>> = points
        .iter()
        .map(|p| {
            vec![
                format!("{}²", p.size),
                format!("{} + {}", p.image_tokens, p.text_tokens),
                p.blocks.to_string(),
                p.batch.to_string(),
                ui::flops(p.flops as f64),
                row_of_time(p.seconds),
                row_of_time(p.forecast_seconds),
                p.bytes
                    .map_or_else(|| "-".to_owned(), |b| ui::bytes(b as f64)),
                ui::bytes(p.forecast_bytes as f64),
            ]
        })
        .collect();
    let header = [
        "picture", "tokens", "blocks", "batch", "FLOPs", "ms", "forecast", "memory", "forecast",
    ];
    ui::table(&header, &rows, &[0, 1, 2, 3, 4, 5, 6, 7, 8])
}
