//! Quantized bytes of a weight → numbers.

use candle::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, Operand, by_dtype};
use crate::quant::QuantType;

/// Values that one task dequantizes, in whole rows: they pass through f32 in the cache.
const PART: usize = 1 << 14;

/// `rows`, u8 (out, bytes of a row), as (out, in) numbers of `dtype`; float8 times `scale`, f32 (1) or (out). Rounded once.
pub fn dequantize(
    rows: &Tensor,
    format: QuantType,
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
    let Some(table) = format.table() else {
        candle::bail!("bytes of {format} are dequantized on the CPU only");
    };
    by_table(rows, table, scale, dtype)
}

/// [`dequantize`] for float8 on any device.
fn by_table(
    rows: &Tensor,
    table: &[f32; 256],
    scale: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    let table = Tensor::new(&table[..], rows.device())?;
    let of_rows = |table: Tensor| {
        let values = table.index_select(&rows.flatten_all()?, 0)?;
        values.reshape(rows.shape())
    };
    match scale {
        None => of_rows(table.to_dtype(dtype)?),
        // 256 products and not millions: the same ones, rounded alike
        Some(one) if one.elem_count() == 1 => {
            of_rows(table.broadcast_mul(&one.flatten_all()?)?.to_dtype(dtype)?)
        }
        Some(each) => of_rows(table)?
            .broadcast_mul(&each.unsqueeze(1)?)?
            .to_dtype(dtype),
    }
}

fn on_cpu<T: Element>(rows: &Tensor, format: QuantType, scale: Option<&[f32]>) -> Result<Tensor> {
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
            format.dequantize(bytes, &mut wide)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float8_by_table_is_float8_by_kernel() -> Result<()> {
        // all bytes but those of NaN
        let bytes = (0..=255u8).filter(|byte| byte & 0x7f != 0x7f);
        let rows = Tensor::from_iter(bytes, &Device::Cpu)?.reshape((2, 127))?;
        for scale in [None, Some(&[0.37f32][..]), Some(&[0.37, 2.9])] {
            let scale = scale.map(|s| Tensor::new(s, &Device::Cpu)).transpose()?;
            for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
                let want = dequantize(&rows, QuantType::F8E4M3, scale.as_ref(), dtype)?;
                let table = QuantType::F8E4M3.table().unwrap();
                let got = by_table(&rows, table, scale.as_ref(), dtype)?;
                assert_eq!(got.dtype(), dtype);
                let numbers = |x: Tensor| x.to_dtype(DType::F64)?.to_vec2::<f64>();
                assert_eq!(numbers(got)?, numbers(want)?, "{scale:?} {dtype:?}");
            }
        }
        Ok(())
    }
}
