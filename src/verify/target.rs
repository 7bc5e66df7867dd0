//! Whether other programs open a file, by the rules of their loaders: names of tensors, counted blocks, configuration.
//! Nothing is computed, and no weight is read.
//!
//! Sources: ComfyUI `comfy/model_detection.py` and `comfy/sd.py`, diffusers `loaders/single_file_utils.py` and
//! `models/modeling_utils.py`, stable-diffusion.cpp `flux.hpp` and `model.cpp`.

use std::{collections::BTreeSet, fmt, path::Path, str::FromStr};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::{
    checkpoint::{Checkpoint, config, diffusers, keys, output::DIFFUSERS_STEM, record::Record},
    files::{Blob, Files},
    layout::{BlockKind, Family},
};

/// Rotary axes of FLUX.1 and FLUX.2, which ComfyUI and stable-diffusion.cpp do not read but take for granted.
const FLUX1_AXES: &[usize] = &[16, 56, 56];
const FLUX2_AXES: &[usize] = &[32; 4];
/// Blocks of FLUX.1-dev, whose configuration diffusers fetches for a single file.
const FLUX1_BLOCKS: [usize; 2] = [19, 38];

/// A program that opens checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// diffusers, folders and single files.
    Diffusers,
    /// ComfyUI, with ComfyUI-GGUF for GGUF.
    ComfyUi,
    /// stable-diffusion.cpp.
    SdCpp,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "diffusers" => Ok(Self::Diffusers),
            "comfyui" => Ok(Self::ComfyUi),
            "sdcpp" => Ok(Self::SdCpp),
            _ => Err("expected diffusers, comfyui or sdcpp".to_owned()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Diffusers => "diffusers",
            Self::ComfyUi => "ComfyUI",
            Self::SdCpp => "stable-diffusion.cpp",
        })
    }
}

/// Whether and how a program opens a file.
#[derive(Clone, Debug, Serialize)]
pub struct TargetReport {
    /// The file or folder.
    pub file: String,
    /// The program.
    pub target: Target,
    /// Whether it opens and computes what it should.
    pub opens: bool,
    /// How, or why not.
    pub how: String,
    /// Double and single blocks that the file has tensors of.
    pub blocks: [usize; 2],
    /// Of these, how many are layers that stand for blocks.
    pub layers: usize,
}

impl TargetReport {
    /// As a line for people.
    pub fn text(&self) -> String {
        let verb = if self.opens { "opens" } else { "does not open" };
        format!("{} {verb} `{}`: {}", self.target, self.file, self.how)
    }
}

/// What the rules look at.
struct Found {
    raw: Checkpoint,
    diffusers_names: bool,
    gguf: bool,
    /// `config.json` of a folder.
    config: Option<Value>,
    folder: bool,
    /// For each kind the numbers of blocks with tensors of the original, and of replacement layers.
    kept: [BTreeSet<usize>; 2],
    layers: [BTreeSet<usize>; 2],
    axes: Option<Vec<usize>>,
    family: Family,
    /// Size of a head, by the norms of a kept block.
    head: Option<usize>,
}

/// Applies the rules of `target` to a file, or to a folder in diffusers layout.
///
/// # Errors
/// When the file is missing or damaged, or holds no FLUX model.
pub fn check(target: Target, path: &Path) -> Result<TargetReport> {
    let found = Found::open(path)?;
    let (opens, how) = match target {
        Target::ComfyUi => found.comfyui(),
        Target::Diffusers => found.diffusers(),
        Target::SdCpp => found.sdcpp(),
    };
    Ok(TargetReport {
        file: path.display().to_string(),
        target,
        opens,
        how,
        blocks: [0, 1].map(|kind| found.all(kind).len()),
        layers: found.layers.iter().map(BTreeSet::len).sum(),
    })
}

impl Found {
    fn open(path: &Path) -> Result<Self> {
        let (raw, config, gguf) = if path.is_dir() {
            let files = Files::folder(path);
            let inner = files.sub("transformer");
            let files = if inner.list()?.is_empty() {
                files
            } else {
                inner
            };
            let raw = Checkpoint::open_if_present(&files, DIFFUSERS_STEM)?;
            let raw = raw.with_context(|| {
                format!(
                    "`{}` is no folder in diffusers layout\nhint: name the file in it",
                    path.display()
                )
            })?;
            (raw, files.json("config.json")?, false)
        } else {
            let blob = Blob::map(path)?;
            let gguf = blob.starts_with(b"GGUF");
            (
                Checkpoint::from_blob(&path.display().to_string(), &blob)?,
                None,
                gguf,
            )
        };
        let diffusers_names = diffusers::is_diffusers(&raw);
        let record = Record::read(&raw.name, &raw.metadata)?;
        let canonical = config::canonical(&raw)?;
        let (mut kept, mut layers) = <([BTreeSet<usize>; 2], [BTreeSet<usize>; 2])>::default();
        for key in canonical.names().filter_map(keys::parse) {
            let kind = usize::from(key.kind == BlockKind::Single);
            let of = if key.of_replacement() {
                &mut layers
            } else {
                &mut kept
            };
            of[kind].insert(key.slot);
        }
        let norm = canonical
            .names()
            .find(|name| name.ends_with("query_norm.scale"));
        let head = norm.and_then(|name| canonical.get(name)?.shape().first().copied());
        Ok(Self {
            family: keys::family(canonical.names()),
            head,
            raw,
            diffusers_names,
            gguf,
            folder: path.is_dir(),
            config,
            kept,
            layers,
            axes: record.map(|record| record.axes_dims),
        })
    }

    fn all(&self, kind: usize) -> BTreeSet<usize> {
        self.kept[kind].union(&self.layers[kind]).copied().collect()
    }

    /// diffusers' class of the family.
    fn class(&self) -> &'static str {
        if self.family == Family::FLUX2 {
            "Flux2Transformer2DModel"
        } else {
            "FluxTransformer2DModel"
        }
    }

    /// Rows of `img_in`, which are the stream's width.
    fn width(&self) -> Option<usize> {
        let mut tensors = self.raw.iter();
        let found = tensors.find(|(name, _)| name.ends_with("img_in.weight"));
        found.and_then(|(_, source)| source.shape().first().copied())
    }

    /// How diffusers opens a file of whole blocks: it fetches the sizes of one model for all files of a family.
    fn single_file(&self, [double, single]: [usize; 2]) -> String {
        let class = self.class();
        let numbers = format!("num_layers={double}, num_single_layers={single}");
        if self.family == Family::FLUX1 {
            return if [double, single] == FLUX1_BLOCKS {
                format!("`{class}.from_single_file` opens it")
            } else {
                format!(
                    "`{class}.from_single_file(…, {numbers})` opens it; without the numbers it takes FLUX.1's"
                )
            };
        }
        let base = match self.width() {
            Some(3072) => "black-forest-labs/FLUX.2-klein-4B",
            Some(4096) => "black-forest-labs/FLUX.2-klein-9B",
            Some(6144) => "black-forest-labs/FLUX.2-dev",
            _ => "FOLDER",
        };
        format!(
            "`{class}.from_single_file(…, config=\"{base}\", subfolder=\"transformer\", {numbers})` opens it; without them it takes FLUX.2-dev's sizes"
        )
    }

    fn has_layers(&self) -> bool {
        self.layers.iter().any(|layers| !layers.is_empty())
    }

    /// The first number that is missing below the highest one.
    fn gap(&self) -> Option<String> {
        ["double_blocks", "single_blocks"]
            .iter()
            .enumerate()
            .find_map(|(kind, name)| {
                let all = self.all(kind);
                let gap = (0..all.last().map_or(0, |last| last + 1)).find(|i| !all.contains(i))?;
                Some(format!("{name}.{gap}"))
            })
    }

    fn other_axes(&self) -> Option<String> {
        let taken = if self.family == Family::FLUX2 {
            FLUX2_AXES
        } else {
            FLUX1_AXES
        };
        if let Some(axes) = self.axes.as_ref().filter(|axes| **axes != taken) {
            return Some(format!(
                "it takes the rotary axes {taken:?} for granted, this model's are {axes:?}"
            ));
        }
        let size: usize = taken.iter().sum();
        let head = self.head.filter(|head| *head != size)?;
        Some(format!(
            "it takes heads of {size} for granted, this model's are of {head}"
        ))
    }

    fn counts(&self) -> String {
        format!(
            "{} double and {} single blocks",
            self.all(0).len(),
            self.all(1).len()
        )
    }

    fn comfyui(&self) -> (bool, String) {
        if let Some(why) = self.other_axes() {
            return (false, why);
        }
        if self.kept[0].is_empty() {
            return (
                false,
                "it tells FLUX by a double block, and none was kept".to_owned(),
            );
        }
        if self.gguf && self.diffusers_names {
            return (false, "ComfyUI-GGUF takes original names only".to_owned());
        }
        if let Some(gap) = self.gap() {
            return (
                false,
                format!(
                    "it counts blocks up to the first gap, {gap}, and leaves the rest out without an error"
                ),
            );
        }
        if self.has_layers() {
            let node =
                "the node \"Load fastflux model\" (scripts/interop/comfyui_fastflux.py) opens it";
            return (
                false,
                if self.gguf {
                    "it knows no linear layers, whose blocks would run on random weights; convert to safetensors for the node of fastflux".to_owned()
                } else {
                    format!(
                        "its own loader knows no linear layers, whose blocks would run on random weights; {node}"
                    )
                },
            );
        }
        let loader = if self.gguf {
            "\"Unet Loader (GGUF)\" of ComfyUI-GGUF"
        } else {
            "\"Load Diffusion Model\""
        };
        (true, format!("{loader} finds {}", self.counts()))
    }

    fn diffusers(&self) -> (bool, String) {
        let blocks = [0, 1].map(|kind| self.all(kind).len());
        if self.folder {
            let Some(config) = &self.config else {
                return (false, "the folder has no config.json".to_owned());
            };
            let said = ["num_layers", "num_single_layers"]
                .map(|key| config[key].as_u64().map(|n| n as usize));
            if said != blocks.map(Some) {
                return (
                    false,
                    format!(
                        "config.json says {said:?} double and single blocks, the weights have {blocks:?}"
                    ),
                );
            }
            if !self.has_layers() {
                return (
                    true,
                    format!("`{}.from_pretrained` finds {}", self.class(), self.counts()),
                );
            }
            let class = config["auto_map"]["AutoModel"].as_str();
            return match class {
                Some(class) => (true, format!("`AutoModel.from_pretrained(…, trust_remote_code=True)` opens it as {class}; `{}` would fill {} blocks with random numbers", self.class(), self.layers.iter().map(BTreeSet::len).sum::<usize>())),
                None => (false, "the weights have linear layers, and config.json names no class that knows them\nhint: `prune --layout diffusers` writes it".to_owned()),
            };
        }
        if self.diffusers_names {
            return (
                false,
                "a single file must have original names; put it into a folder with a config.json"
                    .to_owned(),
            );
        }
        if let Some(gap) = self.gap() {
            return (
                false,
                format!("its converter takes every number up to the highest, and {gap} is missing"),
            );
        }
        if self.has_layers() {
            return (
                !self.gguf,
                format!(
                    "`{0}.from_single_file` fails at the linear layers; `fastflux_flux.Fast{0}.from_single_file` opens it (safetensors only)",
                    self.class()
                ),
            );
        }
        (true, self.single_file(blocks))
    }

    fn sdcpp(&self) -> (bool, String) {
        if self.folder || self.diffusers_names {
            return (
                false,
                "give it one file with original names: `fastflux convert` writes it".to_owned(),
            );
        }
        if let Some(why) = self.other_axes() {
            return (false, why);
        }
        if let Some(gap) = self.gap() {
            return (
                false,
                format!("it expects every block up to the highest number, and fails at {gap}"),
            );
        }
        if self.has_layers() {
            return (false, "it expects whole blocks and fails at the linear layers\nhint: prune with --form remove for it".to_owned());
        }
        // FLUX.2's it reads from the tensors
        let width = self.width().filter(|width| *width != 3072);
        if let Some(width) = width.filter(|_| self.family == Family::FLUX1) {
            return (
                false,
                format!("it takes a width of 3072 for granted, this model's is {width}"),
            );
        }
        (true, format!("`--diffusion-model` finds {}", self.counts()))
    }
}
