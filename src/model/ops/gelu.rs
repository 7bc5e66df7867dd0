//! GELU with the bias of the projection before it folded in.

use candle::{DType, Result, Tensor};

use super::cpu::{Element, Operand, by_dtype, exp, for_rows, fusable};
use super::custom_op::{by_recomputing, custom_op};
use super::residual::check_bias;
use super::{cuda, plain};

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Of the tanh approximation of GELU.
const CUBIC: f32 = 0.044_715;

/// `a ‖ gelu(x + bias)` along the last dimension, with the tanh approximation of GELU.
///
/// `x` (batch, tokens, width), may be a narrowed view; `bias` (width,); `prefix` (batch, tokens, any), put in front.
pub fn gelu(x: &Tensor, bias: Option<&Tensor>, prefix: Option<&Tensor>) -> Result<Tensor> {
    if bias.is_some_and(Tensor::track_op) {
        return plain::gelu(x, bias, prefix);
    }
    let (data, bias) = (x.detach(), bias.cloned());
    let beside_data = prefix.map(Tensor::detach);
    let operands = [&data].into_iter().chain(&bias).chain(&beside_data);
    let y = match fusable(operands) {
        Some(dtype) => by_dtype!(dtype, fused(&data, bias.as_ref(), beside_data.as_ref())),
        None => match cuda::gelu(&data, bias.as_ref(), beside_data.as_ref())? {
            Some(y) => Ok(y),
            None => plain::gelu(&data, bias.as_ref(), beside_data.as_ref()),
        },
    }?;
    let inputs: Vec<&Tensor> = [x].into_iter().chain(prefix).collect();
    let front = prefix.map_or(Ok(0), |t| t.dim(2))?;
    custom_op(&inputs, y, move |grad| {
        let (width, own) = (data.dim(2)?, grad.narrow(2, front, data.dim(2)?)?);
        let mut out = if fusable([&data].into_iter().chain(&bias)) == Some(DType::F32) {
            vec![Some(gelu_backward(&data, bias.as_ref(), &own)?)]
        } else if let Some(of_x) = cuda::gelu_backward(&data, bias.as_ref(), &own)? {
            vec![Some(of_x)]
        } else {
            by_recomputing(&[&data], &own, |t| plain::gelu(&t[0], bias.as_ref(), None))?
        };
        if grad.dim(2)? > width {
            out.push(Some(grad.narrow(2, 0, front)?.contiguous()?));
        }
        Ok(out)
    })
}

/// The gradient of x from that of gelu(x + bias), f32 on the CPU; both may be narrowed views.
fn gelu_backward(x: &Tensor, bias: Option<&Tensor>, grad: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let out = {
        let (x, bias, grad) = (Operand::new(x), bias.map(Operand::new), Operand::new(grad));
        let (x, grad) = (x.rows::<f32>()?, grad.rows::<f32>()?);
        let bias = bias.as_ref().map(Operand::rows::<f32>).transpose()?;
        for_rows(
            batch * tokens,
            width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / tokens, i % tokens);
                gelu_backward_row(
                    x.row(b, n),
                    bias.map(|bias| bias.row(0, 0)),
                    grad.row(b, n),
                    out,
                );
            },
        )
    };
    Tensor::from_vec(out, (batch, tokens, width), x.device())
}

/// out = grad · gelu'(x + bias) for one row.
#[inline(always)]
pub(super) fn gelu_backward_row(x: &[f32], bias: Option<&[f32]>, grad: &[f32], out: &mut [f32]) {
    match bias {
        Some(bias) => {
            for (((out, x), bias), grad) in out.iter_mut().zip(x).zip(bias).zip(grad) {
                *out = grad * gelu_slope(x + bias);
            }
        }
        None => {
            for ((out, x), grad) in out.iter_mut().zip(x).zip(grad) {
                *out = grad * gelu_slope(*x);
            }
        }
    }
}

/// The derivative of [`gelu_of`]: s + 2x·s(1 − s)·du/dx with s = sigmoid(2u).
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let u = SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x);
    let s = 1.0 / (1.0 + exp(-2.0 * u));
    s + 2.0 * x * s * (1.0 - s) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
}

fn fused<T: Element>(x: &Tensor, bias: Option<&Tensor>, prefix: Option<&Tensor>) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    check_bias(bias, width)?;
    let offset = prefix.map_or(Ok(0), |t| t.dim(2))?;
    if prefix.is_some_and(|t| t.dims() != [batch, tokens, offset]) {
        candle::bail!(
            "({batch}, {tokens}, any) was expected as the prefix of {:?}",
            x.shape()
        );
    }
    let out = {
        let (x, bias, prefix) = (
            Operand::new(x),
            bias.map(Operand::new),
            prefix.map(Operand::new),
        );
        let x = x.rows::<T>()?;
        let bias = bias.as_ref().map(Operand::rows::<T>).transpose()?;
        let prefix = prefix.as_ref().map(Operand::rows::<T>).transpose()?;
        for_rows(
            batch * tokens,
            offset + width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / tokens, i % tokens);
                let (front, out) = out.split_at_mut(offset);
                if let Some(prefix) = prefix {
                    front.copy_from_slice(prefix.row(b, n));
                }
                let x = x.row(b, n);
                match bias {
                    Some(bias) => {
                        for ((out, x), bias) in out.iter_mut().zip(x).zip(bias.row(b, n)) {
                            *out = T::narrow(gelu_of(x.to_f32() + bias.to_f32()));
                        }
                    }
                    None => {
                        for (out, x) in out.iter_mut().zip(x) {
                            *out = T::narrow(gelu_of(x.to_f32()));
                        }
                    }
                }
            },
        )
    };
    Tensor::from_vec(out, (batch, tokens, offset + width), x.device())
}

/// ½x(1 + tanh u) = x·sigmoid(2u) with u = √(2/π)(x + 0.044715x³).
#[inline(always)]
pub(super) fn gelu_of(x: f32) -> f32 {
    let u = SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x);
    x / (1.0 + exp(-2.0 * u))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    const DTYPES: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::BF16, 8e-3)];

    #[test]
    fn fused_gelu_equals_plain_on_columns_of_a_wider_tensor() -> Result<()> {
        for (batch, tokens, width, front) in [(1, 1, 5, 3), (1, 28, 512, 128), (3, 33, 70, 1)] {
            for (dtype, tolerance) in DTYPES {
                let wider = (random("x", (batch, tokens, width + 9))? * 3.0)?.to_dtype(dtype)?;
                let x = wider.narrow(2, 9, width)?;
                let bias = random("bias", width)?.to_dtype(dtype)?;
                let prefix = random("prefix", (batch, tokens, front))?.to_dtype(dtype)?;
                for bias in [None, Some(&bias)] {
                    for prefix in [None, Some(&prefix)] {
                        close(
                            &gelu(&x, bias, prefix)?,
                            &plain::gelu(&x, bias, prefix)?,
                            tolerance,
                        )?;
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gelu_is_exact_in_the_tails() {
        for (x, want) in [
            (0f32, 0f32),
            (-50.0, 0.0),
            (50.0, 50.0),
            (-1e30, 0.0),
            (1.0, 0.841_192),
            (-1.0, -0.158_808),
        ] {
            assert!(
                (gelu_of(x) - want).abs() < 1e-6,
                "gelu({x}) = {}",
                gelu_of(x)
            );
        }
    }
}
