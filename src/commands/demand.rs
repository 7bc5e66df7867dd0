//! `--dry-run` of what calibrates: forwards, arithmetic and memory, before anything is loaded.

use anyhow::{Context, Result};
use serde_json::json;

use super::{gather, session::Settings};
use crate::{
    calibrate::{pass::Shard, recipe::StateSource},
    model::cost,
    pipeline::{Pipeline, placement::MemoryBudget},
    prune::plan::originals,
    ui,
};

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Which units.
    pub(super) shard: Shard,
    /// Bytes that the user allows for sums.
    pub(super) sums: Option<u64>,
    /// Whether blocks are scored and layers fitted after it.
    pub(super) fitting: bool,
}

impl Demand {
    /// Says what it takes. Memory is what programs allocate; mapped pages of the model's file come and go beside it.
    pub(super) fn say(
        &self,
        pipeline: &Pipeline,
        place: &MemoryBudget,
        settings: &Settings,
        json: bool,
    ) -> Result<()> {
        let runtime = place.runtime();
        let shard = self.shard;
        let config = &pipeline.config;
        let steps = settings.recipe.steps.context("steps are resolved")?;
        let draws = settings.recipe.draws.context("draws are resolved")?;
        let (samples, prompts, batch) = (settings.samples, settings.prompts.len(), settings.batch);
        let sampled = settings.recipe.source != StateSource::Images;
        let sampling = if sampled { prompts * steps } else { 0 };
        let gathered = match settings.recipe.source {
            StateSource::Trajectory => 0,
            _ => (samples as f64 * draws).ceil() as usize,
        };
        let of_shard = |states: usize| states.div_ceil(shard.of);
        let tokens = settings.size.tokens() + settings.text_tokens;
        let per_state = cost::model(config, settings.size.tokens(), settings.text_tokens);
        let flops = |states: usize| of_shard(states) as f64 * per_state.flops() as f64;
        let (need, room) = gather::need(pipeline, place, settings, self.sums);
        let kept = gather::blocks_within(config, room);
        let residence = place.residence(config, need)?;
        let d = config.hidden_size as u64;
        let states_in_sums = match settings.recipe.source {
            StateSource::Trajectory => samples * steps,
            _ => gathered,
        };
        let rows = match settings.recipe.tokens_per_forward {
            None => states_in_sums * tokens,
            Some(limit) => states_in_sums.div_ceil(batch) * (2 * limit).min(batch * tokens),
        };
        // 2 · rows · (k² / 2 + k d) multiply-adds
        let products = (kept * of_shard(rows)) as f64 * 2.0 * (d as f64) * (1.5 * d as f64);
        let weights = residence.bytes;
        let sums = kept as u64 * gather::bytes_of_sums(config);
        let element = runtime.dtype.size_in_bytes() as u64;
        let activations = place.activations(config, batch, tokens);
        // one stream of one block in f32 (f64 on the CPU), its change, and the fresh products beside the sums
        let wide = if runtime.device.is_cpu() { 8 } else { 4 };
        let gathering = (batch * tokens) as u64 * 2 * d * wide + gather::bytes_of_sums(config);
        let pictures = (prompts * settings.size.tokens() * config.in_channels * 4) as u64;
        let all = originals(config).len();
        // a layer for each stream of every block with sums, f32, and a few matrices of the solver's in f64
        let (solving, streams) = if self.fitting {
            let layers = kept as u64 * 2 * d * (d + 1) * 4;
            let solver = 6 * (d + 1) * (d + 1) * 8;
            let held = (samples * settings.draws_later() * tokens) as u64;
            (layers + solver, 2 * held * d * element)
        } else {
            (0, 0)
        };
        // sums are gone when the sequential fits begin
        let work = (sums + solving + activations + gathering).max(streams + solving + activations);
        let on_cpu = runtime.device.is_cpu();
        let out = json!({
            "model": pipeline.name,
            "runtime": runtime.to_string(),
            "prompts": prompts,
            "steps": steps,
            "image_tokens": settings.size.tokens(),
            "text_tokens": settings.text_tokens,
            "states_in_a_forward": batch,
            "forwards": { "sampling": of_shard(sampling).div_ceil(batch), "statistics": of_shard(gathered).div_ceil(batch) },
            "flops": { "sampling": flops(sampling), "statistics": flops(gathered), "products": products },
            "blocks": all,
            "blocks_with_sums": kept,
            "blocks_on_the_device": residence.count(),
            "bytes": {
                "weights": weights, "statistics": sums, "activations": activations + gathering,
                "pictures": pictures, "file": sums + pictures,
                "solving": solving, "streams": streams,
                "device": weights + if on_cpu { work } else { sums + activations + gathering },
                "host": pictures + if on_cpu { weights + work } else { sums + solving + streams },
            },
            "free": runtime.free_memory(),
            "shard": (shard != Shard::WHOLE).then(|| format!("{}/{}", shard.index, shard.of)),
        });
        if json {
            return ui::json(&out);
        }
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
        let bytes = |key: &str| ui::bytes(number(&out["bytes"][key]));
        let size = settings.size;
        let mut lines = vec![
            format!("model       {} on {runtime}", pipeline.name),
            format!(
                "sampling    {prompts} prompts × {steps} steps at {}×{}, {} forwards of {batch}: {}",
                size.width,
                size.height,
                out["forwards"]["sampling"],
                ui::flops(flops(sampling))
            ),
            format!(
                "statistics  {states_in_sums} states, {} forwards more: {} and {} for the sums",
                out["forwards"]["statistics"],
                ui::flops(flops(gathered)),
                ui::flops(products)
            ),
            format!(
                "sums        {kept} of {all} blocks, {} ({} each)",
                bytes("statistics"),
                ui::bytes(gather::bytes_of_sums(config) as f64)
            ),
            if residence.is_all() {
                format!("weights     {}", bytes("weights"))
            } else {
                format!(
                    "weights     {} at a time, {} of {} blocks all the time",
                    bytes("weights"),
                    residence.count(),
                    residence.total()
                )
            },
            format!("activations {}", bytes("activations")),
        ];
        lines.push(if self.fitting {
            format!(
                "fits        {} for layers and solver, {} for token streams",
                bytes("solving"),
                bytes("streams")
            )
        } else {
            format!("file        {}", bytes("file"))
        });
        lines.push(if runtime.device.is_cpu() {
            format!("memory      {}", bytes("host"))
        } else {
            let (device, host) = (bytes("device"), bytes("host"));
            format!("memory      {device} on the device, {host} on the host")
        });
        if let Some(free) = runtime.free_memory() {
            lines.push(format!("free        {}", ui::bytes(free as f64)));
        }
        ui::data(lines.join("\n"))
    }
}
