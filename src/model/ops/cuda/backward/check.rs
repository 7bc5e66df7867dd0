//! Compares the backward passes with candle's gradients of the compositions in f32.

use candle::{DType, Device, Result, Tensor};

use super::super::super::custom_op::by_recomputing;
use super::super::super::plain;
use super::super::super::types::{Heads, Norms, Projected};
use super::super::check::compare;
use super::Module;
use crate::model::rope::Rope;

/// Number formats, and how far a result may be from the exact one: it is rounded once.
const FORMATS: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::F16, 6e-4), (DType::BF16, 4e-3)];

/// The same numbers for the kernels and, in f32 on the CPU, for the compositions.
struct Numbers<'a> {
    module: &'a Module,
    dtype: DType,
}

impl Numbers<'_> {
    /// Between -2 and 2, no two alike.
    fn draw(&self, seed: usize, shape: &[usize]) -> Result<[Tensor; 2]> {
        let at = |i: usize| ((i + 1) as f64 * 0.618_034 + seed as f64 * 0.414_214).fract();
        let numbers = (0..shape.iter().product()).map(|i| (4.0 * at(i) - 2.0) as f32);
        let numbers = Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, &Device::Cpu)?;
        let numbers = numbers.to_dtype(self.dtype)?;
        let ours = numbers.to_device(&self.module.device())?;
        Ok([ours, numbers.to_dtype(DType::F32)?])
    }
}

/// Fails if a kernel disagrees: on views, odd widths, several samples.
pub(super) fn all(module: &Module) -> Result<()> {
    for (dtype, tolerance) in FORMATS {
        let numbers = Numbers { module, dtype };
        let agree = |got: Option<&Tensor>, want: Option<&Tensor>| match (got, want) {
            (Some(got), Some(want)) if got.dtype() == dtype => compare(0, got, want, tolerance),
            _ => candle::bail!("the kernels take no such operands"),
        };
        activations(&numbers, &agree)?;
        norms(&numbers, &agree)?;
        heads(&numbers, &agree)?;
        residuals(&numbers, &agree)?;
        weighted_sums(&numbers, &agree)?;
    }
    Ok(())
}

type Agree<'a> = &'a dyn Fn(Option<&Tensor>, Option<&Tensor>) -> Result<()>;

fn activations(numbers: &Numbers, agree: Agree) -> Result<()> {
    for (batch, tokens, width, skipped) in [(1, 1, 5, 0), (2, 9, 256, 128), (3, 3, 70, 9)] {
        let columns = |all: &Tensor, width: usize| all.narrow(2, skipped, width);
        let [x, exact] = numbers.draw(0, &[batch, tokens, skipped + width])?;
        let [bias, exact_bias] = numbers.draw(1, &[width])?;
        let [grad, exact_grad] = numbers.draw(2, &[batch, tokens, skipped + width])?;
        for biased in [false, true] {
            let got = super::of_gelu(
                numbers.module,
                &columns(&x, width)?,
                biased.then_some(&bias),
                &columns(&grad, width)?,
            )?;
            let exact_bias = biased.then_some(&exact_bias);
            let (x, grad) = (columns(&exact, width)?, columns(&exact_grad, width)?);
            let want = by_recomputing(&[&x], &grad, |t| plain::gelu(&t[0], exact_bias, None))?;
            agree(got.as_ref(), want[0].as_ref())?;
        }
        let [x, exact] = numbers.draw(3, &[batch, tokens, skipped + 2 * width])?;
        let got = super::of_swiglu(
            numbers.module,
            &columns(&x, 2 * width)?,
            &columns(&grad, width)?,
        )?;
        let (x, grad) = (columns(&exact, 2 * width)?, columns(&exact_grad, width)?);
        let want = by_recomputing(&[&x], &grad, |t| plain::swiglu(&t[0], None))?;
        agree(got.as_ref(), want[0].as_ref())?;
    }
    Ok(())
}

fn norms(numbers: &Numbers, agree: Agree) -> Result<()> {
    for (batch, tokens, width) in [(1, 2, 8), (3, 2, 37), (2, 3, 1031), (1, 2, 3072)] {
        let [joint, exact] = numbers.draw(0, &[batch, tokens + 4, width])?;
        let [modulation, exact_modulation] = numbers.draw(1, &[batch, 2 * width])?;
        let [grad, exact_grad] = numbers.draw(2, &[batch, tokens, width])?;
        let (scale, x) = (
            modulation.narrow(1, width, width)?,
            joint.narrow(1, 3, tokens)?,
        );
        let got = super::of_norm(numbers.module, &x, &scale, &grad)?;
        let inputs = [
            exact.narrow(1, 3, tokens)?,
            exact_modulation.narrow(1, 0, width)?,
            exact_modulation.narrow(1, width, width)?,
        ];
        let want = by_recomputing(&inputs.each_ref(), &exact_grad, |t| {
            plain::norm_modulate(&t[0], &t[1], &t[2])
        })?;
        let (of_x, along) = got.map(|[of_x, along]| (of_x, along)).unzip();
        agree(of_x.as_ref(), want[0].as_ref())?;
        // rounded before it is summed
        let sum = along.map(|t| t.to_dtype(DType::F32)?.sum(1)).transpose()?;
        let sum = sum.map(|t| t.to_dtype(numbers.dtype)).transpose()?;
        agree(sum.as_ref(), want[2].as_ref())?;
    }
    Ok(())
}

fn residuals(numbers: &Numbers, agree: Agree) -> Result<()> {
    for (batch, tokens, width) in [(1, 2, 8), (3, 2, 37), (2, 300, 264)] {
        let [joint, exact] = numbers.draw(0, &[batch, tokens + 2, width + 8])?;
        let part = |t: &Tensor| t.narrow(1, 1, tokens)?.narrow(2, 8, width);
        let [bias, exact_bias] = numbers.draw(1, &[width])?;
        let [gates, exact_gates] = numbers.draw(2, &[batch, 3 * width])?;
        let gate = |t: &Tensor| t.narrow(1, width, width);
        let [grad, exact_grad] = numbers.draw(3, &[batch, tokens, width])?;
        for biased in [false, true] {
            let bias = biased.then_some(&bias);
            let got = super::sums::of_residual(
                numbers.module,
                &part(&joint)?,
                bias,
                &gate(&gates)?,
                &grad,
            )?;
            let bias = biased.then_some(&exact_bias);
            let inputs = [part(&exact)?, gate(&exact_gates)?];
            let want = by_recomputing(&inputs.each_ref(), &exact_grad, |t| {
                plain::biased(&t[0], bias)?.broadcast_mul(&t[1].unsqueeze(1)?)
            })?;
            let (of_y, of_gate) = got.map(|[of_y, of_gate]| (of_y, of_gate)).unzip();
            agree(of_y.as_ref(), want[0].as_ref())?;
            agree(of_gate.as_ref(), want[1].as_ref())?;
        }
    }
    Ok(())
}

fn weighted_sums(numbers: &Numbers, agree: Agree) -> Result<()> {
    for shape in [vec![1], vec![37, 5], vec![3, 70, 64]] {
        let [x, exact_x] = numbers.draw(0, &shape)?;
        let [y, exact_y] = numbers.draw(1, &shape)?;
        for (a, b) in [(1.0, 1.0), (0.95, -3.5)] {
            let got = super::sums::weighted(numbers.module, &x, a, &y, b)?;
            let want = ((&exact_x * a)? + (&exact_y * b)?)?;
            agree(got.as_ref(), Some(&want))?;
        }
    }
    Ok(())
}

fn heads(numbers: &Numbers, agree: Agree) -> Result<()> {
    for (batch, txt, img, number, axes, mlp) in [
        (2, 2, 3, 2, [16, 56, 56], 64),
        (1, 3, 4, 3, [16, 56, 56], 7),
        (2, 1, 5, 3, [2, 4, 6], 0),
    ] {
        let (size, tokens) = (axes.iter().sum::<usize>(), txt + img);
        let hidden = number * size;
        let ids: Vec<f32> = (0..3 * tokens).map(|i| (i * i % 23) as f32).collect();
        let ids = Tensor::from_vec(ids, (tokens, 3), &Device::Cpu)?;
        let rope = |device: &Device| Rope::new(&ids, &axes, 10_000.0, device);
        let (rope, exact_rope) = (rope(&numbers.module.device())?, rope(&Device::Cpu)?);
        let [query, exact_query] = numbers.draw(0, &[size])?;
        let [key, exact_key] = numbers.draw(1, &[size])?;
        let norms = Norms { query, key };
        let exact_norms = Norms {
            query: exact_query,
            key: exact_key,
        };
        let width = 3 * hidden + mlp;
        let [bias, exact_bias] = numbers.draw(2, &[width])?;
        let [of_heads, exact_of_heads] = numbers.draw(3, &[3, batch, number, tokens, size])?;
        let [of_mlp, exact_of_mlp] = numbers.draw(4, &[batch, tokens, mlp.max(1)])?;
        let [all, exact] = numbers.draw(5, &[batch, tokens, width])?;
        let plain_heads = |streams: &[Projected]| -> Result<Tensor> {
            let Heads { q, k, v } = plain::heads(streams, number, &exact_rope)?;
            Tensor::stack(&[q, k, v], 0)
        };
        // one stream with an MLP behind
        let stream = Projected {
            qkv: &all,
            bias: Some(&bias),
            norms: &norms,
        };
        let of_rest = bias.narrow(0, 3 * hidden, mlp)?;
        let rest = (mlp > 0).then_some((Some(&of_rest), &of_mlp));
        let got = super::of_projection(numbers.module, &stream, &of_heads, 0, &rope, rest)?;
        let want = by_recomputing(&[&exact], &exact_of_heads, |t| {
            let (qkv, bias) = (&t[0], Some(&exact_bias));
            plain_heads(&[Projected {
                qkv,
                bias,
                norms: &exact_norms,
            }])
        })?;
        let x = exact.narrow(2, 3 * hidden, mlp)?;
        let exact_rest = exact_bias.narrow(0, 3 * hidden, mlp)?;
        let of_mlp = match mlp {
            0 => vec![],
            _ => by_recomputing(&[&x], &exact_of_mlp, |t| {
                plain::gelu(&t[0], Some(&exact_rest), None)
            })?,
        };
        let own = want[0].as_ref().map(|t| t.narrow(2, 0, 3 * hidden));
        let parts = own.into_iter().chain(of_mlp.into_iter().flatten().map(Ok));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        agree(got.as_ref(), Some(&Tensor::cat(&parts, 2)?))?;
        // the second of two streams
        let stream = |all: &Tensor, from, len| all.narrow(2, 0, 3 * hidden)?.narrow(1, from, len);
        let part = stream(&all, txt, img)?;
        let got = super::of_projection(
            numbers.module,
            &Projected {
                qkv: &part,
                bias: None,
                norms: &norms,
            },
            &of_heads,
            txt,
            &rope,
            None,
        )?;
        let inputs = [stream(&exact, 0, txt)?, stream(&exact, txt, img)?];
        let want = by_recomputing(&inputs.each_ref(), &exact_of_heads, |t| {
            let projected = |qkv| Projected {
                qkv,
                bias: None,
                norms: &exact_norms,
            };
            plain_heads(&[projected(&t[0]), projected(&t[1])])
        })?;
        agree(got.as_ref(), want[1].as_ref())?;
    }
    Ok(())
}
