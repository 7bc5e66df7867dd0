//! Products by cuBLAS, of numbers as they are and summed in f32. candle's own round the result to the operands' format.
#![expect(unsafe_code, reason = "cuBLAS is given addresses")]

use candle::cuda_backend::WrapErr;
use candle::cuda_backend::cudarc::cublas::{result as cublas, sys as blas};
use candle::{DType, Result, Tensor};

use super::launch::{Blank, Module, address_of};
use super::parameters::RowView;

fn format(dtype: DType) -> blas::cudaDataType_t {
    match dtype {
        DType::BF16 => blas::cudaDataType_t::CUDA_R_16BF,
        DType::F16 => blas::cudaDataType_t::CUDA_R_16F,
        _ => blas::cudaDataType_t::CUDA_R_32F,
    }
}

impl Module {
    /// `scale · a·bᵀ` to `out`: `a` (matrices, m, k) and `b` (matrices, n, k), contiguous, of one number format, to
    /// (matrices, m, n) in f32. candle's product would round it to their format.
    pub(super) fn product(
        &self,
        a: &Tensor,
        b: &Tensor,
        [matrices, m, n, k]: [usize; 4],
        scale: f32,
        out: &Blank,
    ) -> Result<()> {
        let (format, wide) = (format(a.dtype()), blas::cudaDataType_t::CUDA_R_32F);
        let (alpha, beta) = (scale, 0f32);
        let handle = self.device().as_cuda_device()?.cublas_handle();
        let [a, b, c] = [address_of(a)?, address_of(b)?, out.address()?];
        // SAFETY: `calls` has compared the shapes of the operands, which are borrowed until here, and made room for the
        // result; all of it is done in the order of the device's stream. cuBLAS counts columns first: to it rows are
        // columns, and the operands change places.
        unsafe {
            cublas::gemm_strided_batched_ex(
                *handle.handle(),
                blas::cublasOperation_t::CUBLAS_OP_T,
                blas::cublasOperation_t::CUBLAS_OP_N,
                n as i32,
                m as i32,
                k as i32,
                (&raw const alpha).cast(),
                b as *const _,
                format,
                k as i32,
                (n * k) as i64,
                a as *const _,
                format,
                k as i32,
                (m * k) as i64,
                (&raw const beta).cast(),
                c as *mut _,
                wide,
                n as i32,
                (m * n) as i64,
                matrices as i32,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()
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
        let (format, wide) = (format(dtype), blas::cudaDataType_t::CUDA_R_32F);
        let handle = self.device().as_cuda_device()?.cublas_handle();
        let c = out.address()? + (place * width * width * size_of::<f32>()) as u64;
        for sample in 0..samples {
            let (alpha, beta) = (1f32, if sample == 0 { 0f32 } else { 1f32 });
            let at = |rows: &RowView| {
                let skipped = rows.batch * (sample * dtype.size_in_bytes()) as i64;
                rows.data + skipped as u64
            };
            // SAFETY: the caller has compared the shapes of the operands, which are borrowed until here, and made room for
            // the result; all of it is done in the order of the device's stream. cuBLAS counts columns first: to it rows
            // are columns, and the operands change places.
            unsafe {
                cublas::gemm_strided_batched_ex(
                    *handle.handle(),
                    blas::cublasOperation_t::CUBLAS_OP_N,
                    blas::cublasOperation_t::CUBLAS_OP_T,
                    width as i32,
                    width as i32,
                    tokens as i32,
                    (&raw const alpha).cast(),
                    at(&y) as *const _,
                    format,
                    y.token as i32,
                    0,
                    at(&x) as *const _,
                    format,
                    x.token as i32,
                    0,
                    (&raw const beta).cast(),
                    c as *mut _,
                    wide,
                    width as i32,
                    0,
                    1,
                    blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
            }
            .w()?;
        }
        Ok(())
    }
}
