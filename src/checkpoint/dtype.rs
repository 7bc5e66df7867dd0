//! The number format in which a file stores a tensor, and numbers as its bytes. `source` knows where the bytes lie.

use std::fmt;

use anyhow::{Result, bail};
use candle::DType;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::quant::QuantType;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageDType {
    /// One after another, under safetensors' name for them.
    Plain(Dtype),
    /// In fewer bits than are computed with.
    Quantized(QuantType),
}

impl From<Dtype> for StorageDType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F8_E4M3 => Self::Quantized(QuantType::F8E4M3),
            dtype => Self::Plain(dtype),
        }
    }
}

impl fmt::Display for StorageDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => f.pad(&format!("{dtype:?}")),
            Self::Quantized(packed) => f.pad(packed.name()),
        }
    }
}

impl StorageDType {
    /// safetensors' name; `None` for blocks, which only GGUF has.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Plain(dtype) => Some(dtype),
            Self::Quantized(QuantType::F8E4M3) => Some(Dtype::F8_E4M3),
            Self::Quantized(QuantType::Blocks(_)) => None,
        }
    }

    /// The candle dtype in which a fit or another changed value is stored in such a tensor's place: its own if that
    /// is a float of at least 16 bits, bf16 in place of packed values, f32 otherwise.
    pub fn of_changed(self) -> DType {
        match self {
            Self::Quantized(_) => DType::BF16,
            Self::Plain(dtype) => DType::try_from(dtype)
                .ok()
                .filter(|d| matches!(d, DType::F16 | DType::BF16 | DType::F32 | DType::F64))
                .unwrap_or(DType::F32),
        }
    }

    /// Whether weights may be stored so.
    pub fn is_float(self) -> bool {
        use Dtype::{BF16, F16, F32, F64};
        matches!(
            self,
            Self::Quantized(_) | Self::Plain(BF16 | F16 | F32 | F64)
        )
    }

    /// Bytes of `values` values.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::Plain(dtype) => (values * dtype.bitsize()).div_ceil(8),
            Self::Quantized(packed) => packed.bytes(values),
        }
    }

    /// Values that must be taken together.
    pub(super) fn block(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Quantized(packed) => packed.block(),
        }
    }

    /// The numbers that bytes stand for.
    ///
    /// # Errors
    /// When they are no floats.
    pub(super) fn decode(self, bytes: &[u8]) -> Result<Vec<f32>> {
        fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|b| value(*b)).collect()
        }
        Ok(match self {
            Self::Quantized(packed) => {
                let block = packed.bytes(packed.block());
                let mut out = vec![0.0; bytes.len() / block * packed.block()];
                packed.dequantize(bytes, &mut out)?;
                out
            }
            Self::Plain(Dtype::F32) => each(bytes, f32::from_le_bytes),
            Self::Plain(Dtype::F16) => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Plain(Dtype::BF16) => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Plain(Dtype::F64) => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Self::Plain(dtype) => bail!("tensors of dtype {dtype:?} hold no weights"),
        })
    }

    /// The nearest bytes.
    ///
    /// # Errors
    /// When the format is none that we write, or a number is beyond its range.
    pub(super) fn encode(self, values: &[f32]) -> Result<Vec<u8>> {
        fn each<const N: usize>(values: &[f32], bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
            values.iter().flat_map(|v| bytes(*v)).collect()
        }
        Ok(match self {
            Self::Quantized(packed) => packed.quantize(values)?,
            Self::Plain(Dtype::F32) => each(values, f32::to_le_bytes),
            Self::Plain(Dtype::BF16) => {
                // the last half step below float32's end rounds up
                if let Some(v) = values
                    .iter()
                    .find(|v| v.is_finite() && !bf16::from_f32(**v).is_finite())
                {
                    bail!("bfloat16 cannot hold {v:e}\nhint: use f32")
                }
                each(values, |v| bf16::from_f32(v).to_le_bytes())
            }
            Self::Plain(Dtype::F16) => {
                if let Some(v) = values
                    .iter()
                    .find(|v| v.is_finite() && !f16::from_f32(**v).is_finite())
                {
                    bail!("float16 cannot hold {v:e}\nhint: use bf16")
                }
                each(values, |v| f16::from_f32(v).to_le_bytes())
            }
            Self::Plain(dtype) => bail!("cannot write tensors of dtype {dtype:?}"),
        })
    }
}
