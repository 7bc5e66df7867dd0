//! A finished transformer as the files of a folder that `--model` opens, in either format. What goes in is decided elsewhere.

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    Checkpoint, diffusers,
    record::{self, Record},
    save, transformer_json,
};
use crate::layout::{Family, FluxConfig};

/// The stem of a weight file with original names.
pub const ORIGINAL_STEM: &str = "flux";
/// The stem of a transformer's weight file in diffusers layout.
pub const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

/// The module that diffusers loads with a model that it has no class of its own for; `scripts/interop/check_diffusers.py` tries it.
const DIFFUSERS_MODULE: &str = "fastflux_flux";
const DIFFUSERS_SOURCE: &str = include_str!("../../scripts/interop/fastflux_flux.py");

/// Makes diffusers' own classes refuse the folder, with this text in their error, instead of filling the blocks that they do
/// not find with random numbers. The class in [`DIFFUSERS_MODULE`] takes it out when it opens the folder.
const REFUSED: &str = "fastflux, for a model that diffusers has no class for: open it with AutoModel.from_pretrained(FOLDER, trust_remote_code=True)";

/// The class in that module for a family.
fn diffusers_class(family: &Family) -> &'static str {
    if *family == Family::FLUX2 {
        "FastFlux2Transformer2DModel"
    } else {
        "FastFluxTransformer2DModel"
    }
}

/// A `--layout` value: names and places of what is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Naming {
    /// Black Forest Labs' names in one file, `flux.safetensors`.
    #[default]
    Original,
    /// diffusers' names, in a sub-folder `transformer`.
    Diffusers,
}

impl FromStr for Naming {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "original" => Ok(Self::Original),
            "diffusers" => Ok(Self::Diffusers),
            _ => Err("expected original or diffusers".to_owned()),
        }
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Original => "original",
            Self::Diffusers => "diffusers",
        })
    }
}

impl Naming {
    /// A canonical checkpoint under this format's names; no byte is read.
    ///
    /// # Errors
    /// When a tensor has no counterpart in diffusers.
    pub fn named(self, checkpoint: &Checkpoint) -> Result<Checkpoint> {
        match self {
            Self::Original => Ok(checkpoint.clone()),
            Self::Diffusers => diffusers::from_original(checkpoint),
        }
    }
}

/// The metadata of a file that fastflux writes.
///
/// # Errors
/// When a number in the record is not finite.
pub fn metadata(record: Option<&Record>) -> Result<BTreeMap<String, String>> {
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if let Some(record) = record {
        metadata.insert(record::KEY.to_owned(), record.to_text()?);
    }
    Ok(metadata)
}

/// Writes the weights and the `config.json` of a canonical checkpoint into `folder`: `flux.safetensors` and
/// `config.json`, or both in diffusers' `transformer` sub-folder, with the Python class for it if diffusers has none.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write(
    folder: &Path,
    checkpoint: &Checkpoint,
    config: &FluxConfig,
    record: Option<&Record>,
    format: Naming,
) -> Result<()> {
    let (folder, stem) = match format {
        Naming::Original => (folder.to_path_buf(), ORIGINAL_STEM),
        Naming::Diffusers => (folder.join("transformer"), DIFFUSERS_STEM),
    };
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create `{}`", folder.display()))?;
    let mut named = format.named(checkpoint)?;
    named.metadata = metadata(record)?;
    save::write(&named, &folder.join(format!("{stem}.safetensors")))?;
    let mut json = transformer_json::write(config, record);
    if format == Naming::Diffusers && !transformer_json::is_stock(config) {
        let class = diffusers_class(&config.family);
        json["_class_name"] = class.into();
        json["auto_map"] =
            serde_json::json!({ "AutoModel": format!("{DIFFUSERS_MODULE}.{class}") });
        json["quantization_config"] = serde_json::json!({ "quant_method": REFUSED });
        save::write_bytes(
            &folder.join(format!("{DIFFUSERS_MODULE}.py")),
            DIFFUSERS_SOURCE.as_bytes(),
        )?;
    }
    write_json(&folder.join("config.json"), &json)
}

/// Writes a small JSON file for people to read, atomically.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    save::write_bytes(
        path,
        (serde_json::to_string_pretty(value)? + "\n").as_bytes(),
    )
}

#[cfg(test)]
mod tests;
