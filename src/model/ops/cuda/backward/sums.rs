//! The backward pass of a gated residual, and sums of two tensors.

use candle::{DType, Result, Tensor};

use super::super::super::sum_of_tokens;
use super::super::calls::{MAX_BLOCKS, Operands, THREADS};
use super::super::launch::Module;
use super::super::parameters::{ResidualBackward, WeightedSum};
use super::with;

/// The most that tokens are divided by for the gradient of a gate.
const PARTS: usize = 128;

/// The gradients of `y` and `gate` (batch, width) from that of x + gate · (y + bias), `grad` like `y` (batch, tokens,
/// width).
pub(in super::super::super) fn residual_backward(
    y: &Tensor,
    bias: Option<&Tensor>,
    gate: &Tensor,
    grad: &Tensor,
) -> Result<Option<[Tensor; 2]>> {
    with(&[Some(y), bias, Some(gate), Some(grad)], |module| {
        of_residual(module, y, bias, gate, grad)
    })
}

pub(super) fn of_residual(
    module: &Module,
    y: &Tensor,
    bias: Option<&Tensor>,
    gate: &Tensor,
    grad: &Tensor,
) -> Result<Option<[Tensor; 2]>> {
    let (dtype, (batch, tokens, width)) = (y.dtype(), y.dims3()?);
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.fits(batch <= MAX_BLOCKS && y.elem_count() > 0);
    let parts = tokens.min(PARTS);
    let out = module.blank(dtype, batch * tokens * width)?;
    let sums = module.blank(DType::F32, batch * parts * width)?;
    let parameters = ResidualBackward {
        y: operands.rows(y, &[batch, tokens, width])?,
        bias: operands.some_rows(bias, &[width])?,
        gate: operands.rows(gate, &[batch, width])?,
        grad: operands.rows(grad, &[batch, tokens, width])?,
        out: out.address()?,
        sums: sums.address()?,
        tokens: tokens as i32,
        width: width as i32,
        whole: operands.whole.into(),
    };
    if !operands.fits {
        return Ok(None);
    }
    let pieces = width.div_ceil(operands.piece());
    let grid = [pieces.div_ceil(THREADS), parts, batch];
    module.run(dtype, grid, [THREADS, 1], &parameters)?;
    let of_gate = sum_of_tokens(&sums.tensor((batch, parts, width)))?;
    Ok(Some([
        out.tensor((batch, tokens, width)),
        of_gate.to_dtype(dtype)?,
    ]))
}

/// `a·x + b·y` of tensors of one shape, computed in f32.
pub(in super::super::super) fn weighted_sum(
    x: &Tensor,
    a: f64,
    y: &Tensor,
    b: f64,
) -> Result<Option<Tensor>> {
    with(&[Some(x), Some(y)], |module| weighted(module, x, a, y, b))
}

pub(super) fn weighted(
    module: &Module,
    x: &Tensor,
    a: f64,
    y: &Tensor,
    b: f64,
) -> Result<Option<Tensor>> {
    if x.dims() != y.dims() || !x.is_contiguous() || !y.is_contiguous() {
        return Ok(None);
    }
    let (dtype, len, shape) = (x.dtype(), x.elem_count(), x.shape());
    let (x, y) = (x.flatten_all()?, y.flatten_all()?);
    let mut operands = Operands::new(dtype);
    let out = module.blank(dtype, len)?;
    operands.place(out.address()?, len);
    let parameters = WeightedSum {
        x: operands.rows(&x, &[len])?,
        y: operands.rows(&y, &[len])?,
        out: out.address()?,
        len: len as i64,
        a: a as f32,
        b: b as f32,
        whole: operands.whole.into(),
    };
    if !operands.fits {
        return Ok(None);
    }
    let pieces = len.div_ceil(operands.piece());
    module.run(
        dtype,
        [pieces.div_ceil(THREADS), 1, 1],
        [THREADS, 1],
        &parameters,
    )?;
    Ok(Some(out.tensor(shape)))
}
