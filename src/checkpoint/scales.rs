//! Scales of weights, which stand as tensors of their own next to them: found on reading, put back on writing.
//!
//! Every spelling in use: `<layer>.scale_weight`, with or without the marker `scaled_fp8` (ComfyUI's first files), and
//! `<layer>.weight_scale` with a JSON `<layer>.comfy_quant` or the header's `_quantization_metadata`, or with neither
//! (compressed-tensors). Scales of activations (`scale_input`, `input_scale`) are for products in float8, which are not
//! made here, and are dropped. Source: ComfyUI `comfy/ops.py` and `comfy/utils.py` (`convert_old_quants`).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use candle::{Device, Tensor};
use safetensors::Dtype;
use serde_json::Value;

use super::{Checkpoint, Source, dtype::StorageDType};
use crate::{files::Blob, quant::QuantType};

/// The marker that a file's float8 weights have scales.
const MARKER: &str = "scaled_fp8";
/// The header's metadata that names each layer's format.
const METADATA: &str = "_quantization_metadata";
/// What a layer's scale is called, by both generations of files; the first is written.
const WEIGHT: [&str; 2] = [".scale_weight", ".weight_scale"];
/// A layer's JSON.
const QUANT: &str = ".comfy_quant";
/// Next to a layer, of no use here.
const DROPPED: [&str; 2] = [".scale_input", ".input_scale"];

/// The formats that a file's header names for layers, by the layers' names in the part; `full` has the names in the file
/// of the part's tensors.
pub(super) fn layer_formats(
    metadata: &BTreeMap<String, String>,
    full: &BTreeMap<String, &str>,
) -> BTreeMap<String, String> {
    let json = metadata.get(METADATA);
    let json: Option<Value> = json.and_then(|text| serde_json::from_str(text).ok());
    let Some(layers) = json
        .as_ref()
        .and_then(|json| json.get("layers")?.as_object())
    else {
        return BTreeMap::new();
    };
    let format = |layer: &str| Some(layers.get(layer)?.get("format")?.as_str()?.to_owned());
    let of = |(own, full): (&String, &&str)| {
        let (own, full) = (own.strip_suffix(".weight")?, full.strip_suffix(".weight")?);
        Some((own.to_owned(), format(full).or_else(|| format(own))?))
    };
    full.iter().filter_map(of).collect()
}

/// The part of a file with each scale at its weight, and nothing else next to the weights. `formats`: those that the
/// header names for layers.
///
/// # Errors
/// When a scale has no weight, another shape than (), (1) or (rows, 1), or a layer is in a format that is not read.
pub(super) fn attached(
    checkpoint: Checkpoint,
    formats: &BTreeMap<String, String>,
) -> Result<Checkpoint> {
    let is_extra = |name: &str| {
        let ends = WEIGHT.iter().chain(&DROPPED).chain([&QUANT]);
        name.ends_with(MARKER) || ends.into_iter().any(|end| name.ends_with(end))
    };
    if formats.is_empty() && !checkpoint.names().any(is_extra) {
        return Ok(checkpoint);
    }
    let mut out = checkpoint.rename(|name| (!is_extra(name)).then(|| name.to_owned()))?;
    let mut formats = formats.clone();
    for (name, source) in checkpoint.iter() {
        if let Some(layer) = name.strip_suffix(QUANT) {
            let format = format_of(source)
                .with_context(|| format!("`{}`: tensor `{name}`", checkpoint.name))?;
            formats.insert(layer.to_owned(), format);
        }
    }
    for (layer, format) in &formats {
        let weight = format!("{layer}.weight");
        if let Some(source) = out.remove(&weight) {
            let read = as_format(source, format)
                .with_context(|| format!("`{}`: layer `{layer}`", checkpoint.name))?;
            out.insert(weight, read);
        }
    }
    for (name, source) in checkpoint.iter() {
        let Some(layer) = WEIGHT.iter().find_map(|end| name.strip_suffix(end)) else {
            continue;
        };
        let weight = format!("{layer}.weight");
        let scaled = out
            .remove(&weight)
            .with_context(|| format!("there is no `{weight}` that it could scale"))
            .and_then(|weight| scale(source, weight))
            .with_context(|| format!("`{}`: tensor `{name}`", checkpoint.name))?;
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
    ensure!(
        weight.format().is_float(),
        "its weight is stored as {}, and nothing says what that stands for\nhint: use a file in float8_e4m3fn, bf16 or GGUF",
        weight.format()
    );
    weight.with_scale(scale.values(0..scale.elements())?)
}

/// The format that newer files state for each layer.
fn format_of(source: &Source) -> Result<String> {
    let json: Value = serde_json::from_slice(&source.bytes()?).context("is not valid JSON")?;
    let format = json.get("format").and_then(Value::as_str);
    Ok(format.unwrap_or_default().to_owned())
}

/// A weight read as the format that its file names.
fn as_format(weight: Source, format: &str) -> Result<Source> {
    let quant = match format {
        "float8_e4m3fn" => QuantType::F8E4M3,
        "float8_e5m2" => QuantType::F8E5M2,
        _ => bail!(
            "it is in the format `{format}`, which is not supported\nhint: use a file in float8_e4m3fn, bf16 or GGUF"
        ),
    };
    match weight.format() {
        StorageDType::Plain(Dtype::U8 | Dtype::I8) => {
            weight.reinterpreted(StorageDType::Quantized(quant))
        }
        // what is stored wider has been dequantized, or was left as it was
        _ => Ok(weight),
    }
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
