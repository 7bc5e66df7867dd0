//! Which scheduler a model is sampled with.

use anyhow::Result;
use serde_json::Value;

use crate::{
    checkpoint::{config::ConfigFile, record::Record},
    files::Files,
    layout::{Family, FluxConfig},
    ui::Reporter,
};

/// How the names of schedulers of released models end.
pub(super) const RELEASED: &str = "'s scheduler";

/// The scheduler: `--config`'s `scheduler`, the pipeline's own, the record's, or that of the released models of its family.
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
            "`{name}` names no scheduler: taking {}'s (--config with a `scheduler` object names another)",
            config.family.name()
        ));
    }
    let dynamic = config.guidance_embed || config.family == Family::FLUX2;
    let name = format!("{}{RELEASED}", config.family.name());
    Ok((released(dynamic), name))
}

/// FLUX.1-dev's and FLUX.2's (`dynamic` shift), and FLUX.1-schnell's scheduler, from their `scheduler_config.json`.
pub(super) fn released(dynamic: bool) -> Value {
    serde_json::json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": if dynamic { 3.0 } else { 1.0 },
        "use_dynamic_shifting": dynamic,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    })
}
