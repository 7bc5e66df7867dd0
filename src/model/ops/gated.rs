//! Tokens times factors that all tokens of a sample share: a gate without residual, weights of samples in a fit.

use candle::{Result, Tensor};

use super::cpu::{Element, Operand, by_dtype, for_rows, fusable};

/// `x` (batch, tokens, width) times `factors`, (batch, width) or (batch, 1), in the dtype of both. Differentiable.
pub fn gated(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    match fusable([x, factors]) {
        Some(dtype) => by_dtype!(dtype, fused(x, factors)),
        None => plain(x, factors),
    }
}

fn plain(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&factors.unsqueeze(1)?)
}

fn fused<T: Element>(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let (samples, columns) = factors.dims2()?;
    if samples != batch || columns != width && columns != 1 {
        candle::bail!("({samples}, {columns}) factors for ({batch}, {tokens}, {width}) tokens");
    }
    let (x, factors) = (Operand::new(x), Operand::new(factors));
    let (x, factors) = (x.rows::<T>()?, factors.rows::<T>()?);
    let out = for_rows(
        batch * tokens,
        width,
        #[inline(always)]
        |row, out: &mut [T]| {
            let (sample, token) = (row / tokens, row % tokens);
            let (x, factors) = (x.row(sample, token), factors.row(sample, 0));
            if let [factor] = factors {
                let factor = factor.to_f32();
                for (out, x) in out.iter_mut().zip(x) {
                    *out = T::narrow(x.to_f32() * factor);
                }
            } else {
                for ((out, x), factor) in out.iter_mut().zip(x).zip(factors) {
                    *out = T::narrow(x.to_f32() * factor.to_f32());
                }
            }
        },
    );
    Tensor::from_vec(out, (batch, tokens, width), &candle::Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    #[test]
    fn fused_equals_plain() -> Result<()> {
        for (batch, tokens, width, columns) in [(2, 3, 5, 5), (2, 3, 5, 1), (3, 70, 128, 128)] {
            let x = random("x", (batch, tokens + 2, width))?.narrow(1, 1, tokens)?;
            let factors = random("factors", (batch, columns))?;
            close(&gated(&x, &factors)?, &plain(&x, &factors)?, 1e-7)?;
        }
        let (x, factors) = (random("x", (2, 3, 5))?, random("factors", (2, 4))?);
        assert!(gated(&x, &factors).is_err());
        Ok(())
    }
}
