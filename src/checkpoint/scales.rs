//! The scales of float8 weights, which are separate tensors next to them: found on reading, put back on writing.
//!
//! ComfyUI's files: `<layer>.scale_weight` and the marker `scaled_fp8`, or `<layer>.weight_scale` and a JSON
//! `<layer>.comfy_quant`. Scales of activations (`scale_input`, `input_scale`) are for products in float8, which are not
//! made here, and are dropped.

use anyhow::{Context, Result, ensure};
use candle::{Device, Tensor};
use serde_json::Value;

use super::{Checkpoint, Source, dtype::StorageDType};
use crate::{files::Blob, quant::QuantType};

/// The marker that a file's float8 weights have scales.
const MARKER: &str = "scaled_fp8";
/// What a layer's scale is called, by both generations of files; the first is written.
const WEIGHT: [&str; 2] = [".scale_weight", ".weight_scale"];
/// Next to a layer, of no use here.
const DROPPED: [&str; 3] = [".scale_input", ".input_scale", ".comfy_quant"];

/// The checkpoint with each scale at its weight, and no other tensor next to a weight.
///
/// # Errors
/// When a scale has no weight, another shape than (), (1) or (rows, 1), or the layer says it is in another format.
pub(super) fn attached(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    let is_extra = |name: &str| {
        name.ends_with(MARKER) || WEIGHT.iter().chain(&DROPPED).any(|end| name.ends_with(end))
    };
    if !checkpoint.names().any(is_extra) {
        return Ok(checkpoint.clone());
    }
    let mut out = checkpoint.rename(|name| (!is_extra(name)).then(|| name.to_owned()))?;
    for (name, source) in checkpoint.iter() {
        let context = || format!("`{}`: tensor `{name}`", checkpoint.name);
        if name.ends_with(".comfy_quant") {
            check_format(source).with_context(context)?;
        }
        let Some(layer) = WEIGHT.iter().find_map(|end| name.strip_suffix(end)) else {
            continue;
        };
        let weight = format!("{layer}.weight");
        let scaled = out
            .remove(&weight)
            .with_context(|| format!("there is no `{weight}` that it could scale"))
            .and_then(|weight| scale(source, weight))
            .with_context(context)?;
        out.insert(weight, scaled);
    }
    Ok(out)
}

/// A weight with the scale that a tensor holds.
fn scale(scale: &Source, weight: Source) -> Result<Source> {
    let rows = weight.shape().first().copied().unwrap_or(1);
    ensure!(
        matches!(scale.shape(), [] | [1] | [1, 1])
            || *scale.shape() == [rows, 1]
            || *scale.shape() == [rows],
        "a scale of shape {:?} for a weight of shape {:?}; expected one number or one for each row",
        scale.shape(),
        weight.shape()
    );
    weight.with_scale(scale.values(0..scale.elements())?)
}

/// The format that newer files state for each layer.
fn check_format(source: &Source) -> Result<()> {
    let json: Value = serde_json::from_slice(&source.bytes()?).context("is not valid JSON")?;
    let format = json.get("format").and_then(Value::as_str).unwrap_or("");
    ensure!(
        format == "float8_e4m3fn",
        "the layer is in the format `{format}`, which is not supported\nhint: use a file in float8_e4m3fn, bf16 or GGUF"
    );
    Ok(())
}

/// The checkpoint with scales as tensors again, as files have them.
///
/// # Errors
/// When a scaled tensor is no weight.
pub(super) fn detached(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    let mut out = checkpoint.clone();
    for (name, source) in checkpoint.iter() {
        let Some(scale) = source.scale() else {
            continue;
        };
        let layer = name
            .strip_suffix(".weight")
            .with_context(|| format!("tensor `{name}` has a scale, but is no weight"))?;
        let tensor = match scale {
            [one] => Tensor::new(*one, &Device::Cpu)?,
            each => Tensor::from_slice(each, (each.len(), 1), &Device::Cpu)?,
        };
        out.insert(format!("{layer}{}", WEIGHT[0]), Source::dense(&tensor)?);
    }
    if out.len() > checkpoint.len() {
        let format = StorageDType::Quantized(QuantType::F8E4M3);
        let empty = Source::mapped(&Blob::Static(&[]), 0..0, format, vec![0]);
        out.insert(MARKER, empty);
    }
    Ok(out)
}
