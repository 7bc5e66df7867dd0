//! What blocks are made of: products, norms, heads, attention, GELU, residuals.
//!
//! Every operation exists twice: a plain composition of candle operations, which runs on every device, and a fused CPU
//! kernel that does it in one pass. The choice is made by the operands: a kernel runs where all are on the CPU, in one
//! number format. Where an operand is tracked for gradients the result becomes one node of candle's graph with a
//! backward pass of its own (`function`), again fused or composed, so that no training flag can be forgotten and no
//! fused operation drops a gradient.
//!
//! Computed in f32 whatever the dtype: norm statistics, the rotation of queries and keys, softmax, gate and residual of
//! the kernels. Results are rounded to the dtype of the input once.

#![expect(
    clippy::inline_always,
    reason = "a kernel's helpers must be compiled with the instruction set of their caller"
)]

mod attend;
mod attend_cpu;
mod attention;
mod cpu;
mod function;
mod gelu;
mod heads;
mod norm;
mod product;
mod residual;
mod widen;

pub use attend::{attend, attend_beside_gelu};
pub use gelu::gelu;
pub use heads::{Norms, Projected};
pub use norm::norm_modulate;

pub use product::product;
pub use residual::{Branch, biased, gated_residual};
pub use widen::widen;

use candle::{DType, Result, Tensor};

/// f32, or f64 where it is f64 already.
fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => Ok(x.clone()),
        _ => x.to_dtype(DType::F32),
    }
}
