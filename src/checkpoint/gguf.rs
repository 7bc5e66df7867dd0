//! GGUF: the header of a mapped file, every length checked against the file before it is believed.
//!
//! Source: the specification in ggml's `docs/gguf.md`. Writing stands in `gguf_write`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use candle::quantized::GgmlDType;
use safetensors::Dtype;

use super::{Checkpoint, Source, dtype::StorageDType, record};
use crate::{files::Blob, quant::QuantType, ui};

/// The first bytes of a file.
pub(super) const MAGIC: &[u8] = b"GGUF";
/// Under which key a file that fastflux wrote has its record.
pub(super) const RECORD: &str = "fastflux.record";
/// Where each tensor's shape stands when GGUF could not hold it (ComfyUI-GGUF).
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";
/// Dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMENSIONS: u32 = 4;
/// Bytes of a key or a tensor's name.
const MAX_NAME: usize = 512;
/// Nesting of arrays; nothing in use nests them.
const MAX_NESTING: usize = 4;

/// The number of a format in a file, for those that are read and written.
pub(super) fn number(format: StorageDType) -> Option<u32> {
    Some(match format {
        StorageDType::Plain(Dtype::F32) => 0,
        StorageDType::Plain(Dtype::F16) => 1,
        StorageDType::Plain(Dtype::BF16) => 30,
        StorageDType::Quantized(QuantType::Blocks(dtype)) => match dtype {
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q4_1 => 3,
            GgmlDType::Q5_0 => 6,
            GgmlDType::Q5_1 => 7,
            GgmlDType::Q8_0 => 8,
            GgmlDType::Q2K => 10,
            GgmlDType::Q3K => 11,
            GgmlDType::Q4K => 12,
            GgmlDType::Q5K => 13,
            GgmlDType::Q6K => 14,
            _ => return None,
        },
        _ => return None,
    })
}

fn formats() -> impl Iterator<Item = StorageDType> {
    let plain = [Dtype::F32, Dtype::F16, Dtype::BF16].map(StorageDType::Plain);
    let packed = QuantType::ALL.into_iter().map(StorageDType::Quantized);
    plain
        .into_iter()
        .chain(packed)
        .filter(|f| number(*f).is_some())
}

/// What ggml calls a type that is not read (`ggml_type`).
fn name_of(kind: u32) -> String {
    let name = match kind {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return kind.to_string(),
    };
    name.to_owned()
}

/// Reads the header of a GGUF file.
///
/// # Errors
/// When the file is cut off, lies about a length or an offset, or has tensors that overlap or are in a format that is not
/// read; the message names the file, and the tensor where it is one's. Whose architecture it is its tensors tell.
pub(super) fn read(name: &str, blob: &Blob) -> Result<Checkpoint> {
    header(name, blob).with_context(|| format!("`{name}` cannot be read as GGUF"))
}

fn header(name: &str, blob: &Blob) -> Result<Checkpoint> {
    let mut cursor = Cursor {
        bytes: blob,
        at: MAGIC.len(),
    };
    let version = cursor.u32()?;
    ensure!(
        version == 2 || version == 3,
        "its version is {version}; 2 and 3 are read"
    );
    let (tensors, pairs) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = Metadata::default();
    for _ in 0..pairs {
        let key = cursor.name().context("a metadata key")?;
        metadata
            .read(&key, &mut cursor)
            .with_context(|| format!("metadata `{key}`"))?;
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        let name = cursor.name().context("a tensor's name")?;
        let info = Info::read(&mut cursor).with_context(|| format!("tensor `{name}`"))?;
        infos.push((name, info));
    }
    let alignment = metadata.alignment.unwrap_or(32);
    ensure!(
        alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment),
        "its `general.alignment` is {alignment}"
    );
    let data = cursor.at.next_multiple_of(alignment as usize);
    let mut out = Checkpoint {
        name: name.to_owned(),
        metadata: metadata.texts,
        architecture: metadata.architecture,
        ..Checkpoint::default()
    };
    let size = |info: &Info| info.offset.checked_add(info.bytes as u64);
    let end = infos
        .iter()
        .filter_map(|(_, info)| size(info))
        .max()
        .unwrap_or(0);
    let missing = (data as u64)
        .saturating_add(end)
        .saturating_sub(blob.len() as u64);
    ensure!(
        missing == 0 || end == 0,
        "it is cut off, {missing} of {} bytes are missing\nhint: fetch the file again",
        (data as u64).saturating_add(end)
    );
    infos.sort_by_key(|(_, info)| (info.offset, info.bytes));
    let mut before: Option<(&str, u64)> = None;
    for (tensor, info) in &infos {
        if let Some((other, end)) = before.filter(|(_, end)| *end > info.offset && info.bytes > 0) {
            bail!(
                "the tensors `{other}` and `{tensor}` overlap: the first ends at {end}, the other begins at {}",
                info.offset
            );
        }
        if info.bytes > 0 {
            before = size(info).map(|end| (tensor.as_str(), end));
        }
    }
    for (tensor, info) in infos {
        ensure!(
            info.offset.is_multiple_of(alignment),
            "tensor `{tensor}` lies at offset {}, no multiple of {alignment}",
            info.offset
        );
        // checked above: all of it lies in the file
        let start = data + info.offset as usize;
        let stored = Source::mapped(blob, start..start + info.bytes, info.format, info.shape);
        let source = match metadata.shapes.get(&tensor) {
            Some(shape) => stored.rearranged(shape).with_context(|| {
                format!("tensor `{tensor}`, of which `{ORIGINAL_SHAPE}{tensor}` speaks")
            })?,
            None => stored,
        };
        ensure!(!out.contains(&tensor), "it holds two tensors `{tensor}`");
        out.insert(tensor, source);
    }
    Ok(out)
}

/// What the header says of one tensor.
struct Info {
    format: StorageDType,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

impl Info {
    fn read(cursor: &mut Cursor) -> Result<Self> {
        let dimensions = cursor.u32()?;
        ensure!(
            dimensions <= MAX_DIMENSIONS,
            "it has {dimensions} dimensions, the most is {MAX_DIMENSIONS}"
        );
        let mut shape = (0..dimensions)
            .map(|_| Ok(usize::try_from(cursor.u64()?)?))
            .collect::<Result<Vec<_>>>()?;
        // the file has the innermost first
        shape.reverse();
        let kind = cursor.u32()?;
        let format = formats()
            .find(|f| number(*f) == Some(kind))
            .with_context(|| {
                let known: Vec<String> = formats().map(|f| f.to_string()).collect();
                format!(
                    "its GGML type {} is not supported\nhint: these are: {}",
                    name_of(kind),
                    known.join(", ")
                )
            })?;
        let values = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        // so that the sizes below cannot overflow
        let values = values.filter(|n| *n <= usize::MAX / 8);
        let values = values.with_context(|| format!("its shape {shape:?} has too many values"))?;
        let width = shape.last().copied().unwrap_or(1);
        ensure!(
            width.is_multiple_of(format.block()),
            "its rows of {width} values are no whole blocks of {format} ({})",
            format.block()
        );
        let bytes = format.bytes(values);
        Ok(Self {
            format,
            shape,
            offset: cursor.u64()?,
            bytes,
        })
    }
}

#[derive(Default)]
struct Metadata {
    texts: BTreeMap<String, String>,
    shapes: BTreeMap<String, Vec<usize>>,
    architecture: Option<String>,
    alignment: Option<u64>,
}

impl Metadata {
    fn read(&mut self, key: &str, cursor: &mut Cursor) -> Result<()> {
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        let kind = cursor.u32()?;
        match (key, kind) {
            ("general.architecture", STRING) => {
                self.architecture = Some(ui::printable_name(&cursor.string()?, 60));
            }
            ("general.alignment", 4) => self.alignment = Some(u64::from(cursor.u32()?)),
            (RECORD, STRING) => {
                self.texts.insert(record::KEY.to_owned(), cursor.string()?);
            }
            (key, ARRAY) if key.starts_with(ORIGINAL_SHAPE) => {
                let (kind, count) = (cursor.u32()?, cursor.u64()?);
                ensure!(count <= 8, "expected up to eight integers");
                let shape = (0..count).map(|_| cursor.size(kind));
                let tensor = key.trim_start_matches(ORIGINAL_SHAPE).to_owned();
                self.shapes
                    .insert(tensor, shape.collect::<Result<Vec<_>>>()?);
            }
            (_, kind) => cursor.skip(kind, 0)?,
        }
        Ok(())
    }
}

/// A place in the header; nothing is read beyond the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, count: u64) -> Result<&[u8]> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|n| self.at.checked_add(n));
        let end = end.filter(|end| *end <= self.bytes.len()).with_context(|| {
            format!(
                "{count} bytes are to follow byte {}, and the file ends at {}: it is cut off, or lies about a length",
                self.at,
                self.bytes.len()
            )
        })?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N as u64)?.try_into()?)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// An integer of any width that counts something.
    fn size(&mut self, kind: u32) -> Result<usize> {
        let bytes = match kind {
            0 | 1 => 1,
            2 | 3 => 2,
            4 | 5 => 4,
            10 | 11 => 8,
            _ => bail!("expected integers, found values of type {kind}"),
        };
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(self.take(bytes as u64)?);
        Ok(usize::try_from(u64::from_le_bytes(value))?)
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A string that names something: of one line and not longer than anybody reads.
    fn name(&mut self) -> Result<String> {
        let text = self.string()?;
        ensure!(
            text.len() <= MAX_NAME && !text.chars().any(char::is_control),
            "`{}` is no name",
            ui::printable_name(&text, 60)
        );
        Ok(text)
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u32, nesting: usize) -> Result<()> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => self.u64()?,
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                ensure!(nesting < MAX_NESTING, "arrays in arrays in arrays");
                for _ in 0..count {
                    self.skip(kind, nesting + 1)?;
                }
                return Ok(());
            }
            _ => bail!("a value of the unknown type {kind}"),
        };
        self.take(size).map(drop)
    }
}
