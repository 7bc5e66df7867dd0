//! A projection's weight as it lies on the device: numbers, or packed bytes that are dequantized whenever it is used.
//! A 12-billion-parameter model stored in 8 or 4 bits stays that small; only one weight at a time is wide.
//!
//! candle's `QMatMul` multiplies GGML's blocks as they are. On two busy CPU cores, one product with a 3072 × 3072 weight in
//! q8_0 takes it 8, 10, 23 and 383 ms for 1, 4, 64 and 1,280 rows; converting and multiplying take 93, 79, 106 and
//! 688 ms (q4_k: 8, 11, 28, 314 against 72, 73, 109, 804). But it rounds the input to 8 bits: its results are off by 6e-3
//! from what the packed numbers give; ours are off by 4e-7. So it is not used.

use std::sync::Arc;

use candle::quantized::{QStorage, QTensor};
use candle::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::ops;
use crate::quant::{QuantType, name_of_scale, names_of_factors};

/// (out, in).
#[derive(Clone, Debug)]
pub(super) enum Weight {
    /// Numbers, trainable or not.
    Dense(Tensor),
    /// Frozen bytes of a quantized weight.
    Quantized(Box<QuantizedWeight>),
}

/// A packed weight and what it is dequantized to.
#[derive(Clone, Debug)]
pub(super) struct QuantizedWeight {
    format: QuantType,
    shape: (usize, usize),
    dtype: DType,
    bytes: Bytes,
    /// f32, (1) or (out)
    scale: Option<Tensor>,
    /// What a LoRA adds whenever the weight is widened: A (rank, in) and B (out, rank), f32.
    factors: Option<[Tensor; 2]>,
}

#[derive(Clone, Debug)]
enum Bytes {
    /// u8 (out, bytes of a row)
    Rows(Tensor),
    /// GGML's blocks on a device that candle has kernels for.
    Blocks(Arc<QTensor>),
}

impl Weight {
    /// Reads `weight` (output, input), packed if `vb` has it so.
    pub(super) fn load(output: usize, input: usize, vb: &VarBuilder) -> Result<Self> {
        const NAME: &str = "weight";
        let mut formats = QuantType::ALL.into_iter();
        let Some(format) = formats.find(|f| vb.contains_tensor(&f.name_of_bytes(NAME))) else {
            return vb.get((output, input), NAME).map(Self::Dense);
        };
        let blocks = !vb.device().is_cpu() && format != QuantType::F8E4M3;
        let from = if blocks {
            vb.clone().set_device(Device::Cpu)
        } else {
            vb.clone()
        };
        let rows = from.get_unchecked_dtype(&format.name_of_bytes(NAME), DType::U8)?;
        if rows.dims() != [output, format.bytes(input)] {
            candle::bail!(
                "tensor `{}.{NAME}` of {format}: expected shape [{output}, {input}], found rows of bytes {:?}",
                vb.prefix(),
                rows.shape()
            );
        }
        let scale = match format {
            QuantType::Blocks(_) => None,
            QuantType::F8E4M3 => Some(vb.get_unchecked_dtype(&name_of_scale(NAME), DType::F32)?),
        };
        let names = names_of_factors(NAME);
        let factors = if names.iter().all(|name| vb.contains_tensor(name)) {
            let [a, b] = names.map(|name| vb.get_unchecked_dtype(&name, DType::F32));
            Some([a?, b?])
        } else {
            None
        };
        let bytes = Bytes::on(vb.device(), rows, format, (output, input))?;
        Ok(Self::Quantized(Box::new(QuantizedWeight {
            format,
            shape: (output, input),
            dtype: vb.dtype(),
            bytes,
            scale,
            factors,
        })))
    }

    pub(super) fn shape(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(weight) => weight.dims2(),
            Self::Quantized(packed) => Ok(packed.shape),
        }
    }

    pub(super) fn device(&self) -> Device {
        match self {
            Self::Dense(weight) => weight.device().clone(),
            Self::Quantized(packed) => match &packed.bytes {
                Bytes::Rows(rows) => rows.device().clone(),
                Bytes::Blocks(blocks) => blocks.device(),
            },
        }
    }

    /// The same weight on `device`.
    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        let packed = match self {
            Self::Dense(weight) => return weight.to_device(device).map(Self::Dense),
            Self::Quantized(packed) => packed,
        };
        let (output, input) = packed.shape;
        let bytes = match &packed.bytes {
            Bytes::Rows(rows) => Bytes::on(device, rows.clone(), packed.format, packed.shape)?,
            Bytes::Blocks(blocks) if blocks.device().same_device(device) => packed.bytes.clone(),
            Bytes::Blocks(blocks) => {
                let width = packed.format.bytes(input);
                let rows = Tensor::from_slice(&blocks.data()?, (output, width), &Device::Cpu)?;
                Bytes::on(device, rows, packed.format, packed.shape)?
            }
        };
        let scale = packed.scale.as_ref().map(|scale| scale.to_device(device));
        let factors = match &packed.factors {
            Some([a, b]) => Some([a.to_device(device)?, b.to_device(device)?]),
            None => None,
        };
        Ok(Self::Quantized(Box::new(QuantizedWeight {
            bytes,
            scale: scale.transpose()?,
            factors,
            ..(**packed).clone()
        })))
    }

    /// The numbers; dequantized again at every call if it is quantized.
    pub(super) fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
            Self::Quantized(packed) => packed.dequantize(),
        }
    }

    /// The same weight outside of any gradient graph.
    pub(super) fn detached(&self) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.detach()),
            packed @ Self::Quantized(_) => packed.clone(),
        }
    }
}

impl Bytes {
    /// `rows` of a weight of `shape` as they are used on `device`.
    fn on(device: &Device, rows: Tensor, format: QuantType, shape: (usize, usize)) -> Result<Self> {
        match format {
            QuantType::Blocks(dtype) if !device.is_cpu() => {
                let bytes = rows.flatten_all()?.to_vec1::<u8>()?;
                let storage = QStorage::from_data(bytes.into(), device, dtype)?;
                Ok(Self::Blocks(Arc::new(QTensor::new(storage, shape)?)))
            }
            _ => rows.to_device(device).map(Self::Rows),
        }
    }
}

impl QuantizedWeight {
    /// In the weight's dtype; with a LoRA summed in f32 and rounded once.
    fn dequantize(&self) -> Result<Tensor> {
        match &self.factors {
            None => self.dequantize_as(self.dtype),
            Some([a, b]) => (self.dequantize_as(DType::F32)? + b.matmul(a)?)?.to_dtype(self.dtype),
        }
    }

    fn dequantize_as(&self, dtype: DType) -> Result<Tensor> {
        match &self.bytes {
            Bytes::Rows(rows) => {
                let scale = self.scale.as_ref();
                ops::dequantize(rows, self.format, scale, dtype)?.reshape(self.shape)
            }
            Bytes::Blocks(blocks) => blocks.dequantize(&blocks.device())?.to_dtype(dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle::Var;
    use candle::quantized::GgmlDType;

    use super::*;
    use crate::model::Linear;
    use crate::model::testing::{close, random};

    /// A layer of which the `VarBuilder` has packed bytes, and the same with the numbers they stand for.
    fn pair(format: QuantType, scale: Option<&[f32]>, dtype: DType) -> Result<[Linear; 2]> {
        let weight = random("w", (24, 256))?;
        let bytes = format.quantize(&weight.flatten_all()?.to_vec1::<f32>()?)?;
        let mut wide = vec![0.0; 24 * 256];
        format.dequantize(&bytes, &mut wide)?;
        for (i, value) in wide.iter_mut().enumerate() {
            *value *= match scale {
                None => 1.0,
                Some([one]) => *one,
                Some(each) => each[i / 256],
            };
        }
        let cpu = Device::Cpu;
        let wide = Tensor::from_vec(wide, (24, 256), &cpu)?;
        let scale = scale.unwrap_or(&[1.0]);
        let tensors = [
            (
                format.name_of_bytes("weight"),
                Tensor::from_vec(bytes, (24, format.bytes(256)), &cpu)?,
            ),
            (
                name_of_scale("weight"),
                Tensor::from_slice(scale, scale.len(), &cpu)?,
            ),
            ("bias".to_owned(), random("b", 24)?),
        ];
        let tensors: HashMap<_, _> = tensors.into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors, dtype, &cpu);
        let bias = random("b", 24)?.to_dtype(dtype)?;
        Ok([
            Linear::load(256, 24, true, &vb)?,
            Linear::new(wide.to_dtype(dtype)?, Some(bias))?,
        ])
    }

    #[test]
    fn packed_weights_compute_what_their_numbers_do() -> Result<()> {
        let rows: Vec<f32> = (0..24).map(|i| 0.5 + i as f32).collect();
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let x = random("x", (2, 5, 256))?.to_dtype(dtype)?;
            for (format, scale) in [
                (QuantType::F8E4M3, None),
                (QuantType::F8E4M3, Some(&[0.3][..])),
                (QuantType::F8E4M3, Some(&rows[..])),
                (QuantType::Blocks(GgmlDType::Q8_0), None),
                (QuantType::Blocks(GgmlDType::Q4K), None),
                (QuantType::Blocks(GgmlDType::Q6K), None),
            ] {
                let [packed, dense] = pair(format, scale, dtype)?;
                close(&packed.weight()?, &dense.weight()?, 0.0)?;
                close(&packed.forward(&x)?, &dense.forward(&x)?, 0.0)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_of_the_input_go_through() -> Result<()> {
        let x = Var::from_tensor(&random("x", (2, 5, 256))?)?;
        let gradient = |linear: &Linear| -> Result<Tensor> {
            let loss = linear.forward(x.as_tensor())?.sqr()?.sum_all()?;
            let gradients = loss.backward()?;
            Ok(gradients.get(&x).expect("x is tracked").clone())
        };
        let [packed, dense] = pair(QuantType::Blocks(GgmlDType::Q4K), None, DType::F32)?;
        assert!(gradient(&dense)?.abs()?.max_all()?.to_scalar::<f32>()? > 0.0);
        close(&gradient(&packed)?, &gradient(&dense)?, 0.0)
    }
}
