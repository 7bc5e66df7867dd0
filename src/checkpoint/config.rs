//! A checkpoint's [`FluxConfig`]: sizes from the tensors, rotary numbers from configs, everything cross-checked.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    Checkpoint, identify, keys,
    part::Part,
    record::Record,
    rotary::{are_axes, default_axes, is_theta, released},
    shapes,
};
use crate::layout::{Activation, BlockKind, BlockSpec, Family, FluxConfig, unpruned};

mod embedders;

/// A JSON object that may say what tensors cannot, with its name for messages.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// For messages: a path, or where in the checkpoint it stands.
    pub name: String,
    /// A diffusers transformer config, or an object with some of its keys.
    pub json: Value,
}

impl ConfigFile {
    /// Reads a file that a person named.
    ///
    /// # Errors
    /// When it cannot be read or holds no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = crate::checkpoint::read_small(path)?;
        let json: Value =
            serde_json::from_slice(&text).with_context(|| format!("`{name}` is not valid JSON"))?;
        ensure!(json.is_object(), "`{name}` is not a JSON object");
        Ok(Self { name, json })
    }
}

/// The original names of a FLUX transformer, whatever the file's naming was.
///
/// # Errors
/// When the tensors are not those of a FLUX transformer; the message says what was found and what was missing.
pub fn canonical(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    if let Some(other) = identify::transformer(checkpoint) {
        bail!("`{}` {}{other}", checkpoint.name, other.beginning());
    }
    if Part::Transformer.is_in(checkpoint) {
        let transformer = Part::Transformer.take(checkpoint, "")?;
        if super::diffusers::is_diffusers(&transformer) {
            return super::diffusers::to_original(&transformer);
        }
        return transformer.rename(|name| Some(keys::canonical(name)));
    }
    let names: Vec<&str> = checkpoint.names().collect();
    let found: Vec<String> = names
        .iter()
        .take(3)
        .map(|name| format!("`{name}`"))
        .collect();
    let found = if found.is_empty() {
        "no tensors".to_owned()
    } else {
        format!("{} tensors such as {}", names.len(), found.join(", "))
    };
    let architecture = match &checkpoint.architecture {
        Some(name) => format!(", and it is of architecture `{name}`"),
        None => String::new(),
    };
    bail!(
        "`{}` is not a FLUX transformer: found {found}; missing `img_in.weight` and `double_blocks.*` (original names) or `x_embedder.weight` and `transformer_blocks.*` (diffusers names){architecture}",
        checkpoint.name
    )
}

/// Infers the configuration of a canonical checkpoint.
///
/// `configs` are asked in order for what tensors cannot tell (rotary axes and base); what they say about sizes must
/// agree with the tensors.
///
/// # Errors
/// When a tensor that every FLUX has is missing or misshapen, blocks are missing, a config disagrees with the
/// tensors, or the rotary axes are unknown.
pub fn infer(
    checkpoint: &Checkpoint,
    record: Option<&Record>,
    configs: &[ConfigFile],
) -> Result<FluxConfig> {
    embedders::check(checkpoint)?;
    let [hidden_size, in_channels] = checkpoint.dims("img_in.weight")?;
    let [_, context_in_dim] = checkpoint.dims("txt_in.weight")?;
    let family = keys::family(checkpoint.names());
    // FLUX.2 takes no pooled text
    let pooled = family == Family::FLUX1;
    let [_, vec_in_dim] = if pooled {
        checkpoint.dims("vector_in.in_layer.weight")?
    } else {
        [0, 0]
    };
    let [out_channels, _] = checkpoint.dims("final_layer.linear.weight")?;
    let sizes = [
        ("img_in.weight", hidden_size.min(in_channels)),
        ("txt_in.weight", context_in_dim),
        ("final_layer.linear.weight", out_channels),
        ("vector_in.in_layer.weight", vec_in_dim),
    ];
    for (name, smallest) in sizes.into_iter().take(if pooled { 4 } else { 3 }) {
        ensure!(
            smallest > 0,
            "`{}`: tensor `{name}` is empty (shape {:?})\nhint: name another file with --model",
            checkpoint.name,
            checkpoint.expect(name)?.shape()
        );
    }
    let layout = layout(checkpoint, record)?;
    let Some((head_dim, mlp_in)) = block_sizes(checkpoint, hidden_size)? else {
        bail!(
            "`{}` has no original block left to tell the head size from",
            checkpoint.name
        )
    };
    ensure!(
        head_dim > 0 && hidden_size % head_dim == 0,
        "`{}`: the head size {head_dim} does not divide the width {hidden_size}",
        checkpoint.name
    );
    let mlp_size = match family.activation {
        Activation::Gelu => mlp_in,
        Activation::SwiGlu => mlp_in / 2,
    };
    ensure!(
        mlp_size > 0,
        "`{}`: the first block has an MLP of width 0",
        checkpoint.name
    );
    let mut config = FluxConfig {
        in_channels,
        out_channels,
        hidden_size,
        num_heads: hidden_size / head_dim,
        mlp_size,
        context_in_dim,
        vec_in_dim,
        guidance_embed: checkpoint.contains("guidance_in.in_layer.weight"),
        axes_dims: Vec::new(),
        theta: released(&family).theta,
        family,
        layout,
    };
    for file in configs {
        agree(&config, file, &checkpoint.name)?;
    }
    (config.axes_dims, config.theta) = rotary(&config, record, configs, &checkpoint.name)?;
    // every tensor now, from the header: not after an hour of work
    let tensors = shapes::tensors(&config);
    for (name, shape) in &tensors {
        let found = checkpoint.expect_floats(name)?.shape();
        ensure!(
            found == shape,
            "`{}`: tensor `{name}` has shape {found:?}, expected {shape:?}",
            checkpoint.name
        );
    }
    known_only(checkpoint, &tensors)?;
    Ok(config)
}

/// Fails at a tensor that no model of this layout has: it would be copied, and be part of nothing.
fn known_only(checkpoint: &Checkpoint, tensors: &[(String, Vec<usize>)]) -> Result<()> {
    if checkpoint.len() == tensors.len() {
        return Ok(());
    }
    let known: BTreeSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(other) = checkpoint.names().find(|name| !known.contains(name)) {
        bail!(
            "`{}` holds the tensor `{other}`, which is not part of a FLUX transformer of this layout\nhint: take that tensor out of the file, if it is of no use",
            checkpoint.name
        );
    }
    Ok(())
}

/// Counts the blocks, and checks them against the record of a pruned checkpoint.
fn layout(checkpoint: &Checkpoint, record: Option<&Record>) -> Result<Vec<BlockSpec>> {
    let name = &checkpoint.name;
    let count = |kind: BlockKind| -> Result<usize> {
        let slots: BTreeSet<usize> = checkpoint
            .names()
            .filter_map(keys::parse)
            .filter(|key| key.kind == kind)
            .map(|key| key.slot)
            .collect();
        let count = slots.len();
        if let Some(gap) = (0..count).find(|slot| !slots.contains(slot)) {
            bail!(
                "`{name}` lacks `{}.{gap}`, but holds `{0}.{}`: the file is incomplete",
                kind.prefix(),
                slots.last().copied().unwrap_or(0)
            );
        }
        Ok(count)
    };
    let (double, single) = (count(BlockKind::Double)?, count(BlockKind::Single)?);
    let is_linear = |n: &str| keys::parse(n).is_some_and(|key| key.tail.starts_with("linear."));
    let Some(record) = record else {
        if let Some(linear) = checkpoint.names().find(|n| is_linear(n)) {
            bail!(
                "`{name}` holds the replacement layer `{linear}`, but no fastflux metadata that says what it replaces"
            );
        }
        return Ok(unpruned(double, single));
    };
    let slots = |kind| {
        record
            .layout
            .iter()
            .filter(|s| s.has_tensors() && s.kind() == kind)
            .count()
    };
    for (kind, found) in [(BlockKind::Double, double), (BlockKind::Single, single)] {
        let said = slots(kind);
        ensure!(
            said == found,
            "`{name}`: its metadata says {said} {} slots, the tensors have {found}",
            kind.as_str()
        );
    }
    Ok(record.layout.clone())
}

/// Head size and columns of the MLP's first projection, from the first original block of either kind.
fn block_sizes(checkpoint: &Checkpoint, hidden: usize) -> Result<Option<(usize, usize)>> {
    for name in checkpoint.names() {
        let Some(key) = keys::parse(name) else {
            continue;
        };
        let prefix = format!("{}.{}", key.kind.prefix(), key.slot);
        let sizes = match (key.kind, key.tail) {
            (BlockKind::Double, "img_attn.norm.query_norm.scale") => {
                let [mlp, _] = checkpoint.dims(&format!("{prefix}.img_mlp.0.weight"))?;
                (checkpoint.dims::<1>(name)?[0], mlp)
            }
            (BlockKind::Single, "norm.query_norm.scale") => {
                let [rows, _] = checkpoint.dims(&format!("{prefix}.linear1.weight"))?;
                ensure!(
                    rows > 3 * hidden,
                    "`{}`: tensor `{prefix}.linear1.weight` has {rows} rows, expected more than {}",
                    checkpoint.name,
                    3 * hidden
                );
                (checkpoint.dims::<1>(name)?[0], rows - 3 * hidden)
            }
            _ => continue,
        };
        return Ok(Some(sizes));
    }
    Ok(None)
}

/// Fails when a config file contradicts the tensors.
fn agree(config: &FluxConfig, file: &ConfigFile, checkpoint: &str) -> Result<()> {
    let slots = |kind| {
        config
            .slots()
            .iter()
            .filter(|(s, p)| p.is_some() && s.kind() == kind)
            .count()
    };
    let sizes = [
        ("num_layers", slots(BlockKind::Double)),
        ("num_single_layers", slots(BlockKind::Single)),
        ("num_attention_heads", config.num_heads),
        ("attention_head_dim", config.head_dim()),
        ("in_channels", config.in_channels),
        ("out_channels", config.out_channels),
        ("joint_attention_dim", config.context_in_dim),
        ("pooled_projection_dim", config.vec_in_dim),
        ("patch_size", 1),
    ];
    for (key, actual) in sizes {
        let Some(said) = file.json.get(key).filter(|v| !v.is_null()) else {
            continue;
        };
        ensure!(
            said.as_u64() == Some(actual as u64),
            "`{}` says `{key}` = {said}, but the tensors of `{checkpoint}` say {actual}",
            file.name
        );
    }
    if let Some(said) = file.json.get("guidance_embeds").filter(|v| !v.is_null()) {
        ensure!(
            said.as_bool() == Some(config.guidance_embed),
            "`{}` says `guidance_embeds` = {said}, but `{checkpoint}` has {} guidance embedding",
            file.name,
            if config.guidance_embed { "a" } else { "no" }
        );
    }
    Ok(())
}

/// Rotary axes and base: the first that says so of config files and record, else the defaults of the family.
fn rotary(
    config: &FluxConfig,
    record: Option<&Record>,
    configs: &[ConfigFile],
    name: &str,
) -> Result<(Vec<usize>, f64)> {
    let head = config.head_dim();
    let count = config.family.position_axes;
    let mut axes = None;
    let mut theta = None;
    for file in configs {
        let said = ["theta", "rope_theta"].into_iter().find_map(|key| {
            let value = file.json.get(key).filter(|v| !v.is_null())?;
            Some((key, value))
        });
        if let Some((key, value)) = said.filter(|_| theta.is_none()) {
            let value = value.as_f64().filter(|t| is_theta(*t));
            theta = Some(value.with_context(|| {
                format!(
                    "`{}`: `{key}` must be a number above 1 and at most 1e12",
                    file.name
                )
            })?);
        }
        let said = file
            .json
            .get("axes_dims_rope")
            .or_else(|| file.json.get("axes_dim"));
        if let Some(value) = said.filter(|v| !v.is_null()).filter(|_| axes.is_none()) {
            let dims: Vec<usize> = serde_json::from_value(value.clone()).with_context(|| {
                format!(
                    "`{}`: `axes_dims_rope` must be a list of sizes, found {value}",
                    file.name
                )
            })?;
            ensure!(
                are_axes(&dims) && dims.len() == count && dims.iter().sum::<usize>() == head,
                "`{}` says `axes_dims_rope` = {value}; expected {count} even sizes that sum to the head size {head}",
                file.name
            );
            axes = Some(dims);
        }
    }
    let axes = axes.or_else(|| record.map(|r| r.axes_dims.clone()));
    let axes = axes.or_else(|| default_axes(&config.family, head));
    let axes = axes.with_context(|| {
        format!("`{name}` does not say how its rotary axes divide the head size {head}\nhint: put a config.json with `axes_dims_rope` next to it, or name one with --config")
    })?;
    ensure!(
        are_axes(&axes) && axes.len() == count && axes.iter().sum::<usize>() == head,
        "`{name}`: the rotary axes {axes:?} are not {count} that sum to the head size {head}"
    );
    Ok((
        axes,
        theta
            .or(record.map(|r| r.theta))
            .unwrap_or(released(&config.family).theta),
    ))
}
