//! Named tensors of one model part, lazily: opens files, renames, inserts, removes, serves a `VarBuilder`, saves.
//!
//! Knows names and bytes; no maths and no model code here. Opening reads headers only.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle::{DType, Device};
use candle_nn::VarBuilder;

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
mod identify;
pub mod init;
pub mod keys;
#[cfg(test)]
mod kinds_tests;
pub mod lora;
mod open;
pub mod output;
pub mod part;
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
pub use open::is_weights;

/// The bytes of a JSON file that a person named.
///
/// # Errors
/// When it is no file, cannot be read, or is larger than any such file.
pub fn read_small(path: &std::path::Path) -> Result<Vec<u8>> {
    crate::files::read_small(path, crate::files::MAX_SMALL)
}
pub use source::{Source, safetensors_dtype};

/// An ordered, lazy map from tensor names to their bytes. Cloning copies names, not data.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// How messages name the file or folder.
    pub name: String,
    /// The safetensors `__metadata__` of the (first) file.
    pub metadata: BTreeMap<String, String>,
    /// What the user should know about the file.
    pub notes: Vec<String>,
    /// What a GGUF file says its architecture is.
    pub architecture: Option<String>,
    tensors: BTreeMap<String, Source>,
}

impl Checkpoint {
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
            "`{}`: tensor `{name}` is stored as {}, which is not read as weights\nhint: use a file in float32, float16, bfloat16, float8 or GGUF",
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
            architecture: self.architecture.clone(),
            notes: self.notes.clone(),
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

/// Adds what to do about a file that cannot be used, which depends on what it is for, to an error that does not say yet.
///
/// # Errors
/// Those of `result`.
pub fn with_hint<T>(result: Result<T>, hint: &str) -> Result<T> {
    result.map_err(|error| {
        let text = format!("{error:#}");
        if let Some(what) = text.strip_suffix("\nhint: fetch the file again") {
            // what a run wrote itself is nowhere to be fetched
            return if hint.starts_with("name ") {
                anyhow::anyhow!("{what}\nhint: fetch the file again, or {hint}")
            } else {
                anyhow::anyhow!("{what}\nhint: {hint}")
            };
        }
        if text.contains("\nhint:") {
            return error;
        }
        anyhow::anyhow!("{text}\nhint: {hint}")
    })
}
