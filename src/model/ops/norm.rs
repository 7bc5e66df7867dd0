//! Layer norm without weights, then scale and shift, which open every branch of every block.
//! RMS norms of queries and keys are in `heads`.

use candle::{D, Result, Tensor};

use super::cpu::{Element, Operand, by_dtype, for_rows, fusable, sum_map};
use super::wide;

/// LayerNorm's epsilon (diffusers `transformer_flux.py`, BFL `layers.py`).
const EPS: f64 = 1e-6;

/// `layer_norm(x) · (1 + scale) + shift`; statistics in f32 whatever the dtype (f64 stays f64).
///
/// `x` (batch, tokens, width), may be a view narrowed over tokens; `shift`, `scale` (batch, width), or (1, width) for
/// all. The result is contiguous.
pub fn norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    let shift = shift.broadcast_as((batch, width))?;
    let scale = scale.broadcast_as((batch, width))?;
    match fusable([x, &shift, &scale]) {
        Some(dtype) => by_dtype!(dtype, fused(x, &shift, &scale)),
        None => plain(x, &shift, &scale),
    }
}

fn plain(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = wide(x)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    let x = x.broadcast_div(&deviation)?;
    let scale = (wide(scale)? + 1.0)?.unsqueeze(1)?;
    let shift = wide(shift)?.unsqueeze(1)?;
    x.broadcast_mul(&scale)?
        .broadcast_add(&shift)?
        .to_dtype(dtype)
}

fn fused<T: Element>(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let mut out = vec![T::zero(); batch * tokens * width];
    {
        let (x, shift, scale) = (Operand::new(x), Operand::new(shift), Operand::new(scale));
        let (x, shift, scale) = (x.rows::<T>()?, shift.rows::<T>()?, scale.rows::<T>()?);
        for_rows(
            &mut out,
            width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / tokens, i % tokens);
                let (x, shift, scale) = (x.row(b, n), shift.row(b, 0), scale.row(b, 0));
                let mean = sum_map(x, |x| x) / width as f32;
                let variance = sum_map(x, |x| (x - mean) * (x - mean)) / width as f32;
                let factor = 1.0 / (variance + EPS as f32).sqrt();
                for (((out, x), shift), scale) in out.iter_mut().zip(x).zip(shift).zip(scale) {
                    *out = T::narrow(
                        (x.widen() - mean) * factor * (1.0 + scale.widen()) + shift.widen(),
                    );
                }
            },
        );
    }
    Tensor::from_vec(out, (batch, tokens, width), x.device())
}

#[cfg(test)]
mod tests {
    use candle::DType;

    use super::*;
    use crate::model::testing::{close, random};

    #[test]
    fn fused_equals_plain_on_views_too() -> Result<()> {
        for (batch, tokens, width) in [(1, 1, 8), (1, 7, 37), (3, 5, 128), (3, 40, 513)] {
            let joint = random("x", (batch, tokens + 4, width))?;
            let modulation = random("m", (batch, 3 * width))?;
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 4e-3)] {
                let x = joint.to_dtype(dtype)?.narrow(1, 3, tokens)?;
                let modulation = modulation.to_dtype(dtype)?;
                let (shift, scale) = (
                    modulation.narrow(1, width, width)?,
                    modulation.narrow(1, 0, width)?,
                );
                assert!(fusable([&x, &shift, &scale]).is_some());
                close(
                    &norm_modulate(&x, &shift, &scale)?,
                    &plain(&x, &shift, &scale)?,
                    tolerance,
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn rows_come_out_with_the_asked_mean_and_spread() -> Result<()> {
        let x = (random("x", (2, 3, 64))? * 5.0)?;
        let (shift, scale) = (
            Tensor::full(0.5f32, (2, 64), x.device())?,
            Tensor::full(1f32, (2, 64), x.device())?,
        );
        let y = norm_modulate(&x, &shift, &scale)?;
        let mean = y.mean_keepdim(2)?;
        let spread = y.broadcast_sub(&mean)?.sqr()?.mean_keepdim(2)?.sqrt()?;
        close(&mean, &Tensor::full(0.5f32, (2, 3, 1), x.device())?, 1e-5)?;
        close(&spread, &Tensor::full(2f32, (2, 3, 1), x.device())?, 1e-5)
    }
}
