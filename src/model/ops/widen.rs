//! Packed bytes of a weight → numbers.

use candle::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, Operand, by_dtype};
use crate::formats::{Packed, decode_table};

/// Values that one task widens, in whole rows: they pass through f32 in the cache.
const PART: usize = 1 << 14;

/// `rows`, u8 (out, bytes of a row), as (out, in) numbers of `dtype`; float8 times `scale`, f32 (1) or (out). Rounded once.
pub fn widen(
    rows: &Tensor,
    format: Packed,
    scale: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    if rows.device().is_cpu() {
        let scale = scale.map(Tensor::to_vec1::<f32>).transpose()?;
        let scale = scale.as_deref();
        let out = match dtype {
            DType::BF16 | DType::F16 => by_dtype!(dtype, on_cpu(rows, format, scale))?,
            _ => on_cpu::<f32>(rows, format, scale)?,
        };
        return out.to_dtype(dtype);
    }
    if format != Packed::F8E4M3 {
        candle::bail!("bytes of {format} are widened on the CPU only");
    }
    let table = Tensor::new(&decode_table()[..], rows.device())?;
    let values = table
        .index_select(&rows.flatten_all()?, 0)?
        .reshape(rows.shape())?;
    let values = match scale {
        None => values,
        Some(scale) => values.broadcast_mul(&scale.unsqueeze(1)?)?,
    };
    values.to_dtype(dtype)
}

fn on_cpu<T: Element>(rows: &Tensor, format: Packed, scale: Option<&[f32]>) -> Result<Tensor> {
    let (output, row_bytes) = rows.dims2()?;
    let input = row_bytes / format.bytes(format.block()) * format.block();
    if row_bytes == 0 {
        return Tensor::zeros((output, input), T::DTYPE, &Device::Cpu);
    }
    let rows = Operand::new(rows);
    let bytes = rows.bytes()?;
    let count = (PART / input).max(1);
    let mut out = vec![T::narrow(0.0); output * input];
    out.par_chunks_mut(count * input)
        .zip(bytes.par_chunks(count * row_bytes))
        .enumerate()
        .try_for_each(|(part, (out, bytes))| {
            let mut wide = vec![0.0; out.len()];
            format.widen(bytes, &mut wide)?;
            for (row, (out, wide)) in out.chunks_mut(input).zip(wide.chunks(input)).enumerate() {
                let scale = match scale {
                    None => 1.0,
                    Some([one]) => *one,
                    Some(each) => each[part * count + row],
                };
                for (out, wide) in out.iter_mut().zip(wide) {
                    *out = T::narrow(wide * scale);
                }
            }
            Ok::<_, candle::Error>(())
        })?;
    Tensor::from_vec(out, (output, input), &Device::Cpu)
}
