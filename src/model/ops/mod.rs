//! What blocks are made of: products, norms, heads, attention, GELU, residuals.
//!
//! Every operation exists twice: a plain composition of candle operations, which runs on every device, and a fused CPU
//! kernel that does it in one pass; those between the products have a kernel for NVIDIA GPUs too (`cuda`). The choice is
//! made by the operands: a kernel runs if all are on one such device, in one number format. If an operand is tracked for gradients the result becomes one node of candle's graph with a
//! backward pass of its own (`custom_op`), again fused or composed, so that no training flag can be forgotten and no
//! fused operation drops a gradient.
//!
//! On CPUs with AVX-512 products and attention run on inner loops of our own (`avx512`), in bf16 on pairs if the CPU
//! multiplies them; elsewhere on `faer`. Weights are read as they are stored: none is converted or
//! repacked as a whole.
//!
//! Computed in f32 whatever the dtype: norm statistics, the rotation of queries and keys, softmax, gate and residual of
//! the kernels. Results are rounded to the dtype of the input once.

#![expect(
    clippy::inline_always,
    reason = "a kernel's helpers must be compiled with the instruction set of their caller"
)]

mod attend;
mod attend_fused;
mod attention;
mod attention_simd;
#[cfg_attr(not(target_arch = "x86_64"), path = "avx512_stub.rs")]
mod avx512;
mod cpu;
#[cfg_attr(not(feature = "cuda"), path = "cuda/stub.rs")]
mod cuda;
mod custom_op;
mod dequantize;
mod fused_linear;
mod gated;
mod gelu;
mod gemm;
mod graph;
mod heads;
mod norm;
mod plain;
mod product;
mod residual;
mod rule;
mod swiglu;
mod types;
mod uninit;

pub use attend::{attend, attend_with_gelu, holds_scores_backward};
pub(super) use attention::MAX_SCORES;
pub use attention::holds_scores;
pub use cuda::{add_products, add_transposed_product, limit_kept_memory, token_sums, trouble};
pub use fused_linear::{attend_with_gelu_of_product, gelu_of_product};
pub use gated::gated;
pub use gelu::gelu;
pub use norm::norm_modulate;

pub use dequantize::dequantize;
#[cfg(test)]
pub use graph::is_known;
pub use graph::{Gradients, backward, biased, narrow, plus_for_all};
pub use product::{multiply_add, product};
pub use residual::gated_residual;
pub use swiglu::swiglu;
pub use types::{Branch, Norms, Projected};

use candle::{D, Result, Tensor};

/// The sum of all numbers, a scalar; differentiable. Rows first, except on the CPU: candle's GPU kernel gives each result
/// one block of threads, and so the sum of a whole tensor to one of a hundred processors.
pub fn total(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() || x.rank() < 2 {
        return x.sum_all();
    }
    x.sum(D::Minus1)?.sum_all()
}

/// `a·x + b·y` of tensors of one shape and number format; not differentiable.
pub fn weighted_sum(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
    if let Some(sum) = cuda::weighted_sum(x, a, y, b)? {
        return Ok(sum);
    }
    (x * a)? + (y * b)?
}

/// The sum over the tokens of `x` (batch, tokens, width), (batch, width): a product with ones, which GPUs add up in f32 at
/// the speed that they read.
fn sum_of_tokens(x: &Tensor) -> Result<Tensor> {
    let (batch, tokens, _) = x.dims3()?;
    let ones = Tensor::ones((batch, 1, tokens), x.dtype(), x.device())?;
    ones.matmul(&x.contiguous()?)?.squeeze(1)
}
