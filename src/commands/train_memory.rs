//! What `train-sandwich` takes, and how it makes do with the memory that there is.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::train::{self, Pair, Resolved};
use crate::{
    cli::TrainArgs,
    device::Runtime,
    model::ops,
    pipeline::placement::MemoryBudget,
    train::{
        memory::{self, Forecast, Situation},
        sandwich::Sandwich,
    },
    ui,
};

/// How many times what there is a run may take by the forecast, an upper estimate, and still be tried.
const HOPELESS: f64 = 4.0;

/// What is not kept on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Only the inputs of blocks are kept, the rest is computed again on the way back.
    pub(super) recompute: bool,
    /// Blocks that are not trained are read when they are run.
    pub(super) offload: bool,
    /// Batches that pass through such a block together.
    pub(super) ahead: usize,
}

/// One phase: its name, its steps and what it takes.
type Taken = (String, usize, Forecast);

/// The way that the user asks for, or the first that fits.
pub(super) fn way(
    args: &TrainArgs,
    pair: &Pair,
    resolved: &Resolved,
    sandwiches: &[Sandwich],
    runtime: &Runtime,
) -> Result<Way> {
    let recompute = args.gradient_checkpointing || args.memory.offload || train::large(resolved);
    let asked = Way {
        recompute,
        offload: args.memory.offload,
        ahead: 1,
    };
    let Some(limit) = MemoryBudget::new(super::memory(args.memory), runtime).limit() else {
        return ahead(asked, None, pair, resolved, sandwiches, runtime);
    };
    let least = Way {
        recompute: true,
        offload: true,
        ahead: 1,
    };
    let again = Way {
        recompute: true,
        ..asked
    };
    for way in [asked, again, least] {
        let peak = peak(&phases(pair, resolved, sandwiches, way, runtime)?);
        if peak <= limit as f64 {
            if way != asked {
                ui::note(format!(
                    "within {}: {}",
                    ui::bytes(limit as f64),
                    if way.offload {
                        "only blocks that are trained stay on the device (--offload)"
                    } else {
                        "activations are computed again on the way back (--gradient-checkpointing)"
                    }
                ));
            }
            return ahead(way, Some(limit), pair, resolved, sandwiches, runtime);
        }
    }
    let phases = phases(pair, resolved, sandwiches, least, runtime)?;
    let peak = peak(&phases);
    let text = format!(
        "{} of memory are too little: training takes {} with nothing on the device that need not be there",
        ui::bytes(limit as f64),
        ui::bytes(peak)
    );
    if args.memory.max_vram.is_some() {
        bail!(
            "--max-vram: {text}\nhint: a smaller --batch, smaller pictures (--width, --height) or a smaller --rank take less"
        );
    }
    let hopeless = peak > HOPELESS * limit as f64;
    if hopeless && !args.dry_run.dry_run {
        bail!(
            "{text}\nhint: {} takes less; --max-vram says how much there is, where it is more",
            lower(resolved, &phases)
        );
    }
    let then = if hopeless {
        "it would not be tried"
    } else {
        "trying all the same"
    };
    ui::warn(format!("{text}; {then}"));
    Ok(least)
}

/// What to lower in the phase that takes most.
fn lower(resolved: &Resolved, phases: &[Taken]) -> &'static str {
    let most = phases
        .iter()
        .map(|(_, _, f)| f)
        .max_by(|a, b| a.bytes().total_cmp(&b.bytes()));
    let Some(f) = most else {
        return "a smaller --batch";
    };
    let half = f.bytes() / 2.0;
    match resolved.recipe.data.cache {
        0 if f.samples > half => "a smaller `data.held-out` of the recipe",
        _ if f.samples > half => "a smaller --cache",
        _ if f.optimiser > half => "a smaller --rank",
        _ if f.weights > half => "another number format (see `fastflux convert`)",
        _ => "a smaller --batch or smaller pictures (--width, --height)",
    }
}

/// `way` with as many batches together through a stored block as there is room for.
fn ahead(
    way: Way,
    limit: Option<u64>,
    pair: &Pair,
    resolved: &Resolved,
    sandwiches: &[Sandwich],
    runtime: &Runtime,
) -> Result<Way> {
    let recipe = &resolved.recipe;
    let peak = peak(&phases(pair, resolved, sandwiches, way, runtime)?);
    let steps = recipe.steps.max(recipe.finish.steps) * recipe.data.accumulate;
    let held_out = resolved.held_out.div_ceil(resolved.batch.max(1));
    let samples = match recipe.data.cache {
        0 => steps,
        cache => cache.min(steps),
    };
    let room = limit.map(|limit| limit as f64 - peak);
    let situation = situation(pair, resolved, way, runtime)?;
    let config = &pair.pruned.config;
    Ok(Way {
        ahead: situation.most_ahead(config, samples.max(held_out), room),
        ..way
    })
}

fn situation(pair: &Pair, resolved: &Resolved, way: Way, runtime: &Runtime) -> Result<Situation> {
    Ok(Situation {
        element: runtime.dtype.size_in_bytes() as f64,
        weight: pair.teacher.bytes_of_a_weight(runtime.dtype),
        cpu: runtime.device.is_cpu(),
        scores: ops::holds_scores_backward(
            &runtime.device,
            runtime.dtype,
            pair.pruned.config.head_dim(),
        ),
        batch: resolved.batch,
        tokens: (pair.teacher.default_text_length()?, resolved.size.tokens()),
        recompute: way.recompute,
        offload: way.offload,
        ahead: way.ahead,
    })
}

fn phases(
    pair: &Pair,
    resolved: &Resolved,
    sandwiches: &[Sandwich],
    way: Way,
    runtime: &Runtime,
) -> Result<Vec<Taken>> {
    let recipe = &resolved.recipe;
    let situation = situation(pair, resolved, way, runtime)?;
    let (pruned, teacher) = (&pair.pruned.config, &pair.teacher.config);
    let take = |sandwich: Option<&Sandwich>| {
        memory::forecast(pruned, teacher, sandwiches, sandwich, recipe, situation)
    };
    let mut phases: Vec<Taken> = Vec::new();
    if recipe.steps > 0 {
        let each = sandwiches.iter();
        phases.extend(each.map(|s| (s.to_string(), recipe.steps, take(Some(s)))));
    }
    if recipe.finish.steps > 0 {
        phases.push(("finish".to_owned(), recipe.finish.steps, take(None)));
    }
    Ok(phases)
}

fn peak(phases: &[Taken]) -> f64 {
    phases.iter().map(|(_, _, f)| f.bytes()).fold(0.0, f64::max)
}

/// Says what would be trained and what it takes.
pub(super) fn dry_run(
    args: &TrainArgs,
    pair: &Pair,
    resolved: &Resolved,
    sandwiches: &[Sandwich],
    way: Way,
    runtime: &Runtime,
) -> Result<()> {
    let recipe = &resolved.recipe;
    let phases = phases(pair, resolved, sandwiches, way, runtime)?;
    let peak = peak(&phases);
    if args.output.print.json {
        let phases: Vec<Value> = phases
            .iter()
            .map(|(name, steps, f)| json!({ "phase": name, "steps": steps, "memory": f }))
            .collect();
        return ui::json(&json!({
            "phases": phases,
            "peak_bytes": peak,
            "pictures": resolved.prompts.len(),
            "batch": resolved.batch,
            "recompute": way.recompute,
            "offload": way.offload,
            "batches_ahead": way.ahead,
            "recipe": recipe,
        }));
    }
    let rows: Vec<Vec<String>> = phases
        .iter()
        .map(|(name, steps, f)| {
            let size = [f.weights, f.optimiser, f.activations, f.samples, f.bytes()];
            let [weights, optimiser, activations, samples, all] = size.map(ui::bytes);
            vec![
                name.clone(),
                steps.to_string(),
                ui::count(f.trainables),
                weights,
                optimiser,
                activations,
                samples,
                all,
            ]
        })
        .collect();
    let header = [
        "trained",
        "steps",
        "values",
        "weights",
        "trainables",
        "activations",
        "batches",
        "all",
    ];
    ui::data(format!(
        "{}\n\n{} pictures, {} states of {} tokens in a forward; {}peak on the device: {}",
        ui::table(&header, &rows, &[1, 2, 3, 4, 5, 6, 7]),
        resolved.prompts.len(),
        resolved.batch,
        pair.teacher.default_text_length()? + resolved.size.tokens(),
        if way.offload {
            format!("a block that is read serves {} of them; ", way.ahead)
        } else {
            String::new()
        },
        ui::bytes(peak)
    ))
}
