//! Products by cuBLAS, of numbers as they are and summed in f32: candle's own round the result to the operands' format and
//! cannot add it to what is there.
#![expect(unsafe_code, reason = "cuBLAS is given addresses")]

use candle::cuda_backend::WrapErr;
use candle::cuda_backend::cudarc::cublas::{result as cublas, sys as blas};
use candle::{CudaDevice, DType, Result, Tensor};

use super::device_of;
use super::launch::{Blank, Module, address_of};
use super::parameters::RowView;

/// An operand: where it is, its numbers, whether it is transposed first, and how far apart rows and matrices are.
struct Matrices {
    data: u64,
    dtype: DType,
    transposed: bool,
    row: usize,
    next: usize,
}

impl Matrices {
    /// (rows, columns) each, one behind the other.
    fn dense(data: u64, dtype: DType, rows: usize, columns: usize) -> Self {
        Self {
            data,
            dtype,
            transposed: false,
            row: columns,
            next: rows * columns,
        }
    }

    fn transposed(self) -> Self {
        Self {
            transposed: true,
            ..self
        }
    }

    fn format(&self) -> blas::cudaDataType_t {
        match self.dtype {
            DType::BF16 => blas::cudaDataType_t::CUDA_R_16BF,
            DType::F16 => blas::cudaDataType_t::CUDA_R_16F,
            _ => blas::cudaDataType_t::CUDA_R_32F,
        }
    }

    fn turn(&self) -> blas::cublasOperation_t {
        if self.transposed {
            blas::cublasOperation_t::CUBLAS_OP_T
        } else {
            blas::cublasOperation_t::CUBLAS_OP_N
        }
    }
}

/// `c := keep · c + factor · a·b` for `count` matrices (m, n) = (m, k) · (k, n), in the order of the device's stream.
///
/// # Safety
/// Operands of these sizes are where they are said to be, and nothing else reads or writes `c` meanwhile.
unsafe fn gemm(
    device: &CudaDevice,
    c: &Matrices,
    keep: f32,
    [a, b]: [&Matrices; 2],
    factor: f32,
    [m, n, k]: [usize; 3],
    count: usize,
) -> Result<()> {
    // SAFETY: as the caller says. cuBLAS counts columns first: to it rows are columns, and the operands change places.
    unsafe {
        cublas::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            b.turn(),
            a.turn(),
            n as i32,
            m as i32,
            k as i32,
            (&raw const factor).cast(),
            b.data as *const _,
            b.format(),
            b.row as i32,
            b.next as i64,
            a.data as *const _,
            a.format(),
            a.row as i32,
            a.next as i64,
            (&raw const keep).cast(),
            c.data as *mut _,
            c.format(),
            c.row as i32,
            c.next as i64,
            count as i32,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}

impl Module {
    /// `scale · a·bᵀ` to `out`: `a` (matrices, m, k) and `b` (matrices, n, k), contiguous, of one number format, to
    /// (matrices, m, n) in f32.
    pub(super) fn product(
        &self,
        a: &Tensor,
        b: &Tensor,
        [matrices, m, n, k]: [usize; 4],
        scale: f32,
        out: &Blank,
    ) -> Result<()> {
        let c = Matrices::dense(out.address()?, DType::F32, m, n);
        let left = Matrices::dense(address_of(a)?, a.dtype(), m, k);
        let right = Matrices::dense(address_of(b)?, b.dtype(), n, k).transposed();
        let device = self.device();
        // SAFETY: `calls` has compared the shapes of the operands, which are borrowed until here, and made room for the
        // result
        unsafe {
            gemm(
                device.as_cuda_device()?,
                &c,
                0.0,
                [&left, &right],
                scale,
                [m, n, k],
                matrices,
            )
        }
    }

    /// `xᵀ·y` to matrix `place` of `out`, which holds matrices (width, width) in f32: `x` and `y` rows of numbers of `dtype`,
    /// (samples, tokens, width), summed over samples too. A row begins at least `width` numbers behind the one before it.
    pub(super) fn product_over_tokens(
        &self,
        dtype: DType,
        [x, y]: [RowView; 2],
        [samples, tokens, width]: [usize; 3],
        out: &Blank,
        place: usize,
    ) -> Result<()> {
        let skipped = (place * width * width * size_of::<f32>()) as u64;
        let c = Matrices::dense(out.address()? + skipped, DType::F32, width, width);
        for sample in 0..samples {
            let at = |rows: &RowView| Matrices {
                data: rows.data + (rows.batch * (sample * dtype.size_in_bytes()) as i64) as u64,
                dtype,
                transposed: false,
                row: rows.token as usize,
                next: 0,
            };
            let keep = if sample == 0 { 0.0 } else { 1.0 };
            let (x, y) = (at(&x).transposed(), at(&y));
            let sizes = [width, width, tokens];
            let device = self.device();
            // SAFETY: the caller has compared the shapes of the operands, which are borrowed until here, and made room for
            // the result
            unsafe { gemm(device.as_cuda_device()?, &c, keep, [&x, &y], 1.0, sizes, 1) }?;
        }
        Ok(())
    }
}

/// `sum := keep · sum + factor · a·b`, or `a·bᵀ` if `transposed`, rounded once: `sum` (…, m, n), `a` (…, m, k), `b` (…, k,
/// n) or (…, n, k), contiguous, of one number format. Nothing else may hold `sum`. False if it does not fit.
pub(in super::super) fn multiply_onto(
    sum: &Tensor,
    keep: f64,
    [a, b]: [&Tensor; 2],
    transposed: bool,
    factor: f64,
) -> Result<bool> {
    let all = [sum, a, b];
    let Some(device) = device_of(&all.map(Some)) else {
        return Ok(false);
    };
    let Some(outer) = sum.rank().checked_sub(2) else {
        return Ok(false);
    };
    let alike = |t: &Tensor| {
        t.rank() == sum.rank()
            && t.dims()[..outer] == sum.dims()[..outer]
            && t.is_contiguous()
            && t.elem_count() > 0
    };
    if !all.iter().all(|t| alike(t)) {
        return Ok(false);
    }
    let ([m, n], k) = (
        [sum.dims()[outer], sum.dims()[outer + 1]],
        a.dims()[outer + 1],
    );
    let of_b = if transposed { [n, k] } else { [k, n] };
    if a.dims()[outer] != m || b.dims()[outer..] != of_b {
        return Ok(false);
    }
    let (dtype, count) = (sum.dtype(), sum.dims()[..outer].iter().product());
    let c = Matrices::dense(address_of(sum)?, dtype, m, n);
    let left = Matrices::dense(address_of(a)?, dtype, m, k);
    let right = Matrices {
        transposed,
        ..Matrices::dense(address_of(b)?, dtype, of_b[0], of_b[1])
    };
    let (keep, factor) = (keep as f32, factor as f32);
    // SAFETY: shapes have been compared, the operands are borrowed until here, and the caller says that nothing else
    // reads `sum`
    unsafe { gemm(device, &c, keep, [&left, &right], factor, [m, n, k], count) }?;
    Ok(true)
}

/// `aᵀ·b` in f32: `a` (k, m), `b` (k, n), contiguous, of one number format of 16 bits, to (m, n). Nothing if it does not fit.
pub(in super::super) fn transposed_product(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let (Some(device), Some([m, n, k])) = (device_of(&[Some(a), Some(b)]), transposed_sizes(a, b)?)
    else {
        return Ok(None);
    };
    if !matches!(a.dtype(), DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let out = Blank::new(device, DType::F32, m * n)?;
    let c = Matrices::dense(out.address()?, DType::F32, m, n);
    // SAFETY: sizes are those of the operands, which are borrowed until here, and there is room for the result
    unsafe { transposed_onto(device, &c, 0.0, [a, b], [m, n, k], 1.0) }?;
    Ok(Some(out.tensor((m, n))))
}

/// Adds `factor · aᵀ·b` to `sum` (m, n) in f32, which nothing else may hold: `a` (k, m), `b` (k, n), contiguous, of one number
/// format. False if it does not fit, and nothing was added.
///
/// # Errors
/// When cuBLAS fails.
pub fn add_transposed_product(sum: &Tensor, [a, b]: [&Tensor; 2], factor: f64) -> Result<bool> {
    let (Some(device), Some([m, n, k])) = (device_of(&[Some(a), Some(b)]), transposed_sizes(a, b)?)
    else {
        return Ok(false);
    };
    let takes_it = sum.dtype() == DType::F32
        && sum.device().same_device(a.device())
        && sum.dims() == [m, n]
        && sum.is_contiguous()
        && !sum.track_op();
    if !takes_it {
        return Ok(false);
    }
    let c = Matrices::dense(address_of(sum)?, DType::F32, m, n);
    // SAFETY: sizes are those of the operands, which are borrowed until here, and the caller says that nothing else reads `sum`
    unsafe { transposed_onto(device, &c, 1.0, [a, b], [m, n, k], factor as f32) }?;
    Ok(true)
}

/// Rows and columns of `aᵀ·b`, and what is summed over, if cuBLAS takes the operands.
fn transposed_sizes(a: &Tensor, b: &Tensor) -> Result<Option<[usize; 3]>> {
    let ((k, m), (rows, n)) = (a.dims2()?, b.dims2()?);
    let fits = matches!(a.dtype(), DType::F16 | DType::BF16 | DType::F32)
        && a.dtype() == b.dtype()
        && k == rows
        && k * m * n > 0
        && [a, b].iter().all(|t| t.is_contiguous());
    Ok(fits.then_some([m, n, k]))
}

/// `c := keep · c + factor · aᵀ·b`.
///
/// # Safety
/// As [`gemm`].
unsafe fn transposed_onto(
    device: &CudaDevice,
    c: &Matrices,
    keep: f32,
    [a, b]: [&Tensor; 2],
    [m, n, k]: [usize; 3],
    factor: f32,
) -> Result<()> {
    let left = Matrices::dense(address_of(a)?, a.dtype(), k, m).transposed();
    let right = Matrices::dense(address_of(b)?, b.dtype(), k, n);
    // SAFETY: as the caller says
    unsafe { gemm(device, c, keep, [&left, &right], factor, [m, n, k], 1) }
}

#[cfg(test)]
mod tests {
    use candle::{Device, Var};

    use super::super::super::{backward, multiply_add, product};
    use super::*;
    use crate::model::testing::{close, gpu, random};

    /// Result and gradients of x, weight and both factors, in f32 on the CPU.
    fn passes(device: &Device, dtype: DType, trained: bool) -> Result<Vec<Tensor>> {
        let place = |t: Tensor| t.to_dtype(DType::BF16)?.to_device(device);
        let var = |t: Tensor, dtype| Var::from_tensor(&place(t)?.to_dtype(dtype)?);
        let x = var(random("x", (2, 5, 24))?, dtype)?;
        let weight = var(
            random("w", (16, 24))?,
            if trained { DType::F32 } else { dtype },
        )?;
        let (a, b) = (
            var(random("a", (3, 24))?, DType::F32)?,
            var(random("b", (16, 3))?, DType::F32)?,
        );
        let frozen = weight.as_tensor().detach();
        let y = if trained {
            product(&x, &weight, None)?
        } else {
            product(&x, &frozen, Some((&a, &b, 0.5)))?
        };
        let grad = place(random("grad", (2, 5, 16))?)?.to_dtype(dtype)?;
        let mut grads = backward(&y, &grad)?;
        let all = [
            Some(y.detach()),
            grads.remove(&x),
            grads.remove(&weight),
            grads.remove(&a),
            grads.remove(&b),
        ];
        let all = all.into_iter().flatten();
        all.map(|t| t.to_dtype(DType::F32)?.to_device(&Device::Cpu))
            .collect()
    }

    #[test]
    fn products_of_a_gpu_are_those_of_the_cpu() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 8e-3)] {
            for trained in [false, true] {
                let got = passes(&gpu, dtype, trained)?;
                let want = passes(&Device::Cpu, DType::F32, trained)?;
                assert_eq!(
                    (got.len(), want.len()),
                    if trained { (3, 3) } else { (4, 4) }
                );
                for (got, want) in got.iter().zip(&want) {
                    close(got, want, tolerance)?;
                }
            }
        }
        let [sum, a, b] = [("s", (2, 4, 6)), ("a", (2, 4, 5)), ("b", (2, 5, 6))]
            .map(|(name, shape)| random(name, shape));
        let all = [sum?, a?, b?];
        let on = |device: &Device| -> Result<Tensor> {
            let [sum, a, b] = all.each_ref().map(|t| t.to_device(device)?.copy());
            multiply_add(sum?, -0.5, [&a?, &b?], 2.0)?.to_device(&Device::Cpu)
        };
        close(&on(&gpu)?, &on(&Device::Cpu)?, 2e-6)
    }
}
