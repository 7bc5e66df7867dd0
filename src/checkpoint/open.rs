//! Opening: one file, the shards that an index names, or the one file of a folder.

use anyhow::{Context, Result, bail, ensure};
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::Value;

use super::{Checkpoint, Source, gguf, identify};
use crate::{
    files::{Blob, Files},
    ui,
};

/// Endings of files that hold weights and are opened.
const EXTENSIONS: [&str; 3] = ["safetensors", "sft", "gguf"];

/// The longest header of a safetensors file, in bytes: that of the largest model is a hundredth of it, and parsing takes
/// several times as much memory.
const MAX_HEADER: u64 = 16 << 20;

/// Bytes of a tensor's name.
const MAX_NAME: usize = 512;

/// Whether a file of this name holds weights that are opened.
pub fn is_weights(name: &str) -> bool {
    let ending = name
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_lowercase());
    ending.is_some_and(|ending| EXTENSIONS.contains(&ending.as_str()))
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
        for ending in ["sft", "gguf"] {
            let single = format!("{stem}.{ending}");
            if let Some(blob) = files.get(&single)? {
                return Self::from_blob(&files.describe(&single), &blob).map(Some);
            }
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
                !shard.contains(['/', '\\'])
                    && !shard.chars().any(char::is_control)
                    && shard != "..",
                "`{name}` names the shard `{}`, which is not a file next to it",
                ui::printable_name(shard, 200)
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
        ensure!(
            !blob.is_empty(),
            "`{file}` is empty\nhint: fetch the file again"
        );
        let whole = end_of_data(blob);
        if let Some(whole) = whole.filter(|whole| *whole < blob.len()) {
            self.notes.push(format!(
                "`{file}`: {} bytes follow the last tensor; they are not read",
                blob.len() - whole
            ));
        }
        let bytes = &blob[..whole.unwrap_or(blob.len()).min(blob.len())];
        let (header, parsed) =
            SafeTensors::read_metadata(bytes).map_err(|e| damaged(file, blob, whole, &e))?;
        let data = header + 8;
        if let Some(metadata) = parsed.metadata() {
            for (key, value) in metadata {
                self.metadata
                    .entry(key.clone())
                    .or_insert_with(|| value.clone());
            }
        }
        for (name, info) in parsed.tensors() {
            ensure!(
                name.len() <= MAX_NAME && !name.chars().any(char::is_control),
                "`{file}`: `{}` is no name of a tensor",
                ui::printable_name(&name, 60)
            );
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
}

/// Where the header says that the last tensor ends; `None` if there is no header that says so.
fn end_of_data(bytes: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let header = usize::try_from(length)
        .ok()
        .filter(|_| length <= MAX_HEADER)?;
    let json: Value = serde_json::from_slice(bytes.get(8..8 + header)?).ok()?;
    let end = |tensor: &Value| tensor.get("data_offsets")?.get(1)?.as_u64();
    let last = json
        .as_object()?
        .values()
        .filter_map(end)
        .max()
        .unwrap_or(0);
    (header + 8).checked_add(usize::try_from(last).ok()?)
}

/// The message for a file that is no safetensors file, by what is most likely wrong with it.
fn damaged(
    file: &str,
    blob: &[u8],
    whole: Option<usize>,
    error: &SafeTensorError,
) -> anyhow::Error {
    use SafeTensorError as E;
    if let Some(identity) = identify::by_bytes(blob) {
        return anyhow::anyhow!("`{file}` {identity}");
    }
    let cut = |missing: usize, all: usize| {
        anyhow::anyhow!(
            "`{file}` cannot be read as safetensors: it is cut off, {missing} of {all} bytes are missing\nhint: fetch the file again"
        )
    };
    if let Some(whole) = whole.filter(|whole| *whole > blob.len()) {
        return cut(whole - blob.len(), whole);
    }
    let length = blob.first_chunk().map(|length| u64::from_le_bytes(*length));
    let what = match (error, length) {
        (E::HeaderTooSmall, _) => "it is too short to be one\nhint: fetch the file again",
        (E::InvalidHeaderLength | E::InvalidHeaderDeserialization(_), Some(length))
            if (blob.len() as u64) < length.saturating_add(8) && length <= MAX_HEADER =>
        {
            return cut((length + 8) as usize - blob.len(), length as usize + 8);
        }
        (E::InvalidOffset(_) | E::TensorInvalidInfo | E::MetadataIncompleteBuffer, _) => {
            "its tensors overlap or do not fit their shapes: its header lies\nhint: fetch the file again"
        }
        _ => "it has no valid safetensors header",
    };
    let (what, hint) = what
        .split_once('\n')
        .unwrap_or((what, "hint: name a .safetensors, .sft or .gguf file"));
    anyhow::anyhow!("`{file}` cannot be read as safetensors: {what} ({error})\n{hint}")
}
