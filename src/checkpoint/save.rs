//! Streamed, atomic writing: a part of one tensor in memory at a time, a temporary sibling, then a rename.

use std::{
    collections::BTreeMap,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{Checkpoint, Source, gguf_write, scales};
pub use crate::files::output::write_bytes;
use crate::{files::output, quant::QuantType};

/// Writes a checkpoint with its metadata to `path`, which appears whole or not at all.
///
/// Peak memory is a few megabytes above the mapped input, whatever the size of the tensors.
///
/// # Errors
/// When the folder is not writable or the disk is full; nothing is left behind.
pub fn write(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    write_with(checkpoint, path, &mut |_| ())
}

/// As [`write()`]; `written` is told the bytes of each tensor that is done.
///
/// # Errors
/// As [`write()`].
pub fn write_with(
    checkpoint: &Checkpoint,
    path: &Path,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    output::write(path, |file| stream(checkpoint, file, written))
}

/// As [`write_with()`], in GGUF, for a checkpoint whose matrices are mostly in the format `main`.
///
/// # Errors
/// As [`write()`], and when a tensor is in a format that GGUF has not.
pub fn write_gguf(
    checkpoint: &Checkpoint,
    main: QuantType,
    path: &Path,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    output::write(path, |file| {
        gguf_write::write(checkpoint, main, file, written)
    })
}

/// The tensors as a safetensors file holds them: wide number formats first (so that all are aligned), then by name.
///
/// The order is that of the safetensors library, so a file that it wrote comes out as it went in.
fn in_file_order(checkpoint: &Checkpoint) -> Vec<(&str, &Source)> {
    let mut tensors: Vec<_> = checkpoint.iter().collect();
    tensors.sort_by(|(a, left), (b, right)| {
        let order = right.format().dtype().cmp(&left.format().dtype());
        order.then(a.cmp(b))
    });
    tensors
}

fn header(metadata: &BTreeMap<String, String>, tensors: &[(&str, &Source)]) -> Result<Vec<u8>> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut at = 0;
    for (name, source) in tensors {
        let end = at + source.byte_len();
        let format = source.format();
        let dtype = format
            .dtype()
            .with_context(|| format!("tensor `{name}`: safetensors has no {format}"))?;
        let entry = json!({ "dtype": dtype, "shape": source.shape(), "data_offsets": [at, end] });
        header.insert((*name).to_owned(), entry);
        at = end;
    }
    let mut bytes = serde_json::to_vec(&Value::Object(header))?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

fn stream(
    checkpoint: &Checkpoint,
    file: &mut std::fs::File,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    let checkpoint = &scales::detached(checkpoint)?;
    let tensors = in_file_order(checkpoint);
    let header = header(&checkpoint.metadata, &tensors)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (name, source) in tensors {
        source
            .write_to(&mut out)
            .with_context(|| format!("tensor `{name}`"))?;
        written(source.byte_len());
    }
    out.flush()?;
    let expected = (8 + header.len() + checkpoint.bytes()) as u64;
    let arrived = out.get_ref().metadata()?.len();
    ensure!(arrived == expected, "{arrived} of {expected} bytes arrived");
    Ok(())
}
