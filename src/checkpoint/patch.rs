//! Pruned models as what differs from their base: a few hundred megabytes where the whole checkpoint has gigabytes. One file
//! holds one or several levels, each with its record; kept blocks are renamed, and no byte of them is copied.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Checkpoint, convert, keys,
    record::{self, Record},
};
use crate::{
    files::Blob,
    layout::{self, BlockKind, BlockSpec, FluxConfig},
};

/// The metadata key that makes a file a patch.
const KEY: &str = "fastflux-patch";
/// The version of the form that this build writes and the newest it reads.
const VERSION: u32 = 1;
/// Before the level's name in the names of LoRA factors.
const LORA: &str = "lora/";
/// The metadata of a LoRA that `train-sandwich` wrote: the layout of the pruned model that it was trained in.
pub const LORA_LAYOUT: &str = "fastflux-layout";
/// How a patch is called in a folder.
pub const PATCH_FILE: &str = "patch.safetensors";

/// What a patch says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Header {
    version: u32,
    licence: String,
    /// The record of each pruned model, by the name of its level.
    levels: BTreeMap<String, Value>,
}

/// An opened patch: its header is read, its tensors are not.
#[derive(Clone, Debug)]
pub struct Patch {
    /// How messages name it.
    pub name: String,
    file: Checkpoint,
    levels: BTreeMap<String, Record>,
}

/// One pruned model of a patch.
#[derive(Clone, Debug)]
pub struct Level {
    /// What is known of the pruned model.
    pub record: Record,
    /// The tensors that the base has not got, under the names that they have in the pruned checkpoint.
    pub tensors: Checkpoint,
}

/// Whether `path` is a patch, or a folder with one and no weights next to it.
pub fn find(path: &Path) -> Option<std::path::PathBuf> {
    let file = if path.is_dir() {
        let weights = ["flux.safetensors", "transformer"];
        let whole = weights.iter().any(|name| path.join(name).exists());
        path.join(PATCH_FILE)
            .is_file()
            .then(|| path.join(PATCH_FILE))
            .filter(|_| !whole)?
    } else {
        path.to_path_buf()
    };
    let blob = Blob::map(&file).ok()?;
    let opened = Checkpoint::from_blob(&file.display().to_string(), &blob).ok()?;
    opened.metadata.contains_key(KEY).then_some(file)
}

impl Patch {
    /// Opens a patch.
    ///
    /// # Errors
    /// When the file is missing, damaged, or no patch.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = Checkpoint::from_blob(&name, &Blob::map(path).context("--patch")?)?;
        let Some(text) = file.metadata.get(KEY) else {
            bail!(
                "--patch: `{name}` is no patch of fastflux\nhint: `fastflux diff` makes one of a pruned model"
            );
        };
        let header: Header = serde_json::from_str(text)
            .with_context(|| format!("`{name}`: its metadata `{KEY}` is damaged"))?;
        ensure!(
            header.version <= VERSION,
            "`{name}` was written by a newer fastflux (patch version {}, this build reads {VERSION})\nhint: update fastflux",
            header.version
        );
        let levels = header.levels.into_iter().map(|(level, value)| {
            let record = Record::from_value(&name, value)?;
            Ok((level, record))
        });
        let levels = levels.collect::<Result<BTreeMap<_, _>>>()?;
        ensure!(!levels.is_empty(), "`{name}` holds no pruned model");
        Ok(Self { name, file, levels })
    }

    /// The names of its levels.
    pub fn levels(&self) -> Vec<&str> {
        self.levels.keys().map(String::as_str).collect()
    }

    /// The pruned model called `level`, or the only one.
    ///
    /// # Errors
    /// When there is none of that name, or several and none is named.
    pub fn level(&self, level: Option<&str>) -> Result<Level> {
        let all = self.levels().join(", ");
        let level = match (level, self.levels().as_slice()) {
            (Some(level), _) => level,
            (None, [one]) => one,
            (None, _) => bail!(
                "`{}` holds several pruned models\nhint: name one of them: --level {}",
                self.name,
                all.replace(", ", " or ")
            ),
        };
        let record = self
            .levels
            .get(level)
            .with_context(|| format!("--level {level}: `{}` has the levels {all}", self.name))?;
        let prefix = format!("{level}/");
        let tensors = self
            .file
            .rename(|name| Some(name.strip_prefix(&prefix)?.to_owned()))?;
        Ok(Level {
            record: record.clone(),
            tensors,
        })
    }
}

impl Level {
    /// The pruned model that `base` becomes; `base_name` and `patch` are for messages.
    ///
    /// # Errors
    /// When `base` is not the model that the patch was made for.
    pub fn apply(&self, base: &Checkpoint, base_name: &str, patch: &str) -> Result<Checkpoint> {
        let found = record::fingerprint(base)?;
        ensure!(
            found == self.record.base_fingerprint,
            "the patch `{patch}` is for `{}` (fingerprint {}), and `{base_name}` is another model (fingerprint {found})",
            self.record.base,
            self.record.base_fingerprint
        );
        let mut out = kept(base, &self.record.layout)?;
        for (name, source) in self.tensors.iter() {
            out.insert(name, source.clone());
        }
        Ok(out)
    }
}

/// What `layout` keeps of an unpruned model, under the names that it has in the pruned checkpoint; as safetensors hold it.
fn kept(base: &Checkpoint, layout: &[BlockSpec]) -> Result<Checkpoint> {
    let slots = slots(layout);
    let kept = base.rename(|name| {
        let Some(key) = keys::parse(name) else {
            return Some(name.to_owned());
        };
        let here = format!("{}.{}", key.kind.prefix(), key.slot);
        Some(format!("{}.{}", slots.get(&here)?, key.tail))
    })?;
    Ok(convert::for_safetensors(&kept).0)
}

/// Where the blocks of an unpruned model that are kept stand in the pruned one.
fn slots(layout: &[BlockSpec]) -> BTreeMap<String, String> {
    let mut next = [0, 0];
    let mut out = BTreeMap::new();
    for spec in layout.iter().filter(|spec| spec.has_tensors()) {
        let next = &mut next[usize::from(spec.kind() == BlockKind::Single)];
        if let BlockSpec::Original(id) = spec {
            let prefix = id.kind.prefix();
            out.insert(format!("{prefix}.{}", id.index), format!("{prefix}.{next}"));
        }
        *next += 1;
    }
    out
}

/// The LoRA that a patch holds for the pruned model called `level`, or for its only one; `None` if it holds none, or `file` is
/// no patch.
///
/// # Errors
/// When there are several and none is named, or the header is damaged.
pub fn lora(file: &Checkpoint, level: Option<&str>) -> Result<Option<Checkpoint>> {
    let Some(text) = file.metadata.get(KEY) else {
        return Ok(None);
    };
    let header: Header = serde_json::from_str(text)
        .with_context(|| format!("`{}`: its metadata `{KEY}` is damaged", file.name))?;
    let prefix = |level: &str| format!("{LORA}{level}/");
    let has = |level: &str| file.names().any(|name| name.starts_with(&prefix(level)));
    let levels: Vec<&str> = header.levels.keys().map(String::as_str).collect();
    let with_lora: Vec<&str> = levels.into_iter().filter(|level| has(level)).collect();
    let level = match (level, with_lora.as_slice()) {
        (Some(level), _) => level,
        (None, []) => return Ok(None),
        (None, [one]) => one,
        (None, _) => bail!(
            "`{}` holds a LoRA for several pruned models\nhint: name one of them: --level {}",
            file.name,
            with_lora.join(" or ")
        ),
    };
    let prefix = prefix(level);
    let mut out = file.rename(|name| Some(name.strip_prefix(&prefix)?.to_owned()))?;
    if let Some(layout) = header.levels.get(level).map(|record| &record["layout"]) {
        out.metadata = BTreeMap::from([(LORA_LAYOUT.to_owned(), layout.to_string())]);
    }
    Ok(Some(out).filter(|lora| !lora.is_empty()))
}

/// The tensors of a pruned model that its base has not got.
///
/// # Errors
/// When a tensor cannot be read, or one of the base's is missing in the pruned model.
pub fn difference(base: &Checkpoint, pruned: &Checkpoint, record: &Record) -> Result<Checkpoint> {
    let mut kept = kept(base, &record.layout)?;
    let mut out = Checkpoint {
        name: pruned.name.clone(),
        ..Checkpoint::default()
    };
    for (name, source) in pruned.iter() {
        let same = match kept.remove(name) {
            Some(before) => before
                .same_bytes(source)
                .with_context(|| format!("tensor `{name}`"))?,
            None => false,
        };
        if !same {
            out.insert(name, source.clone());
        }
    }
    if let Some(missing) = kept.names().next() {
        bail!("`{}` lacks the tensor `{missing}` of its base", pruned.name);
    }
    Ok(out)
}

/// What a patch says of one pruned model.
#[derive(Clone, Debug)]
pub struct PatchLevel {
    /// What `--level` takes.
    pub name: String,
    /// What differs from the base.
    pub tensors: Checkpoint,
    /// What is known of the pruned model.
    pub record: Record,
    /// The factors that it was trained with and that are not in its weights.
    pub lora: Option<Checkpoint>,
}

/// A patch of pruned models.
///
/// # Errors
/// When two have one name, or are of different bases.
pub fn patch(levels: Vec<PatchLevel>) -> Result<Checkpoint> {
    let (mut out, mut records) = (Checkpoint::default(), BTreeMap::new());
    let base = levels
        .first()
        .map(|level| level.record.base_fingerprint.clone());
    for level in levels {
        let PatchLevel {
            name: level,
            tensors,
            record,
            lora,
        } = level;
        ensure!(
            Some(&record.base_fingerprint) == base.as_ref(),
            "`{}` was made from another model than the first one",
            tensors.name
        );
        for (name, source) in tensors.iter() {
            out.insert(format!("{level}/{name}"), source.clone());
        }
        for (name, source) in lora.iter().flat_map(Checkpoint::iter) {
            out.insert(format!("{LORA}{level}/{name}"), source.clone());
        }
        let known = records.insert(level.clone(), serde_json::to_value(&record)?);
        ensure!(
            known.is_none(),
            "two of the models are of the level {level}"
        );
    }
    let header = Header {
        version: VERSION,
        licence: "derived from its base, under the base's licence".to_owned(),
        levels: records,
    };
    out.metadata.insert("format".to_owned(), "pt".to_owned());
    out.metadata
        .insert(KEY.to_owned(), serde_json::to_string(&header)?);
    Ok(out)
}

/// How a pruned model is called among others of the same base: the share of blocks that are replaced, in percent.
pub fn level_name(layout: &[BlockSpec]) -> String {
    let all = layout::original_ids(layout).count();
    let kept = layout
        .iter()
        .filter(|spec| matches!(spec, BlockSpec::Original(_)))
        .count();
    format!("{}", (100 * (all - kept) + all / 2) / all.max(1))
}

/// Fails unless the model is pruned.
///
/// # Errors
/// The message names it.
pub fn check_pruned(name: &str, config: &FluxConfig, record: Option<&Record>) -> Result<Record> {
    let pruned = record.filter(|_| config.replaced().next().is_some());
    pruned.cloned().with_context(|| {
        format!("`{name}` has nothing replaced, so it is no different from its base\nhint: `fastflux prune` makes a pruned model")
    })
}
