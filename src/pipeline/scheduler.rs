//! Which scheduler a model is sampled with.

use anyhow::Result;
use serde_json::Value;

use crate::{
    checkpoint::{config::ConfigFile, record::Record},
    files::Files,
    layout::FluxConfig,
    ui::Reporter,
};

/// The scheduler: `--config`'s `scheduler`, the pipeline's own, the record's, or FLUX.1's if the sizes are FLUX.1's.
pub(super) fn of_model(
    configs: &[ConfigFile],
    pipeline: Option<&Files>,
    record: Option<&Record>,
    config: &FluxConfig,
    name: &str,
    reporter: &Reporter,
) -> Result<(Value, String)> {
    let said = |c: &ConfigFile| {
        let scheduler = c.json.get("scheduler")?.clone();
        Some((scheduler, format!("`{}`: its `scheduler`", c.name)))
    };
    if let Some(said) = configs.iter().find_map(said) {
        return Ok(said);
    }
    if let Some(files) = pipeline.map(|files| files.sub("scheduler"))
        && let Some(json) = files.json("scheduler_config.json")?
    {
        return Ok((
            json,
            format!("`{}`", files.describe("scheduler_config.json")),
        ));
    }
    if let Some(record) = record {
        let name = format!("`{name}`: the scheduler in its fastflux metadata");
        return Ok((record.scheduler.clone(), name));
    }
    if config.head_dim() != 128 {
        reporter.note(format!(
            "`{name}` names no scheduler: taking FLUX.1's (--config with a `scheduler` object names another)"
        ));
    }
    let scheduler = flux1_scheduler(config.guidance_embed);
    Ok((scheduler, "FLUX.1's scheduler".to_owned()))
}

/// FLUX.1-dev's (dynamic shift) and FLUX.1-schnell's scheduler, from their `scheduler_config.json`.
fn flux1_scheduler(dev: bool) -> Value {
    serde_json::json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": if dev { 3.0 } else { 1.0 },
        "use_dynamic_shifting": dev,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    })
}
