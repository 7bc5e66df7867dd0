//! The matrix products of projections, forward and backward.

use candle::{D, DType, Result, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::avx512::{Avx512, Vector};
use super::cpu::{Operand, by_dtype, fusable as same_format};
use super::cuda;
use super::custom_op::custom_op;
use super::gemm::{self, Then};
use super::graph::plus;
use super::uninit::filled;

/// Multiply-adds worth a task of their own: some 40 µs.
const TASK: usize = 1 << 21;
/// Largest task, in rows and in columns: beyond it nothing is gained, and smaller ones spread better.
const MAX_TILE: usize = 1024;

/// A low-rank addition to a weight: factors (rank, in) and (out, rank), and what their product is scaled by.
pub(super) type LowRank<'a> = (&'a Tensor, &'a Tensor, f64);

/// `x·weightᵀ`, plus `scale·(x·aᵀ)·bᵀ`: `x` (…, in), `weight` (out, in) to (…, out), in the dtype of `x`. Weight and
/// factors may have other dtypes; on the CPU their products are in these, elsewhere in the dtype of `x`: the f32 values
/// that are trained next to 16-bit weights would be multiplied at a tenth of the speed, and their results written wide.
///
/// On the CPU forwards through `gemm`, in f32 without AVX-512 and backwards through `faer`, and otherwise through candle,
/// whose product reads `/proc/cpuinfo` on every call to count threads, and packs small operands at a loss. Differentiable;
/// the gradients of what is not tracked are not formed.
pub fn product(x: &Tensor, weight: &Tensor, low_rank: Option<LowRank>) -> Result<Tensor> {
    let Some((a, b, scale)) = low_rank else {
        return single(x, weight);
    };
    if weight.track_op() {
        // more tracked inputs than an operation may have
        return plus(&single(x, weight)?, &pair(x, None, (a, b, scale))?);
    }
    pair(x, Some(weight), (a, b, scale))
}

/// The rows of `x` (…, width), outside of the graph. One product is made of all: on three dimensions candle would repeat
/// the weight for every sample; and in the graph every change of shape would cost a sum as large as its tensor.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.detach().reshape(((), x.dim(D::Minus1)?))
}

/// `rows` with the shape of `like` but for the last dimension.
fn shaped(rows: &Tensor, like: &[usize]) -> Result<Tensor> {
    let mut shape = like.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = rows.dim(1)?;
    }
    rows.reshape(shape)
}

fn single(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (tracked_x, tracked_weight) = (x.track_op(), weight.track_op());
    let (x_rows, weight_data) = (rows(x)?, in_work(weight, x)?);
    let (shape, stored) = (x.dims().to_vec(), weight.dtype());
    let y = times_transposed(&x_rows, &weight_data, None)?.to_dtype(x.dtype())?;
    custom_op(&[x, weight], shaped(&y, &shape)?, move |grad| {
        let grad = rows(grad)?;
        let dx = tracked_x.then(|| {
            let dx = times(&grad, &weight_data, None)?.to_dtype(x_rows.dtype())?;
            shaped(&dx, &shape)
        });
        let dw = tracked_weight.then(|| {
            let x = x_rows.to_dtype(weight_data.dtype())?;
            transposed_times(&grad.to_dtype(x.dtype())?, &x, stored)
        });
        Ok(vec![dx.transpose()?, dw.transpose()?])
    })
}

fn pair(x: &Tensor, weight: Option<&Tensor>, (a, b, scale): LowRank) -> Result<Tensor> {
    let tracked = [x.track_op(), a.track_op(), b.track_op()];
    let (x_rows, a_data, b_data) = (rows(x)?, in_work(a, x)?, in_work(b, x)?);
    let (shape, stored) = (x.dims().to_vec(), [a.dtype(), b.dtype()]);
    let weight = weight.cloned();
    let low = (times_transposed(&x_rows, &a_data, None)? * scale)?;
    let y = match &weight {
        Some(weight) => Some(times_transposed(&x_rows, weight, None)?.to_dtype(x.dtype())?),
        None => None,
    };
    let y = times_transposed(&low, &b_data, y)?.to_dtype(x.dtype())?;
    custom_op(&[x, a, b], shaped(&y, &shape)?, move |grad| {
        let (grad, dtype) = (rows(grad)?, x_rows.dtype());
        let wide = grad.to_dtype(b_data.dtype())?;
        let db = tracked[2].then(|| transposed_times(&wide, &low, stored[1]));
        let dlow = (times(&wide, &b_data, None)? * scale)?;
        let dx = tracked[0].then(|| {
            let dx = match &weight {
                Some(weight) => Some(times(&grad, weight, None)?.to_dtype(dtype)?),
                None => None,
            };
            shaped(&times(&dlow, &a_data, dx)?.to_dtype(dtype)?, &shape)
        });
        let da = tracked[1]
            .then(|| transposed_times(&dlow, &x_rows.to_dtype(a_data.dtype())?, stored[0]));
        Ok(vec![dx.transpose()?, da.transpose()?, db.transpose()?])
    })
}

/// `weight` outside of the graph, in the dtype that it is multiplied with `x` in.
fn in_work(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    let weight = weight.detach();
    if x.device().is_cpu() {
        return Ok(weight);
    }
    weight.to_dtype(x.dtype())
}

fn fusable(a: &Tensor, b: &Tensor) -> bool {
    [a, b]
        .iter()
        .all(|x| x.dtype() == DType::F32 && x.device().is_cpu())
}

/// `a·bᵀ`: (m, k), (n, k) to (m, n), in the dtype of `b`; with `sum`, added to it, in its dtype.
fn times_transposed(a: &Tensor, b: &Tensor, sum: Option<Tensor>) -> Result<Tensor> {
    let a = a.to_dtype(b.dtype())?;
    if let Some(dtype) = same_format([&a, b])
        && (dtype != DType::F32 || Avx512::detect().is_some())
    {
        return match sum {
            Some(sum) if sum.dtype() != dtype => {
                added(by_dtype!(dtype, tiled(&a, b, None))?, Some(sum))
            }
            sum => by_dtype!(dtype, tiled(&a, b, sum)),
        };
    }
    if fusable(&a, b) {
        return match sum {
            Some(sum) if sum.dtype() != DType::F32 => {
                added(fused(&a, false, b, true, None)?, Some(sum))
            }
            sum => fused(&a, false, b, true, sum),
        };
    }
    on_device(&a, b, true, sum)
}

/// `a·b`: (m, k), (k, n) to (m, n), in the dtype of `b`; with `sum`, added to it, in its dtype.
fn times(a: &Tensor, b: &Tensor, sum: Option<Tensor>) -> Result<Tensor> {
    let a = a.to_dtype(b.dtype())?;
    if fusable(&a, b) {
        return match sum {
            Some(sum) if sum.dtype() != DType::F32 => {
                added(fused(&a, false, b, false, None)?, Some(sum))
            }
            sum => fused(&a, false, b, false, sum),
        };
    }
    on_device(&a, b, false, sum)
}

/// `a·b`, or `a·bᵀ` if that is how `b` lies, on any device, plus `sum`, which nothing else holds: a GPU writes on it.
fn on_device(a: &Tensor, b: &Tensor, transposed: bool, sum: Option<Tensor>) -> Result<Tensor> {
    if let Some(sum) = &sum
        && cuda::multiply_onto(sum, 1.0, [a, b], transposed, 1.0)?
    {
        return Ok(sum.clone());
    }
    added(
        if transposed {
            a.matmul(&b.t()?)?
        } else {
            a.matmul(b)?
        },
        sum,
    )
}

fn added(product: Tensor, sum: Option<Tensor>) -> Result<Tensor> {
    match sum {
        None => Ok(product),
        Some(sum) => &sum + product.to_dtype(sum.dtype())?,
    }
}

/// `keep·sum + factor·a·b`, for what nothing else holds: a GPU writes on it. All of one shape (…, rows, columns) but for
/// the last two dimensions; not differentiable.
pub fn multiply_add(sum: Tensor, keep: f64, [a, b]: [&Tensor; 2], factor: f64) -> Result<Tensor> {
    if cuda::multiply_onto(&sum, keep, [a, b], false, factor)? {
        return Ok(sum);
    }
    let product = (a.matmul(b)? * factor)?;
    (sum * keep)? + product
}

/// `aᵀ·b`: (k, m), (k, n) to (m, n), in `dtype`.
fn transposed_times(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    if fusable(a, b) {
        return fused(a, true, b, false, None)?.to_dtype(dtype);
    }
    if dtype == DType::F32
        && let Some(product) = cuda::transposed_product(a, b)?
    {
        return Ok(product);
    }
    a.t()?.matmul(b)?.to_dtype(dtype)
}

#[cfg(test)]
fn plain(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// `a·bᵀ`, plus `sum`.
fn tiled<T: Vector>(a: &Tensor, b: &Tensor, sum: Option<Tensor>) -> Result<Tensor> {
    let ((rows, inner), (columns, width)) = (a.dims2()?, b.dims2()?);
    if inner != width {
        candle::bail!("a product of ({rows}, {inner}) with ({columns}, {width}) transposed");
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (a, b) = (Operand::new(&a), Operand::new(&b));
    if let Some(sum) = &sum {
        check_sum(sum, rows, columns)?;
    }
    let sum = sum.as_ref().map(Operand::new);
    let then = match &sum {
        Some(sum) => {
            let sum = sum.slice::<T>()?;
            Then::Add(MatRef::from_row_major_slice(sum, rows, columns))
        }
        None => Then::Put,
    };
    let (a, b) = (a.slice::<T>()?, b.slice::<T>()?);
    let out = filled(rows, columns, |out| {
        gemm::times_transposed(a, b, inner, out, then);
    });
    Tensor::from_vec(out, (rows, columns), &candle::Device::Cpu)
}

/// The product of two matrices, each transposed first if asked for, plus `sum`.
fn fused(
    a: &Tensor,
    transpose_a: bool,
    b: &Tensor,
    transpose_b: bool,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let (a_shape, b_shape) = (a.dims2()?, b.dims2()?);
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (a, b) = (Operand::new(&a), Operand::new(&b));
    let a = MatRef::from_row_major_slice(a.slice::<f32>()?, a_shape.0, a_shape.1);
    let b = MatRef::from_row_major_slice(b.slice::<f32>()?, b_shape.0, b_shape.1);
    let a = if transpose_a { a.transpose() } else { a };
    let b = if transpose_b { b.transpose() } else { b };
    let (rows, inner, columns) = (a.nrows(), a.ncols(), b.ncols());
    if inner != b.nrows() {
        candle::bail!(
            "a product of ({rows}, {inner}) with ({}, {columns})",
            b.nrows()
        );
    }
    let (mut out, how) = match sum {
        None => (vec![0f32; rows * columns], Accum::Replace),
        Some(sum) => {
            check_sum(&sum, rows, columns)?;
            (Operand::new(&sum).slice::<f32>()?.to_vec(), Accum::Add)
        }
    };
    {
        let out = MatMut::from_row_major_slice_mut(&mut out, rows, columns);
        let (row_parts, column_parts) = parts(rows, inner, columns, rayon::current_num_threads());
        if row_parts * column_parts == 1 {
            matmul(out, how, a, b, 1.0, Par::Seq);
        } else {
            let bands = out
                .par_row_partition_mut(row_parts)
                .zip(a.par_row_partition(row_parts));
            bands.for_each(|(band, a)| {
                let tiles = band
                    .par_col_partition_mut(column_parts)
                    .zip(b.par_col_partition(column_parts));
                tiles.for_each(|(tile, b)| {
                    matmul(tile, how, a, b, 1.0, Par::Seq);
                });
            });
        }
    }
    Tensor::from_vec(out, (rows, columns), &candle::Device::Cpu)
}

/// Fails unless a product of this shape can be added to `sum`.
fn check_sum(sum: &Tensor, rows: usize, columns: usize) -> Result<()> {
    if sum.dims() != [rows, columns] {
        candle::bail!("({rows}, {columns}) was to be added to {:?}", sum.shape());
    }
    Ok(())
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
mod tests;
