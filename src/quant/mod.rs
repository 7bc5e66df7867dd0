//! Compact number formats of weights, float8 and the blocks of GGML: bytes to numbers and back. No tensors' names, no files.

mod float8;

use std::{borrow::Cow, fmt};

use candle::{
    CpuStorage, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};

pub use float8::{F8_MAX, decode_table};

/// Numbers up to this one are nearest to float8's largest.
const F8_MAX_ROUNDED: f32 = 464.0;
/// The largest scale of a block, a float16: numbers up to it fit into every format.
const MAX_SCALE: f32 = 65_504.0;
/// Numbers that no format's scales reach.
const BEYOND_SCALES: f32 = 1e9;

/// A format that stores a weight in fewer bits than any float that is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantType {
    /// float8 with 4 bits of exponent and 3 of mantissa, no infinities (`torch.float8_e4m3fn`).
    F8E4M3,
    /// Blocks of 32 or 256 values with scales of their own, as llama.cpp's GGML lays them out.
    Blocks(GgmlDType),
}

impl QuantType {
    /// Every format that is read.
    pub const ALL: [Self; 11] = [
        Self::F8E4M3,
        Self::Blocks(GgmlDType::Q8_0),
        Self::Blocks(GgmlDType::Q4K),
        Self::Blocks(GgmlDType::Q4_0),
        Self::Blocks(GgmlDType::Q4_1),
        Self::Blocks(GgmlDType::Q5_0),
        Self::Blocks(GgmlDType::Q5_1),
        Self::Blocks(GgmlDType::Q2K),
        Self::Blocks(GgmlDType::Q3K),
        Self::Blocks(GgmlDType::Q5K),
        Self::Blocks(GgmlDType::Q6K),
    ];

    /// As safetensors and GGML write it: `F8_E4M3`, `Q8_0`, `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F8E4M3 => "F8_E4M3",
            Self::Blocks(dtype) => match dtype {
                GgmlDType::F32 => "F32",
                GgmlDType::F16 => "F16",
                GgmlDType::BF16 => "BF16",
                GgmlDType::Q4_0 => "Q4_0",
                GgmlDType::Q4_1 => "Q4_1",
                GgmlDType::Q5_0 => "Q5_0",
                GgmlDType::Q5_1 => "Q5_1",
                GgmlDType::Q8_0 => "Q8_0",
                GgmlDType::Q8_1 => "Q8_1",
                GgmlDType::Q2K => "Q2_K",
                GgmlDType::Q3K => "Q3_K",
                GgmlDType::Q4K => "Q4_K",
                GgmlDType::Q5K => "Q5_K",
                GgmlDType::Q6K => "Q6_K",
                GgmlDType::Q8K => "Q8_K",
            },
        }
    }

    /// Under which name a `VarBuilder` serves the bytes of `tensor`, u8 (rows, bytes of a row), when it has them in this
    /// format. A weight that is asked for under its own name comes in full.
    pub fn name_of_bytes(self, tensor: &str) -> String {
        format!("{tensor}@{}", self.name())
    }

    /// Values in a block: rows are whole blocks.
    pub fn block(self) -> usize {
        match self {
            Self::F8E4M3 => 1,
            Self::Blocks(dtype) => dtype.block_size(),
        }
    }

    /// Bytes of `values` values, a multiple of the block.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::F8E4M3 => values,
            Self::Blocks(dtype) => values / dtype.block_size() * dtype.type_size(),
        }
    }

    /// The numbers that whole blocks stand for.
    ///
    /// # Errors
    /// When `bytes` are not those of as many values as `out` has.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        if !out.len().is_multiple_of(self.block()) || bytes.len() != self.bytes(out.len()) {
            candle::bail!("{} bytes of {self} for {} values", bytes.len(), out.len());
        }
        match self {
            Self::F8E4M3 => {
                let table = decode_table();
                for (value, byte) in out.iter_mut().zip(bytes) {
                    *value = table[usize::from(*byte)];
                }
            }
            Self::Blocks(dtype) => {
                let bytes = aligned(bytes)?;
                let blocks = dtype.from_data(bytes);
                let CpuStorage::F32(values) = blocks.dequantize(out.len())? else {
                    candle::bail!("{self} was not read as float32")
                };
                out.copy_from_slice(&values);
            }
        }
        Ok(())
    }

    /// The nearest bytes to `values`, whole blocks.
    ///
    /// # Errors
    /// When there are not whole blocks, or a number is beyond what the format holds.
    pub fn quantize(self, values: &[f32]) -> Result<Vec<u8>> {
        let beyond = |v: f32| match self {
            Self::F8E4M3 => candle::bail!(
                "{self} without a scale holds numbers up to {F8_MAX}, not {v:e}\nhint: leave --no-scale away, or use bf16"
            ),
            Self::Blocks(_) => {
                candle::bail!("the scales of {self} cannot hold {v:e}\nhint: use bf16")
            }
        };
        let most = values.iter().fold(0f32, |most, v| most.max(v.abs()));
        match self {
            Self::F8E4M3 if most > F8_MAX_ROUNDED => beyond(most),
            Self::F8E4M3 => Ok(values.iter().map(|v| float8::encode(*v)).collect()),
            Self::Blocks(_) if most > BEYOND_SCALES => beyond(most),
            Self::Blocks(dtype) => {
                let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
                let bytes = QTensor::quantize(&tensor, dtype)?.data()?.into_owned();
                if most > MAX_SCALE {
                    let mut back = vec![0.0; values.len()];
                    self.dequantize(&bytes, &mut back)?;
                    if back.iter().any(|v| !v.is_finite()) {
                        return beyond(most);
                    }
                }
                Ok(bytes)
            }
        }
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Under which name a `VarBuilder` serves the scales of a float8 `tensor`, f32 (1) or (rows): the weight is bytes × scale.
pub fn name_of_scale(tensor: &str) -> String {
    format!("{tensor}@scale")
}

/// Under which names a `VarBuilder` serves what a LoRA adds to a packed `tensor`, f32: A (rank, in), and B (out, rank) with
/// its scale in it.
pub fn names_of_factors(tensor: &str) -> [String; 2] {
    ["a", "b"].map(|factor| format!("{tensor}@lora-{factor}"))
}

/// The bytes where GGML's blocks may stand; candle panics elsewhere.
fn aligned(bytes: &[u8]) -> Result<Cow<'_, [u8]>> {
    const ALIGNMENT: usize = 4;
    let fits = |bytes: &[u8]| (bytes.as_ptr() as usize).is_multiple_of(ALIGNMENT);
    if fits(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    let copy = bytes.to_vec();
    if fits(&copy) {
        Ok(Cow::Owned(copy))
    } else {
        candle::bail!("the allocator gave memory at an odd address")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(n: usize) -> Vec<f32> {
        let values = Tensor::randn(0f32, 1.0, n, &Device::Cpu).unwrap();
        values.to_vec1().unwrap()
    }

    fn error(format: QuantType, values: &[f32]) -> f32 {
        let bytes = format.quantize(values).unwrap();
        assert_eq!(bytes.len(), format.bytes(values.len()), "{format}");
        // one byte aside, as a mapped file may have it
        let mut aside = vec![0];
        aside.extend(&bytes);
        let mut out = vec![0.0; values.len()];
        format.dequantize(&aside[1..], &mut out).unwrap();
        let off: f32 = out.iter().zip(values).map(|(a, b)| (a - b).powi(2)).sum();
        (off / values.iter().map(|v| v * v).sum::<f32>()).sqrt()
    }

    #[test]
    fn every_format_comes_back_as_near_as_its_bits_allow() {
        let values = normal(1 << 14);
        for (format, most) in [
            (QuantType::F8E4M3, 0.03),
            (QuantType::Blocks(GgmlDType::Q8_0), 0.008),
            (QuantType::Blocks(GgmlDType::Q6K), 0.03),
            (QuantType::Blocks(GgmlDType::Q5K), 0.05),
            (QuantType::Blocks(GgmlDType::Q5_0), 0.06),
            (QuantType::Blocks(GgmlDType::Q5_1), 0.05),
            (QuantType::Blocks(GgmlDType::Q4K), 0.1),
            (QuantType::Blocks(GgmlDType::Q4_0), 0.12),
            (QuantType::Blocks(GgmlDType::Q4_1), 0.1),
            (QuantType::Blocks(GgmlDType::Q3K), 0.2),
            (QuantType::Blocks(GgmlDType::Q2K), 0.4),
        ] {
            let found = error(format, &values);
            assert!(found > most / 8.0 && found < most, "{format}: {found}");
        }
    }

    #[test]
    fn numbers_beyond_a_format_are_refused_and_not_changed() {
        for format in QuantType::ALL {
            let mut values = vec![0.5; format.block()];
            let within = if format == QuantType::F8E4M3 {
                463.0
            } else {
                60_000.0
            };
            values[0] = -within;
            assert!(error(format, &values) < 0.2, "{format}");
            for huge in [3e38, 9e8] {
                values[0] = huge;
                let text = format.quantize(&values).unwrap_err().to_string();
                assert!(text.contains(format.name()), "{text}");
            }
        }
        let mut values = vec![0.5; 32];
        values[3] = 8e6;
        let q8 = QuantType::Blocks(GgmlDType::Q8_0);
        assert!(error(q8, &values) < 0.01);
        values[3] = 9e6;
        assert!(q8.quantize(&values).is_err());
    }

    #[test]
    fn parts_of_blocks_are_refused() {
        for format in QuantType::ALL.into_iter().skip(1) {
            let block = format.block();
            assert!(format.dequantize(&[0; 3], &mut vec![0.0; block]).is_err());
            assert!(
                format
                    .dequantize(&[0; 3], &mut vec![0.0; block / 2])
                    .is_err()
            );
            assert!(format.quantize(&vec![0.0; block / 2]).is_err());
        }
    }
}
