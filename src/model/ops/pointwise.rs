//! GELU and the gated residual sum, each with the bias of the projection before it folded in.

use candle::{DType, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, Operand, by_dtype, exp, for_rows, fusable, vectorized};
use super::function::{by_recomputing, function};
use super::wide;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Of the tanh approximation of GELU.
const CUBIC: f32 = 0.044_715;

/// `a ‖ gelu(x + bias)` along the last dimension, with the tanh approximation of GELU.
///
/// `x` (batch, tokens, width), may be a narrowed view; `bias` (width,); `beside` (batch, tokens, any), put in front.
pub fn gelu(x: &Tensor, bias: Option<&Tensor>, beside: Option<&Tensor>) -> Result<Tensor> {
    if bias.is_some_and(Tensor::track_op) {
        return gelu_plain(x, bias, beside);
    }
    let (data, bias) = (x.detach(), bias.cloned());
    let beside_data = beside.map(Tensor::detach);
    let operands = [&data].into_iter().chain(&bias).chain(&beside_data);
    let y = match fusable(operands) {
        Some(dtype) => by_dtype!(
            dtype,
            gelu_fused(&data, bias.as_ref(), beside_data.as_ref())
        ),
        None => gelu_plain(&data, bias.as_ref(), beside_data.as_ref()),
    }?;
    let inputs: Vec<&Tensor> = [x].into_iter().chain(beside).collect();
    let front = beside.map_or(Ok(0), |t| t.dim(2))?;
    function(&inputs, y, move |grad| {
        let (width, own) = (data.dim(2)?, grad.narrow(2, front, data.dim(2)?)?);
        let mut out = if fusable([&data].into_iter().chain(&bias)) == Some(DType::F32) {
            vec![Some(gelu_backward(&data, bias.as_ref(), &own)?)]
        } else {
            by_recomputing(&[&data], &own, |t| gelu_plain(&t[0], bias.as_ref(), None))?
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
    let mut out = vec![0f32; batch * tokens * width];
    {
        let (x, bias, grad) = (Operand::new(x), bias.map(Operand::new), Operand::new(grad));
        let (x, grad) = (x.rows::<f32>()?, grad.rows::<f32>()?);
        let bias = bias.as_ref().map(Operand::rows::<f32>).transpose()?;
        for_rows(
            &mut out,
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
        );
    }
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

fn gelu_plain(x: &Tensor, bias: Option<&Tensor>, beside: Option<&Tensor>) -> Result<Tensor> {
    let y = biased(x, bias)?.gelu()?;
    match beside {
        Some(beside) => Tensor::cat(&[beside, &y], 2),
        None => Ok(y),
    }
}

fn gelu_fused<T: Element>(
    x: &Tensor,
    bias: Option<&Tensor>,
    beside: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    check_bias(bias, width)?;
    let offset = beside.map_or(Ok(0), |t| t.dim(2))?;
    if beside.is_some_and(|t| t.dims() != [batch, tokens, offset]) {
        candle::bail!(
            "({batch}, {tokens}, any) was expected beside {:?}",
            x.shape()
        );
    }
    let mut out = vec![T::zero(); batch * tokens * (offset + width)];
    {
        let (x, bias, beside) = (
            Operand::new(x),
            bias.map(Operand::new),
            beside.map(Operand::new),
        );
        let x = x.rows::<T>()?;
        let bias = bias.as_ref().map(Operand::rows::<T>).transpose()?;
        let beside = beside.as_ref().map(Operand::rows::<T>).transpose()?;
        for_rows(
            &mut out,
            offset + width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / tokens, i % tokens);
                let (front, out) = out.split_at_mut(offset);
                if let Some(beside) = beside {
                    front.copy_from_slice(beside.row(b, n));
                }
                let x = x.row(b, n);
                match bias {
                    Some(bias) => {
                        for ((out, x), bias) in out.iter_mut().zip(x).zip(bias.row(b, n)) {
                            *out = T::narrow(gelu_of(x.widen() + bias.widen()));
                        }
                    }
                    None => {
                        for (out, x) in out.iter_mut().zip(x) {
                            *out = T::narrow(gelu_of(x.widen()));
                        }
                    }
                }
            },
        );
    }
    Tensor::from_vec(out, (batch, tokens, offset + width), x.device())
}

/// ½x(1 + tanh u) = x·sigmoid(2u) with u = √(2/π)(x + 0.044715x³).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    let u = SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x);
    x / (1.0 + exp(-2.0 * u))
}

/// One stream's part of [`gated_residual`].
pub struct Branch<'a> {
    /// What the branch is added to, (batch, tokens, width); may be a narrowed view.
    pub x: &'a Tensor,
    /// The branch's last projection without its bias, (batch, tokens, width).
    pub y: &'a Tensor,
    /// That projection's bias, (width,).
    pub bias: Option<&'a Tensor>,
    /// (batch, width) or (1, width); `None` is a gate of one.
    pub gate: Option<&'a Tensor>,
}

/// `x + gate · (y + bias)` of each branch, joined along the tokens in the order given.
pub fn gated_residual(branches: &[Branch]) -> Result<Tensor> {
    let operands = branches
        .iter()
        .flat_map(|b| [Some(b.x), Some(b.y), b.bias, b.gate])
        .flatten();
    let mut tracked = operands.clone().filter(|x| x.track_op());
    match fusable(operands.clone()) {
        Some(dtype) => by_dtype!(dtype, residual_fused(branches)),
        None if tracked.next().is_none() => residual_plain(branches),
        None => {
            let sums = branches.iter().map(residual_tracked);
            match sums.collect::<Result<Vec<_>>>()?.as_slice() {
                [one] => Ok(one.clone()),
                many => Tensor::cat(many, 1),
            }
        }
    }
}

/// One branch as a node of the graph.
fn residual_tracked(branch: &Branch) -> Result<Tensor> {
    let (batch, _, width) = branch.x.dims3()?;
    // a trainable bias (of a replacement's layer) is added by candle
    let frozen = branch.bias.filter(|bias| !bias.track_op()).cloned();
    let y = match (&frozen, branch.bias) {
        (None, Some(bias)) => biased(branch.y, Some(bias))?,
        _ => branch.y.clone(),
    };
    let gate = branch.gate.map(|gate| match gate.dims2()? {
        (rows, _) if rows == batch => Ok(gate.clone()),
        _ => gate.broadcast_as((batch, width)),
    });
    let gate = gate.transpose()?;
    let (x_data, y_data) = (branch.x.detach(), y.detach());
    let gate_data = gate.as_ref().map(Tensor::detach);
    let sum = gated_residual(&[Branch {
        x: &x_data,
        y: &y_data,
        bias: frozen.as_ref(),
        gate: gate_data.as_ref(),
    }])?;
    let inputs: Vec<&Tensor> = [branch.x, &y].into_iter().chain(&gate).collect();
    function(&inputs, sum, move |grad| {
        let dx = Some(grad.clone());
        let Some(gate) = &gate_data else {
            return Ok(vec![dx.clone(), dx]);
        };
        let operands = [&y_data, gate].into_iter().chain(&frozen);
        if fusable(operands) == Some(DType::F32) {
            let (dy, dgate) = gate_backward(&y_data, frozen.as_ref(), gate, &grad.contiguous()?)?;
            return Ok(vec![dx, Some(dy), Some(dgate)]);
        }
        let dtype = y_data.dtype();
        let (wide_grad, wide_gate) = (wide(grad)?, wide(gate)?);
        let dy = wide_grad.broadcast_mul(&wide_gate.unsqueeze(1)?)?;
        let y = wide(&biased(&y_data, frozen.as_ref())?)?;
        let dgate = (wide_grad * y)?.sum(1)?;
        Ok(vec![
            dx,
            Some(dy.to_dtype(dtype)?),
            Some(dgate.to_dtype(gate.dtype())?),
        ])
    })
}

/// Gradients of y and gate from that of x + gate · (y + bias), f32 on the CPU.
fn gate_backward(
    y: &Tensor,
    bias: Option<&Tensor>,
    gate: &Tensor,
    grad: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (batch, tokens, width) = y.dims3()?;
    let mut dy = vec![0f32; batch * tokens * width];
    let mut dgate = vec![0f32; batch * width];
    {
        let (y, bias) = (Operand::new(y), bias.map(Operand::new));
        let (gate, grad) = (Operand::new(gate), Operand::new(grad));
        let (y, gate, grad) = (y.rows::<f32>()?, gate.rows::<f32>()?, grad.rows::<f32>()?);
        let bias = bias.as_ref().map(Operand::rows::<f32>).transpose()?;
        let zeros = vec![0f32; width];
        dy.par_chunks_mut((tokens * width).max(1))
            .zip(dgate.par_chunks_mut(width.max(1)))
            .enumerate()
            .for_each(|(b, (dy, dgate))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let gate = gate.row(b, 0);
                        let bias = bias.map_or(zeros.as_slice(), |bias| bias.row(0, 0));
                        for (n, dy) in dy.chunks_exact_mut(width).enumerate() {
                            let (y, grad) = (y.row(b, n), grad.row(b, n));
                            for ((dy, gate), grad) in dy.iter_mut().zip(gate).zip(grad) {
                                *dy = grad * gate;
                            }
                            let sums = dgate.iter_mut().zip(grad);
                            for (((dgate, grad), y), bias) in sums.zip(y).zip(bias) {
                                *dgate += grad * (y + bias);
                            }
                        }
                    },
                );
            });
    }
    let device = grad.device();
    Ok((
        Tensor::from_vec(dy, (batch, tokens, width), device)?,
        Tensor::from_vec(dgate, (batch, width), device)?,
    ))
}

fn residual_plain(branches: &[Branch]) -> Result<Tensor> {
    let sums = branches.iter().map(|branch| {
        let y = biased(branch.y, branch.bias)?;
        let y = match branch.gate {
            Some(gate) => y.broadcast_mul(&gate.to_dtype(y.dtype())?.unsqueeze(1)?)?,
            None => y,
        };
        branch.x + y
    });
    match sums.collect::<Result<Vec<_>>>()?.as_slice() {
        [one] => Ok(one.clone()),
        many => Tensor::cat(many, 1),
    }
}

fn residual_fused<T: Element>(branches: &[Branch]) -> Result<Tensor> {
    let Some(first) = branches.first() else {
        candle::bail!("no branches to join")
    };
    let (batch, _, width) = first.x.dims3()?;
    let mut total = 0;
    for branch in branches {
        let tokens = branch.x.dim(1)?;
        for part in [branch.x, branch.y] {
            if part.dims() != [batch, tokens, width] {
                candle::bail!(
                    "expected ({batch}, {tokens}, {width}), found {:?}",
                    part.shape()
                );
            }
        }
        check_bias(branch.bias, width)?;
        total += tokens;
    }
    let mut out = vec![T::zero(); batch * total * width];
    {
        let operands = branches.iter().map(|b| {
            let gate = b.gate.map(|g| g.broadcast_as((batch, width))).transpose()?;
            Ok((b, gate))
        });
        let operands = operands.collect::<Result<Vec<_>>>()?;
        let operands: Vec<_> = operands
            .iter()
            .map(|(b, gate)| {
                (
                    Operand::new(b.x),
                    Operand::new(b.y),
                    b.bias.map(Operand::new),
                    gate.as_ref().map(Operand::new),
                )
            })
            .collect();
        let mut parts = Vec::with_capacity(operands.len());
        let mut start = 0;
        for ((x, y, bias, gate), branch) in operands.iter().zip(branches) {
            let bias = bias.as_ref().map(Operand::rows::<T>).transpose()?;
            let gate = gate.as_ref().map(Operand::rows::<T>).transpose()?;
            parts.push((start, x.rows::<T>()?, y.rows::<T>()?, bias, gate));
            start += branch.x.dim(1)?;
        }
        let (ones, zeros) = (vec![T::narrow(1.0); width], vec![T::narrow(0.0); width]);
        for_rows(
            &mut out,
            width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / total, i % total);
                let part = parts
                    .iter()
                    .rev()
                    .find(|part| part.0 <= n)
                    .unwrap_or(&parts[0]);
                let (start, x, y, bias, gate) = part;
                let (x, y) = (x.row(b, n - start), y.row(b, n - start));
                let bias = bias.map_or(zeros.as_slice(), |rows| rows.row(b, 0));
                let gate = gate.map_or(ones.as_slice(), |rows| rows.row(b, 0));
                for ((((out, x), y), bias), gate) in
                    out.iter_mut().zip(x).zip(y).zip(bias).zip(gate)
                {
                    *out = T::narrow(x.widen() + gate.widen() * (y.widen() + bias.widen()));
                }
            },
        );
    }
    Tensor::from_vec(out, (batch, total, width), first.x.device())
}

/// The kernels walk rows side by side and would stop at the end of a short one.
fn check_bias(bias: Option<&Tensor>, width: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [width] => {
            candle::bail!("a bias of shape {:?} for rows of {width}", bias.shape())
        }
        _ => Ok(()),
    }
}

/// `x + bias` over the last dimension.
pub fn biased(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => x.broadcast_add(&bias.to_dtype(x.dtype())?),
        None => Ok(x.clone()),
    }
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
                let beside = random("beside", (batch, tokens, front))?.to_dtype(dtype)?;
                for bias in [None, Some(&bias)] {
                    for beside in [None, Some(&beside)] {
                        close(
                            &gelu(&x, bias, beside)?,
                            &gelu_plain(&x, bias, beside)?,
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

    #[test]
    fn fused_residual_equals_plain_for_one_branch_and_two() -> Result<()> {
        for (batch, txt, img, width) in [(1, 1, 1, 7), (1, 12, 16, 128), (3, 5, 50, 130)] {
            for (dtype, tolerance) in DTYPES {
                let joint = random("x", (batch, txt + img, width))?.to_dtype(dtype)?;
                let y = random("y", (batch, txt + img, width))?.to_dtype(dtype)?;
                let modulation = random("m", (batch, 2 * width))?.to_dtype(dtype)?;
                let shared = random("m", (1, width))?.to_dtype(dtype)?;
                let gate = modulation.narrow(1, width, width)?;
                let bias = random("bias", width)?.to_dtype(dtype)?;
                let part = |x: &Tensor, start, len| x.narrow(1, start, len);
                let (txt_x, txt_y) = (part(&joint, 0, txt)?, part(&y, 0, txt)?);
                let (img_x, img_y) = (part(&joint, txt, img)?, part(&y, txt, img)?);
                let first = || Branch {
                    x: &txt_x,
                    y: &txt_y,
                    bias: Some(&bias),
                    gate: Some(&gate),
                };
                let second = || Branch {
                    x: &img_x,
                    y: &img_y,
                    bias: None,
                    gate: None,
                };
                let third = || Branch {
                    x: &joint,
                    y: &y,
                    bias: Some(&bias),
                    gate: Some(&shared),
                };
                for branches in [
                    &[first(), second()][..],
                    &[second(), first()],
                    &[first()],
                    &[third()],
                ] {
                    close(
                        &gated_residual(branches)?,
                        &residual_plain(branches)?,
                        tolerance,
                    )?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn branches_of_different_shapes_are_refused() -> Result<()> {
        let (x, y) = (random("x", (1, 4, 8))?, random("y", (1, 3, 8))?);
        assert!(
            gated_residual(&[Branch {
                x: &x,
                y: &y,
                bias: None,
                gate: None
            }])
            .is_err()
        );
        assert!(gated_residual(&[]).is_err());
        Ok(())
    }
}
