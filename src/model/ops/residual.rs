//! The gated residual sum, with the bias of the projection before it folded in.

use candle::{DType, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, Operand, by_dtype, for_rows, fusable, vectorized};
use super::cuda;
use super::custom_op::custom_op;
use super::graph::{biased, concatenated, of_bias};
use super::plain::{self, wide};
use super::types::Branch;

/// `x + gate · (y + bias)` of each branch, joined along the tokens in the order given.
pub fn gated_residual(branches: &[Branch]) -> Result<Tensor> {
    let operands = branches
        .iter()
        .flat_map(|b| [Some(b.x), Some(b.y), b.bias, b.gate])
        .flatten();
    let mut tracked = operands.clone().filter(|x| x.track_op());
    match fusable(operands.clone()) {
        Some(dtype) => by_dtype!(dtype, fused(branches)),
        None if tracked.next().is_none() => untracked(branches),
        None => {
            let sums = branches.iter().map(residual_tracked);
            let sums = sums.collect::<Result<Vec<_>>>()?;
            let Some((first, more)) = sums.split_first() else {
                candle::bail!("no branches to join")
            };
            let join = |all: Tensor, next: &Tensor| concatenated(&all, next, 1);
            more.iter().try_fold(first.clone(), join)
        }
    }
}

/// On devices other than CPUs, and of mixed number formats.
fn untracked(branches: &[Branch]) -> Result<Tensor> {
    // the bias of a layer that is trained is wider than the tokens
    let biases = branches.iter().map(|b| {
        let narrow = |bias: &Tensor| bias.to_dtype(b.x.dtype());
        b.bias.map(narrow).transpose()
    });
    let biases = biases.collect::<Result<Vec<_>>>()?;
    let branches: Vec<Branch> = branches
        .iter()
        .zip(&biases)
        .map(|(branch, bias)| Branch {
            bias: bias.as_ref(),
            ..*branch
        })
        .collect();
    match cuda::gated_residual(&branches)? {
        Some(y) => Ok(y),
        None => plain::gated_residual(&branches),
    }
}

/// One branch as a node of the graph.
fn residual_tracked(branch: &Branch) -> Result<Tensor> {
    let (batch, _, width) = branch.x.dims3()?;
    let tracked = branch.bias.filter(|bias| bias.track_op());
    let frozen = branch.bias.filter(|bias| !bias.track_op()).cloned();
    if let (Some(bias), None) = (tracked, branch.gate) {
        return biased_tracked(branch, bias);
    }
    // with a gate a trainable bias is an operation of its own: no more than three inputs may be tracked
    let y = match tracked {
        Some(bias) => biased(branch.y, Some(bias))?,
        None => branch.y.clone(),
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
    custom_op(&inputs, sum, move |grad| {
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
        if let Some([dy, dgate]) = cuda::residual_backward(&y_data, frozen.as_ref(), gate, grad)? {
            return Ok(vec![dx, Some(dy), Some(dgate)]);
        }
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

/// `x + y + bias` as a node of the graph, with a trainable bias.
fn biased_tracked(branch: &Branch, bias: &Tensor) -> Result<Tensor> {
    let (x, y) = (branch.x.detach(), branch.y.detach());
    let (stored, bias_data) = (bias.dtype(), bias.detach().to_dtype(x.dtype())?);
    let width = bias.dim(0)?;
    let sum = gated_residual(&[Branch {
        x: &x,
        y: &y,
        bias: Some(&bias_data),
        gate: None,
    }])?;
    custom_op(&[branch.x, branch.y, bias], sum, move |grad| {
        let of_bias = of_bias(grad, width, stored)?;
        Ok(vec![Some(grad.clone()), Some(grad.clone()), Some(of_bias)])
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

fn fused<T: Element>(branches: &[Branch]) -> Result<Tensor> {
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
    let out = {
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
            batch * total,
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
                    *out = T::narrow(x.to_f32() + gate.to_f32() * (y.to_f32() + bias.to_f32()));
                }
            },
        )
    };
    Tensor::from_vec(out, (batch, total, width), first.x.device())
}

/// The kernels walk rows side by side and would stop at the end of a short one.
pub(super) fn check_bias(bias: Option<&Tensor>, width: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [width] => {
            candle::bail!("a bias of shape {:?} for rows of {width}", bias.shape())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    const DTYPES: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::BF16, 8e-3)];

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
                        &plain::gated_residual(branches)?,
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
