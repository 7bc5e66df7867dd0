//! `inspect`: what a checkpoint holds, from its header alone.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;

use crate::{
    checkpoint::keys,
    cli::InspectArgs,
    layout::{BlockKind, BlockSpec},
    model::cost,
    pipeline::Pipeline,
    ui,
};

/// One row of the block table.
struct Row {
    spec: BlockSpec,
    parameters: usize,
    bytes: usize,
    flops: u64,
}

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let pipeline = super::open(&super::bare_choice(&args.model))?;
    let size = pipeline.image_size(args.size.width, args.size.height)?;
    let text = match args.text_tokens {
        Some(tokens) => tokens,
        None => pipeline.default_text_length()?,
    };
    let image = size.tokens();
    let rows = rows(&pipeline, image, text);
    let config = &pipeline.config;
    let total = cost::model(config, image, text);
    let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
    for (_, source) in pipeline.transformer.iter() {
        *dtypes.entry(source.format().to_string()).or_default() += source.elements();
    }
    let parameters = pipeline.transformer.parameters();
    let bytes = pipeline.transformer.bytes();
    if args.print.json {
        let blocks: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "block": row.spec.id(),
                    "kind": row.spec.kind().as_str(),
                    "state": state(&row.spec),
                    "spec": row.spec,
                    "parameters": row.parameters,
                    "bytes": row.bytes,
                    "flops": row.flops,
                })
            })
            .collect();
        return ui::json(&json!({
            "model": pipeline.name,
            "family": pipeline.family(),
            "format": if pipeline.diffusers { "diffusers" } else { "original" },
            "config": config,
            "double_blocks": config.original_blocks(BlockKind::Double),
            "single_blocks": config.original_blocks(BlockKind::Single),
            "replaced_blocks": config.replaced().map(|r| r.replaces.len()).sum::<usize>(),
            "dtypes": dtypes,
            "parameters": parameters,
            "bytes": bytes,
            "step": {
                "width": size.width, "height": size.height, "image_tokens": image, "text_tokens": text,
                "matmul_flops": total.matmul_flops, "attention_flops": total.attention_flops,
                "flops": total.flops(), "weight_bytes": bytes,
            },
            "blocks": blocks,
            "base": pipeline.record.as_ref().map(|r| &r.base),
            "recipe": pipeline.record.as_ref().map(|r| &r.recipe),
        }));
    }
    let dtypes: Vec<&str> = dtypes.keys().map(String::as_str).collect();
    let mut lines = vec![
        format!("model       {}", pipeline.name),
        format!("family      {}", pipeline.family()),
        format!(
            "blocks      {} double + {} single, {} replaced",
            config.original_blocks(BlockKind::Double),
            config.original_blocks(BlockKind::Single),
            config.replaced().map(|r| r.replaces.len()).sum::<usize>()
        ),
        format!(
            "width       {} = {} heads × {}, MLP {}, rotary axes {:?}, theta {}",
            config.hidden_size,
            config.num_heads,
            config.head_dim(),
            config.mlp_size,
            config.axes_dims,
            config.theta
        ),
        format!(
            "inputs      {} channels in, {} out, T5 {}, CLIP {}, guidance {}",
            config.in_channels,
            config.out_channels,
            config.context_in_dim,
            config.vec_in_dim,
            if config.guidance_embed {
                "embedded"
            } else {
                "none"
            }
        ),
        format!(
            "parameters  {} in {} ({}, {} names)",
            ui::count(parameters as f64),
            ui::bytes(bytes as f64),
            dtypes.join(" + "),
            if pipeline.diffusers {
                "diffusers"
            } else {
                "original"
            }
        ),
        format!(
            "one step    {} at {}×{} with {text} text tokens ({} matrix products, {} attention), reads {} of weights",
            ui::flops(total.flops() as f64),
            size.width,
            size.height,
            ui::flops(total.matmul_flops as f64),
            ui::flops(total.attention_flops as f64),
            ui::bytes(bytes as f64)
        ),
    ];
    if let Some(record) = &pipeline.record {
        lines.push(format!(
            "made        from {} by {}",
            record.base, record.tool
        ));
    }
    lines.push(String::new());
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.spec.id().to_string(),
                state(&row.spec),
                ui::count(row.parameters as f64),
                ui::bytes(row.bytes as f64),
                ui::flops(row.flops as f64),
            ]
        })
        .collect();
    lines.push(ui::table(
        &["block", "state", "parameters", "bytes", "per step"],
        &cells,
        &[2, 3, 4],
    ));
    ui::data(lines.join("\n"))
}

/// What stands in a slot: `kept`, or the form of the replacement and further blocks it stands for.
fn state(spec: &BlockSpec) -> String {
    match spec {
        BlockSpec::Original(_) => "kept".to_owned(),
        BlockSpec::Replaced(r) => {
            let joint = if r.joint { ", joint" } else { "" };
            let run = if r.replaces.len() > 1 {
                format!(" for {} blocks", r.replaces.len())
            } else {
                String::new()
            };
            format!("{}{joint}{run}", r.form)
        }
    }
}

fn rows(pipeline: &Pipeline, image: usize, text: usize) -> Vec<Row> {
    let mut sizes: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (name, source) in pipeline.transformer.iter() {
        if let Some(key) = keys::parse(name) {
            let entry = sizes
                .entry(format!("{}.{}", key.kind.prefix(), key.slot))
                .or_default();
            entry.0 += source.elements();
            entry.1 += source.byte_len();
        }
    }
    let slots = pipeline.config.slots();
    let rows = slots.into_iter().map(|(spec, prefix)| {
        let (parameters, bytes) = prefix
            .and_then(|p| sizes.get(&p).copied())
            .unwrap_or_default();
        Row {
            spec: spec.clone(),
            parameters,
            bytes,
            flops: cost::block(&pipeline.config, spec, image, text).flops(),
        }
    });
    rows.collect()
}
