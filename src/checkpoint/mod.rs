//! Named tensors of one model part, lazily: opens files, renames, inserts, removes, serves a `VarBuilder`, saves.
//!
//! Knows names and bytes; no maths and no model code here. Opening reads headers only.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device};
use candle_nn::VarBuilder;
use safetensors::SafeTensors;

use crate::files::{Blob, Files};

mod backend;
pub mod config;
pub mod convert;
#[cfg(test)]
mod damage_tests;
pub mod diffusers;
mod diffusers_names;
mod dtype;
mod gguf;
mod gguf_write;
pub mod init;
pub mod keys;
pub mod lora;
pub mod output;
pub mod patch;
pub mod random;
pub mod record;
mod rotary;
pub mod save;
mod scales;
pub mod shapes;
mod source;
mod to_f32;
pub mod transformer_json;

use backend::Backend;

pub use crate::files::output as target;
pub use dtype::StorageDType;
pub use source::{Source, safetensors_dtype};

/// An ordered, lazy map from tensor names to their bytes. Cloning copies names, not data.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// How messages name the file or folder.
    pub name: String,
    /// The safetensors `__metadata__` of the (first) file.
    pub metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Source>,
}

impl Checkpoint {
    /// Opens one safetensors or GGUF file that is already mapped; `name` is for messages. Its first bytes say which.
    ///
    /// # Errors
    /// When the header is missing, lies about lengths or offsets, or holds an unknown dtype.
    pub fn from_blob(name: &str, blob: &Blob) -> Result<Self> {
        if blob.starts_with(gguf::MAGIC) {
            return gguf::read(name, blob);
        }
        let mut out = Self {
            name: name.to_owned(),
            ..Self::default()
        };
        out.add_file(name, blob)?;
        Ok(out)
    }

    /// Opens `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` names, in `files`.
    ///
    /// # Errors
    /// When neither exists, a shard is missing, or a file is damaged; the message names the file.
    pub fn open(files: &Files, stem: &str) -> Result<Self> {
        match Self::open_if_present(files, stem)? {
            Some(checkpoint) => Ok(checkpoint),
            None => bail!(
                "`{}` does not exist, nor does an index of its shards",
                files.describe(&format!("{stem}.safetensors"))
            ),
        }
    }

    /// As [`Checkpoint::open`], but `None` when there is neither the file nor an index.
    ///
    /// # Errors
    /// When a shard is missing or a file is damaged; the message names the file.
    pub fn open_if_present(files: &Files, stem: &str) -> Result<Option<Self>> {
        let single = format!("{stem}.safetensors");
        if let Some(blob) = files.get(&single)? {
            return Self::from_blob(&files.describe(&single), &blob).map(Some);
        }
        let index = format!("{single}.index.json");
        if files.get(&index)?.is_none() {
            return Ok(None);
        }
        Self::open_index(files, &index).map(Some)
    }

    /// Opens the shards that an index file names.
    ///
    /// # Errors
    /// When the index is malformed, a shard is missing or damaged, or a tensor it names is in no shard.
    pub fn open_index(files: &Files, index: &str) -> Result<Self> {
        let name = files.describe(index);
        let json = files
            .json(index)?
            .with_context(|| format!("`{name}` does not exist"))?;
        let map = json.get("weight_map").and_then(|m| m.as_object());
        let map = map
            .with_context(|| format!("`{name}` has no `weight_map`, so it is not a shard index"))?;
        let mut shards: Vec<&str> = Vec::new();
        for (tensor, shard) in map {
            let shard = shard
                .as_str()
                .with_context(|| format!("`{name}`: the shard of `{tensor}` is not a file name"))?;
            ensure!(
                !shard.contains(['/', '\\']) && shard != "..",
                "`{name}` names the shard `{shard}`, which is not a file next to it"
            );
            if !shards.contains(&shard) {
                shards.push(shard);
            }
        }
        let mut out = Self {
            name: name.clone(),
            ..Self::default()
        };
        for shard in &shards {
            let blob = files.get(shard)?.with_context(|| {
                format!("`{name}` names the shard `{shard}`, which does not exist\nhint: download all {} shards", shards.len())
            })?;
            out.add_file(&files.describe(shard), &blob)?;
        }
        if let Some(missing) = map.keys().find(|tensor| !out.contains(tensor)) {
            bail!("`{name}` names the tensor `{missing}`, which none of its shards holds");
        }
        Ok(out)
    }

    fn add_file(&mut self, file: &str, blob: &Blob) -> Result<()> {
        ensure!(!blob.is_empty(), "`{file}` is empty");
        let (header, parsed) =
            SafeTensors::read_metadata(blob).map_err(|e| damaged(file, blob, &e))?;
        let data = header + 8;
        if let Some(metadata) = parsed.metadata() {
            for (key, value) in metadata {
                self.metadata
                    .entry(key.clone())
                    .or_insert_with(|| value.clone());
            }
        }
        for (name, info) in parsed.tensors() {
            let (start, end) = info.data_offsets;
            let source = Source::mapped(
                blob,
                data + start..data + end,
                info.dtype.into(),
                info.shape.clone(),
            );
            let known = self.tensors.insert(name.clone(), source);
            ensure!(
                known.is_none(),
                "`{file}` holds the tensor `{name}`, which another shard holds too"
            );
        }
        Ok(())
    }

    /// Adds a tensor, or replaces the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, source: Source) {
        self.tensors.insert(name.into(), source);
    }

    /// Takes a tensor out.
    pub fn remove(&mut self, name: &str) -> Option<Source> {
        self.tensors.remove(name)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Source> {
        self.tensors.get(name)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// When there is none; the message names the checkpoint and the tensor.
    pub fn expect(&self, name: &str) -> Result<&Source> {
        self.get(name)
            .with_context(|| format!("`{}` lacks the tensor `{name}`", self.name))
    }

    /// The tensor of that name, which must hold numbers that are computed with.
    ///
    /// # Errors
    /// When it is missing or holds integers, say; the message names the checkpoint, the tensor and its dtype.
    pub fn expect_floats(&self, name: &str) -> Result<&Source> {
        let source = self.expect(name)?;
        ensure!(
            source.format().is_float(),
            "`{}`: tensor `{name}` is stored as {}, which is not read as weights\nhint: use a file in float32, float16, bfloat16, F8_E4M3 or GGUF",
            self.name,
            source.format()
        );
        Ok(source)
    }

    /// The dimensions of a tensor that must have `N` of them.
    ///
    /// # Errors
    /// When it is missing or has another number of dimensions.
    pub fn dims<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let shape = self.expect(name)?.shape();
        shape.try_into().ok().with_context(|| {
            format!(
                "`{}`: tensor `{name}` has shape {shape:?}, expected {N} dimensions",
                self.name
            )
        })
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names and tensors, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Source)> {
        self.tensors
            .iter()
            .map(|(name, source)| (name.as_str(), source))
    }

    /// All names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(Source::elements).sum()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(Source::byte_len).sum()
    }

    /// Bytes of all tensors in memory when the model computes in `dtype`: packed matrices stay as they are.
    pub fn bytes_loaded(&self, dtype: DType) -> usize {
        let sources = self.tensors.values();
        let bytes = sources.map(|source| match source.packed() {
            Some(_) => source.packed_bytes(),
            None => source.elements() * dtype.size_in_bytes(),
        });
        bytes.sum()
    }

    /// The tensors with new names; those for which `rename` gives `None` are dropped.
    ///
    /// # Errors
    /// When two tensors get the same name.
    pub fn rename(&self, rename: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut out = Self {
            name: self.name.clone(),
            metadata: self.metadata.clone(),
            tensors: BTreeMap::new(),
        };
        for (old, source) in &self.tensors {
            if let Some(new) = rename(old) {
                let known = out.tensors.insert(new.clone(), source.clone());
                ensure!(
                    known.is_none(),
                    "`{}`: two tensors map to `{new}`",
                    self.name
                );
            }
        }
        Ok(out)
    }

    /// A `VarBuilder` over these tensors that converts each to `dtype` when it is asked for.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let backend = Backend::new(self.clone(), Vec::new());
        VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
    }

    /// A `VarBuilder` over these tensors for weights that are read again and again. On a GPU the mapped files are page-locked
    /// as long as it or a clone of it lives, if they fit into 70 % of the host's free memory.
    pub fn offloaded_var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let backend = Backend::new(self.clone(), backend::page_lock(self, device));
        VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
    }
}

/// The message for a file that is no safetensors file, by what is most likely wrong with it.
fn damaged(file: &str, blob: &[u8], error: &safetensors::SafeTensorError) -> anyhow::Error {
    use safetensors::SafeTensorError as E;
    let what = match error {
        E::MetadataIncompleteBuffer | E::HeaderTooSmall | E::InvalidHeaderLength => {
            "it is cut off, or its header lies about its length"
        }
        _ if blob.starts_with(b"version https://git-lfs") => {
            "it is a Git LFS pointer, not the file itself"
        }
        E::HeaderTooLarge | E::InvalidHeader(_) | E::InvalidHeaderDeserialization(_) => {
            "it has no valid safetensors header"
        }
        E::InvalidOffset(_) | E::TensorInvalidInfo => {
            "its tensors overlap or do not fit their shapes"
        }
        _ => "it is damaged",
    };
    anyhow::anyhow!("`{file}` cannot be read as safetensors: {what} ({error})")
}

/// Adds what to do about a file that cannot be used, which depends on what it is for, to an error that does not say yet.
///
/// # Errors
/// Those of `result`.
pub fn with_hint<T>(result: Result<T>, hint: &str) -> Result<T> {
    result.map_err(|error| {
        let text = format!("{error:#}");
        if text.contains("\nhint:") {
            return error;
        }
        anyhow::anyhow!("{text}\nhint: {hint}")
    })
}
