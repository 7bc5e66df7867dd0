//! Where one tensor's bytes come from: ranges of mapped files, random numbers, a value we made, or another format.

use std::{borrow::Cow, io::Write, ops::Range, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device, Tensor};
use safetensors::Dtype;

use super::{dtype::StorageDType, random::Random, to_f32};
use crate::files::Blob;

mod adapted;
mod delta;
mod rows;
mod sum;
mod values;

pub(super) use adapted::RowMap;
pub(super) use delta::{Delta, DeltaForm, Factor, Magnitude};

use adapted::Adapted;
use rows::cut;

/// How many bytes of a tensor are made at a time while it is written.
const STEP: usize = 16 << 20;

/// One named tensor of a checkpoint, not loaded yet. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Source {
    format: StorageDType,
    shape: Vec<usize>,
    data: Data,
    /// What stored values are multiplied by: one number, or one for each row.
    scale: Option<Arc<[f32]>>,
}

#[derive(Clone, Debug)]
enum Data {
    /// Byte ranges, one after another: a tensor as it lies on disk is one piece, a fused qkv made of `to_q`, `to_k`,
    /// `to_v` is three.
    Pieces(Vec<Piece>),
    /// A value that is cast to the number format only when it is read.
    Dense(Tensor),
    /// Another source, converted while it is read.
    Converted(Box<Source>),
    /// Others of f64, added up while they are read.
    Sum(Vec<Source>),
    /// Others of this number format and without scales, one below another.
    Rows(Vec<Source>),
    /// Another one and what LoRA files add to it.
    Adapted(Adapted),
}

#[derive(Clone, Debug)]
struct Piece {
    of: Whole,
    range: Range<usize>,
}

#[derive(Clone, Debug)]
enum Whole {
    Blob(Blob),
    Random(Random),
}

impl Piece {
    fn bytes(&self) -> Cow<'_, [u8]> {
        match &self.of {
            Whole::Blob(blob) => Cow::Borrowed(&blob[self.range.clone()]),
            Whole::Random(random) => Cow::Owned(random.bytes(self.range.clone())),
        }
    }

    fn write_to(&self, out: &mut dyn Write) -> std::io::Result<()> {
        match &self.of {
            Whole::Blob(blob) => out.write_all(&blob[self.range.clone()]),
            Whole::Random(random) => self.range.clone().step_by(STEP).try_for_each(|start| {
                out.write_all(&random.bytes(start..self.range.end.min(start + STEP)))
            }),
        }
    }
}

impl Source {
    /// A tensor that lies at `range` of a mapped file. The range was checked against the file by the header parser.
    pub(super) fn mapped(
        blob: &Blob,
        range: Range<usize>,
        format: StorageDType,
        shape: Vec<usize>,
    ) -> Self {
        Self::piece(format, shape, Whole::Blob(blob.clone()), range)
    }

    /// Random numbers, made when they are asked for: the same ones for a seed and name, whatever else is asked for.
    pub fn random(shape: Vec<usize>, random: Random) -> Self {
        let bytes = shape.iter().product::<usize>() * random.dtype().bitsize() / 8;
        let format = random.dtype().into();
        Self::piece(format, shape, Whole::Random(random), 0..bytes)
    }

    fn piece(format: StorageDType, shape: Vec<usize>, of: Whole, range: Range<usize>) -> Self {
        Self {
            format,
            shape,
            data: Data::Pieces(vec![Piece { of, range }]),
            scale: None,
        }
    }

    /// A tensor made in memory.
    ///
    /// # Errors
    /// When safetensors has no name for its dtype.
    pub fn dense(tensor: &Tensor) -> Result<Self> {
        Self::dense_as(tensor, tensor.dtype())
    }

    /// A tensor made in memory that is stored as `dtype`; it is cast a part at a time while it is written.
    ///
    /// # Errors
    /// When safetensors has no name for the dtype.
    pub fn dense_as(tensor: &Tensor, dtype: DType) -> Result<Self> {
        Ok(Self {
            format: safetensors_dtype(dtype)?.into(),
            shape: tensor.dims().to_vec(),
            data: Data::Dense(tensor.clone()),
            scale: None,
        })
    }

    /// The same numbers in another format, converted a part at a time while they are written; as it is if it has the
    /// format (and scale) already. `scale` is what float8 values are multiplied by again.
    #[must_use]
    pub fn converted(&self, format: StorageDType, scale: Option<f32>) -> Self {
        if self.format == format && (scale.is_none() == self.scale.is_none()) {
            return self.clone();
        }
        Self {
            format,
            shape: self.shape.clone(),
            data: Data::Converted(Box::new(self.clone())),
            scale: scale.map(|s| Arc::from([s])),
        }
    }

    /// The values multiplied by one number, or by one for each row. float8 keeps its bytes; any other format becomes
    /// float32, computed when it is read.
    ///
    /// # Errors
    /// When the values are no floats, a scale is NaN or infinite, or there is another number of scales than rows.
    pub fn with_scale(mut self, scale: Vec<f32>) -> Result<Self> {
        ensure!(
            self.format.is_float(),
            "a tensor of {} has a scale next to it, which only floats may have",
            self.format
        );
        let rows = self.shape.first().copied().unwrap_or(1);
        ensure!(
            scale.len() == 1 || scale.len() == rows,
            "{} scales for shape {:?}, expected 1 or {rows}",
            scale.len(),
            self.shape
        );
        ensure!(
            scale.iter().all(|s| s.is_finite()),
            "a scale is NaN or infinite"
        );
        let float8 =
            matches!(self.format, StorageDType::Quantized(quant) if quant.table().is_some());
        if !float8 && scale.iter().all(|s| s.to_bits() == 1f32.to_bits()) {
            return Ok(self);
        }
        self.scale = Some(scale.into());
        Ok(if float8 {
            self
        } else {
            self.converted(StorageDType::Plain(Dtype::F32), None)
        })
    }

    /// What stored values are multiplied by: one number, or one for each row.
    pub fn scale(&self) -> Option<&[f32]> {
        self.scale.as_deref()
    }

    /// Number format on disk.
    pub fn format(&self) -> StorageDType {
        self.format
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in bytes.
    pub fn byte_len(&self) -> usize {
        self.format.bytes(self.elements())
    }

    /// The first and the last bytes, at most `limit` of each: enough to tell tensors apart.
    ///
    /// # Errors
    /// As [`Source::bytes`].
    pub fn ends(&self, limit: usize) -> Result<[Vec<u8>; 2]> {
        if let Data::Pieces(pieces) = &self.data {
            let length = self.byte_len();
            let count = limit.min(length);
            let part = |range| {
                let pieces = cut(pieces, range);
                pieces.iter().flat_map(|p| p.bytes().into_owned()).collect()
            };
            return Ok([part(0..count), part(length - count..length)]);
        }
        let block = self.format.block();
        let fitting = limit / self.format.bytes(block).max(1) * block;
        let count = fitting.min(self.elements());
        let part = |range| self.format.encode(&self.stored(range)?);
        Ok([
            part(0..count)?,
            part(self.elements() - count..self.elements())?,
        ])
    }

    /// The bytes in row-major order, as safetensors stores them; borrowed if they lie in one piece of a file.
    ///
    /// # Errors
    /// When a dense tensor cannot be cast or copied from its device.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        if let Data::Pieces(pieces) = &self.data
            && let [one] = pieces.as_slice()
        {
            return Ok(one.bytes());
        }
        let mut bytes = Vec::with_capacity(self.byte_len());
        self.write_to(&mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// Writes the bytes in row-major order. Whatever the size, only a few megabytes are in memory at a time.
    ///
    /// # Errors
    /// When `out` takes no more, or a dense tensor cannot be cast or copied from its device.
    pub fn write_to(&self, out: &mut dyn Write) -> Result<()> {
        match &self.data {
            Data::Pieces(pieces) => Ok(pieces.iter().try_for_each(|piece| piece.write_to(out))?),
            Data::Converted(_) => self.write_converted(out),
            Data::Sum(_) => self.write_sum(out),
            Data::Rows(parts) => parts.iter().try_for_each(|part| part.write_to(out)),
            Data::Adapted(adapted) => adapted.write_to(self.format, out),
            Data::Dense(tensor) => {
                // candle copies a whole tensor from a GPU for every part of it that is asked for
                let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
                let dtype = candle_dtype(self.format)?;
                let step = STEP / 8;
                for start in (0..self.elements()).step_by(step) {
                    let part = flat.narrow(0, start, step.min(self.elements() - start))?;
                    out.write_all(&flat_bytes(&part.to_dtype(dtype)?)?)?;
                }
                Ok(())
            }
        }
    }

    /// The files that bytes of it lie in.
    pub(super) fn blobs(&self) -> Vec<&Blob> {
        match &self.data {
            Data::Pieces(pieces) => {
                let blobs = pieces.iter().map(|piece| match &piece.of {
                    Whole::Blob(blob) => Some(blob),
                    Whole::Random(_) => None,
                });
                blobs.flatten().collect()
            }
            Data::Converted(from) => from.blobs(),
            Data::Adapted(adapted) => adapted.base().blobs(),
            Data::Sum(parts) | Data::Rows(parts) => parts.iter().flat_map(Self::blobs).collect(),
            Data::Dense(_) => vec![],
        }
    }

    /// The bytes in row-major order if they lie in mapped files.
    #[cfg(feature = "cuda")]
    pub(super) fn mapped_parts(&self) -> Option<Vec<&[u8]>> {
        let Data::Pieces(pieces) = &self.data else {
            return None;
        };
        let parts = pieces.iter().map(|piece| match &piece.of {
            Whole::Blob(blob) => Some(&blob[piece.range.clone()]),
            Whole::Random(_) => None,
        });
        parts.collect()
    }

    /// Loads the tensor in `dtype`.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn tensor_as(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Data::Adapted(adapted) = &self.data {
            return adapted.tensor(dtype, device);
        }
        if device.is_cpu()
            && dtype == DType::F32
            && matches!(self.data, Data::Pieces(_))
            && let StorageDType::Plain(stored) = self.format
            && let Some(values) = to_f32::to_f32(&self.bytes()?, stored)
        {
            return Ok(Tensor::from_vec(values, self.shape(), device)?);
        }
        Ok(self.tensor(device)?.to_dtype(dtype)?)
    }

    /// Loads the tensor in its own dtype; packed ones in f32.
    ///
    /// # Errors
    /// When candle has no such dtype or the device is out of memory.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        if matches!(self.format, StorageDType::Quantized(_)) {
            let values = self.values(0..self.elements())?;
            return Ok(Tensor::from_vec(values, self.shape.as_slice(), device)?);
        }
        let dtype = candle_dtype(self.format)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(gpu) = device
            && let Some(parts) = self.mapped_parts()
        {
            let loaded = crate::device::upload(&parts, dtype, self.shape(), gpu);
            return loaded.context("cannot load the tensor");
        }
        match &self.data {
            Data::Dense(tensor) => Ok(tensor.to_dtype(dtype)?.to_device(device)?),
            Data::Adapted(adapted) => adapted.tensor(dtype, device),
            Data::Pieces(_) | Data::Converted(_) | Data::Sum(_) | Data::Rows(_) => {
                Tensor::from_raw_buffer(&self.bytes()?, dtype, &self.shape, device)
                    .context("cannot load the tensor")
            }
        }
    }
}

fn flat_bytes(flat: &Tensor) -> Result<Vec<u8>> {
    fn bytes<T: candle::WithDType, const N: usize>(
        flat: &Tensor,
        le: impl Fn(T) -> [u8; N],
    ) -> Result<Vec<u8>> {
        Ok(flat.to_vec1::<T>()?.into_iter().flat_map(le).collect())
    }
    match flat.dtype() {
        DType::U8 => Ok(flat.to_vec1::<u8>()?),
        DType::U32 => bytes(flat, u32::to_le_bytes),
        DType::I64 => bytes(flat, i64::to_le_bytes),
        DType::BF16 => bytes(flat, half::bf16::to_le_bytes),
        DType::F16 => bytes(flat, half::f16::to_le_bytes),
        DType::F32 => bytes(flat, f32::to_le_bytes),
        DType::F64 => bytes(flat, f64::to_le_bytes),
        other => bail!("cannot write tensors of dtype {}", other.as_str()),
    }
}

/// The safetensors name of a candle dtype.
///
/// # Errors
/// When there is none that we write.
pub fn safetensors_dtype(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        other => bail!("cannot write tensors of dtype {}", other.as_str()),
    })
}

/// The candle dtype of a format.
fn candle_dtype(format: StorageDType) -> Result<DType> {
    let dtype = match format {
        StorageDType::Plain(dtype) => DType::try_from(dtype).ok(),
        StorageDType::Quantized(_) => None,
    };
    dtype.with_context(|| format!("tensors of dtype {format} are not supported\nhint: use a float32, float16, bfloat16, float8 or GGUF file"))
}
