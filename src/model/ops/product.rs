//! The matrix product of a projection.

use candle::{Result, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::cpu::Operand;

/// Multiply-adds worth a task of their own: some 40 µs.
const TASK: usize = 1 << 21;
/// Largest task, in rows and in columns: beyond it nothing is gained, and smaller ones spread better.
const MAX_TILE: usize = 1024;

/// `x·weightᵀ`: `x` (rows, in), `weight` (out, in) to (rows, out), all of one dtype.
///
/// On the CPU in f32 and outside of a gradient graph through `faer`, otherwise through candle, whose product reads
/// `/proc/cpuinfo` on every call to count threads, and packs small operands at a loss.
pub fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let tracked = x.track_op() || weight.track_op();
    let f32 = x.dtype() == candle::DType::F32 && weight.dtype() == candle::DType::F32;
    if f32 && !tracked && x.device().is_cpu() && weight.device().is_cpu() {
        fused(x, weight)
    } else {
        plain(x, weight)
    }
}

fn plain(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

fn fused(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((rows, input), (columns, weight_input)) = (x.dims2()?, weight.dims2()?);
    if input != weight_input {
        candle::bail!(
            "a product of {:?} with the transpose of {:?}",
            x.shape(),
            weight.shape()
        );
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let mut out = vec![0f32; rows * columns];
    {
        let (x, weight) = (Operand::new(&x), Operand::new(&weight));
        let x = MatRef::from_row_major_slice(x.slice::<f32>()?, rows, input);
        let weight =
            MatRef::from_row_major_slice(weight.slice::<f32>()?, columns, input).transpose();
        let out = MatMut::from_row_major_slice_mut(&mut out, rows, columns);
        let (row_parts, column_parts) = parts(rows, input, columns, rayon::current_num_threads());
        if row_parts * column_parts == 1 {
            matmul(out, Accum::Replace, x, weight, 1.0, Par::Seq);
        } else {
            let bands = out
                .par_row_partition_mut(row_parts)
                .zip(x.par_row_partition(row_parts));
            bands.for_each(|(band, x)| {
                let tiles = band
                    .par_col_partition_mut(column_parts)
                    .zip(weight.par_col_partition(column_parts));
                tiles.for_each(|(tile, weight)| {
                    matmul(tile, Accum::Replace, x, weight, 1.0, Par::Seq);
                });
            });
        }
    }
    Tensor::from_vec(out, (rows, columns), &candle::Device::Cpu)
}

/// Into how many bands of rows and of columns to cut a product: enough tasks for all threads, none too small to be
/// worth waking one, rows first.
fn parts(rows: usize, input: usize, columns: usize, threads: usize) -> (usize, usize) {
    if threads == 1 || rows == 0 || columns == 0 {
        return (1, 1);
    }
    let tasks = (rows * input * columns / TASK).clamp(1, 4 * threads);
    let row_parts = tasks.min(rows.div_ceil(64)).max(rows.div_ceil(MAX_TILE));
    let column_parts = tasks.div_ceil(row_parts).max(columns.div_ceil(MAX_TILE));
    if tasks == 1 {
        (1, 1)
    } else {
        (row_parts, column_parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    #[test]
    fn fused_equals_plain_however_it_is_cut() -> Result<()> {
        for (rows, input, columns) in [
            (0, 8, 3),
            (1, 8, 3),
            (1, 128, 768),
            (28, 128, 896),
            (300, 70, 1300),
            (1100, 33, 200),
        ] {
            let (x, weight) = (random("x", (rows, input))?, random("w", (columns, input))?);
            close(&product(&x, &weight)?, &plain(&x, &weight)?, 1e-6)?;
            let view = random("w", (columns, input + 5))?.narrow(1, 3, input)?;
            close(&product(&x, &view)?, &plain(&x, &view)?, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn products_are_cut_into_enough_pieces_and_no_crumbs() {
        assert_eq!(parts(0, 128, 768, 2), (1, 1));
        assert_eq!(parts(1, 128, 768, 2), (1, 1));
        assert_eq!(parts(1344, 128, 896, 2), (8, 1));
        assert_eq!(parts(28, 3072, 3072, 2), (1, 8));
        assert_eq!(parts(4608, 3072, 21_504, 2), (8, 21));
    }
}
