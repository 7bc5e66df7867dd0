//! A whole pipeline in diffusers layout: `model_index.json` and the parts next to the transformer, as they are.

use std::{fs, path::Path, str::FromStr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Pipeline, VaeFiles};
use crate::{
    checkpoint::{is_weights, output, transformer_json},
    files::Files,
    layout::TextModel,
};

/// `--whole`: how the parts get into the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copying {
    /// Files of their own.
    Copy,
    /// Weights as hard links to those of the base, copies if that cannot be.
    Link,
}

impl FromStr for Copying {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "copy" => Ok(Self::Copy),
            "link" => Ok(Self::Link),
            _ => Err("expected copy or link".to_owned()),
        }
    }
}

const INDEX: &str = "model_index.json";
const HINT: &str = "--whole copies parts in diffusers layout, with a config.json each\nhint: name a folder of such a pipeline with --text-encoders and --vae";

/// The parts of a pipeline next to its transformer.
#[derive(Clone, Debug)]
pub struct WholePipeline {
    index: Value,
    scheduler: Value,
    /// The folder of each part, and its files.
    parts: Vec<(String, Files, Vec<String>)>,
    copying: Copying,
}

impl Pipeline {
    /// Finds the other parts of this model's pipeline.
    ///
    /// # Errors
    /// When one is missing, or not in diffusers layout.
    pub fn whole(&self, copying: Copying) -> Result<WholePipeline> {
        let text = self.text_files()?;
        let Some(root) = text.folder.filter(|_| text.weights.is_empty()) else {
            bail!(
                "the text encoders of `{}` are single files: {HINT}",
                self.name
            );
        };
        let VaeFiles::Folder(vae) = self.vae_files()? else {
            bail!("the VAE of `{}` is a single file: {HINT}", self.name);
        };
        let index = root.json(INDEX)?.filter(|index| {
            let class = index["_class_name"].as_str();
            class.is_some_and(|class| class.starts_with("Flux"))
        });
        let index = index.unwrap_or_else(|| index_of(self.config.family.text));
        let mut parts = Vec::new();
        for (name, class) in index.as_object().into_iter().flatten() {
            let is_part = class.as_array().is_some_and(|class| !class[0].is_null());
            if !is_part || ["transformer", "scheduler"].contains(&name.as_str()) {
                continue;
            }
            let folder = if name == "vae" {
                vae.clone()
            } else {
                root.sub(name)
            };
            let files = needed(&folder)?;
            let described = folder.describe("");
            ensure!(!files.is_empty(), "there is no `{described}`: {HINT}");
            let is_model = ["vae", "text_encoder"]
                .iter()
                .any(|model| name.starts_with(model));
            ensure!(
                !is_model || files.iter().any(|file| file == "config.json"),
                "`{described}` holds no config.json: {HINT}"
            );
            parts.push((name.clone(), folder, files));
        }
        Ok(WholePipeline {
            index,
            scheduler: self.scheduler.clone(),
            parts,
            copying,
        })
    }
}

/// The files of a part that diffusers reads: of weights the safetensors alone, and of those not the variants.
fn needed(folder: &Files) -> Result<Vec<String>> {
    let names = folder.list()?;
    let is_other = |name: &str| {
        let ending = name.rsplit('.').next().unwrap_or_default();
        [
            "bin",
            "h5",
            "md",
            "msgpack",
            "onnx",
            "onnx_data",
            "ot",
            "pt",
            "pth",
        ]
        .contains(&ending)
    };
    let is_variant = |name: &str| {
        let stem = name.split('.').next().unwrap_or_default();
        name.ends_with(".safetensors")
            && name != format!("{stem}.safetensors")
            && names.contains(&format!("{stem}.safetensors"))
    };
    let mut out = Vec::new();
    for name in names
        .iter()
        .filter(|name| !name.starts_with('.') && !is_other(name) && !is_variant(name))
    {
        // a folder is no file
        if !folder.sub(name).list().is_ok_and(|below| !below.is_empty()) {
            out.push(name.clone());
        }
    }
    Ok(out)
}

/// What diffusers' pipeline of a family consists of.
fn index_of(text: TextModel) -> Value {
    match text {
        TextModel::ClipAndT5 => json!({
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }),
        TextModel::Qwen3 => json!({
            "_class_name": "Flux2KleinPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }),
    }
}

impl WholePipeline {
    /// Whether a file becomes a link: what people edit does not.
    fn is_linked(&self, file: &str) -> bool {
        self.copying == Copying::Link && is_weights(file)
    }

    /// Bytes of the other parts that are written; a link takes none.
    ///
    /// # Errors
    /// When a file cannot be fetched.
    pub fn bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for (_, folder, files) in &self.parts {
            for file in files.iter().filter(|file| !self.is_linked(file)) {
                bytes += folder.size(file)?;
            }
        }
        Ok(bytes)
    }

    /// Writes them next to the sub-folder `transformer`, which is in `folder` already.
    ///
    /// # Errors
    /// When a file cannot be read or the disk is full.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let sub = |name: &str| {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create `{}`", path.display()))?;
            anyhow::Ok(path)
        };
        for (name, part, files) in &self.parts {
            let target = sub(name)?;
            for file in files {
                part.place(file, &target.join(file), self.is_linked(file))?;
            }
        }
        output::write_json(
            &sub("scheduler")?.join("scheduler_config.json"),
            &self.scheduler,
        )?;
        let transformer = Files::folder(folder.join("transformer")).json("config.json")?;
        let transformer = transformer.context("the transformer has no config.json")?;
        let mut index = self.index.clone();
        index["transformer"] = transformer_json::module_and_class(&transformer);
        output::write_json(&folder.join(INDEX), &index)
    }
}
