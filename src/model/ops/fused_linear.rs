//! Products joined with what follows them, so that the wide tensors between a block's two projections are written once:
//! GELU of a projection, and the inside of a single block. For inference on the CPU; everything else composes these of
//! the operations of the other files.

use candle::{DType, Device, Result, Tensor};

use super::attention::scale_of;
use super::attention_simd;
use super::avx512::{Avx512, Vector};
use super::cpu::{Operand, by_dtype, fusable};
use super::gemm::{self, Then};
use super::heads::heads;
use super::product::product;
use super::types::{Heads, Norms, Projected};
use super::uninit::filled;
use crate::model::rope::Rope;

/// What kernels may be joined for: untracked, on the CPU, in one number format.
fn joinable(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Option<DType> {
    fusable([x, weight].into_iter().chain(bias)).filter(|_| x.is_contiguous())
}

/// `gelu(x·weightᵀ + bias)`: `x` (batch, tokens, in), `weight` (out, in), `bias` (out,) to (batch, tokens, out); nothing
/// if that has to be composed.
pub fn gelu_of_product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    match joinable(x, weight, bias) {
        Some(dtype) => by_dtype!(dtype, gelu_joined(x, weight, bias)).map(Some),
        None => Ok(None),
    }
}

fn gelu_joined<T: Vector>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (batch, tokens, inner) = x.dims3()?;
    let (rows, width) = (batch * tokens, weight.dim(0)?);
    check(x, weight, bias)?;
    let weight = weight.contiguous()?;
    let (x, weight, bias) = (
        Operand::new(x),
        Operand::new(&weight),
        bias.map(Operand::new),
    );
    let (x, weight) = (x.slice::<T>()?, weight.slice::<T>()?);
    let bias = bias.as_ref().map(Operand::slice::<T>).transpose()?;
    let out = filled(rows, width, |out| {
        gemm::times_transposed(x, weight, inner, out, Then::Gelu(bias));
    });
    Tensor::from_vec(out, (batch, tokens, width), &Device::Cpu)
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (width, inner) = weight.dims2()?;
    if x.dim(2)? != inner || bias.is_some_and(|bias| bias.dims() != [width]) {
        candle::bail!(
            "a product of {:?} with {:?} transposed and a bias of {:?}",
            x.shape(),
            weight.shape(),
            bias.map(Tensor::shape)
        );
    }
    Ok(())
}

/// What a single block puts between its two projections, from what the first is applied to, `x` (batch, tokens, hidden):
/// attention from its first 3·hidden rows and the GELU of the rest, (batch, tokens, hidden + mlp); nothing if that
/// has to be composed.
pub fn attend_with_gelu_of_product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    norms: &Norms,
    num_heads: usize,
    rope: &Rope,
) -> Result<Option<Tensor>> {
    let Some(dtype) = joinable(x, weight, bias) else {
        return Ok(None);
    };
    let Some(simd) = Avx512::detect().filter(|_| attention_simd::fits(rope.head_dim())) else {
        return Ok(None);
    };
    let hidden = num_heads * rope.head_dim();
    let part = |t: &Tensor, start: usize| -> Result<Tensor> {
        let len = if start == 0 {
            3 * hidden
        } else {
            t.dim(0)?.saturating_sub(start)
        };
        t.narrow(0, start, len)
    };
    let (batch, tokens, inner) = x.dims3()?;
    let qkv = product(&x.reshape(((), inner))?, &part(weight, 0)?, None)?;
    let bias_qkv = bias.map(|bias| part(bias, 0)).transpose()?;
    let projected = Projected {
        qkv: &qkv.reshape((batch, tokens, 3 * hidden))?,
        bias: bias_qkv.as_ref(),
        norms,
    };
    let heads = heads(&[projected], num_heads, rope)?;
    drop(qkv);
    if fusable([&heads.q]) != Some(dtype) {
        return Ok(None);
    }
    let weight = part(weight, 3 * hidden)?;
    let bias = bias.map(|bias| part(bias, 3 * hidden)).transpose()?;
    by_dtype!(dtype, with_gelu(simd, &heads, x, &weight, bias.as_ref())).map(Some)
}

fn with_gelu<T: Vector>(
    simd: Avx512,
    heads: &Heads,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, num_heads, tokens, size) = heads.q.dims4()?;
    let (rows, hidden) = (batch * tokens, num_heads * size);
    let width = hidden + weight.dim(0)?;
    check(x, weight, bias)?;
    let (scale, inner) = (scale_of(&heads.q)? as f32, x.dim(2)?);
    let weight = weight.contiguous()?;
    let operands = [&heads.q, &heads.k, &heads.v].map(Operand::new);
    let [q, k, v] = &operands;
    let qkv = [q.slice::<T>()?, k.slice::<T>()?, v.slice::<T>()?];
    let (x, weight, bias) = (
        Operand::new(x),
        Operand::new(&weight),
        bias.map(Operand::new),
    );
    let (x, weight) = (x.slice::<T>()?, weight.slice::<T>()?);
    let bias = bias.as_ref().map(Operand::slice::<T>).transpose()?;
    let out = filled(rows, width, |out| {
        let [attended, rest] = out.split_columns(hidden);
        attention_simd::attention(simd, qkv, (num_heads, tokens, size), scale, attended);
        gemm::times_transposed(x, weight, inner, rest, Then::Gelu(bias));
    });
    Tensor::from_vec(out, (batch, tokens, width), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::super::{attend_with_gelu, gelu};
    use super::*;
    use crate::{
        model::testing::{close, random},
        ui::skip,
    };

    #[test]
    fn joined_equals_composed() -> Result<()> {
        for (batch, tokens, num_heads, axes, mlp) in [
            (1, 5, 2, vec![4, 6, 6], 40),
            (2, 33, 3, vec![2, 4, 2], 17),
            (1, 70, 1, vec![16, 56, 56], 130),
        ] {
            let size: usize = axes.iter().sum();
            let hidden = num_heads * size;
            let ids = (random("ids", (tokens, 3))? * 20.0)?;
            let rope = Rope::new(&ids, &axes, 10_000.0, ids.device())?;
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)]
            {
                let x = random("x", (batch, tokens, hidden))?.to_dtype(dtype)?;
                let weight = (random("w", (3 * hidden + mlp, hidden))? * 0.2)?.to_dtype(dtype)?;
                let bias = random("b", 3 * hidden + mlp)?.to_dtype(dtype)?;
                let norms = Norms {
                    query: random("q", size)?.to_dtype(dtype)?,
                    key: random("k", size)?.to_dtype(dtype)?,
                };
                for bias in [None, Some(&bias)] {
                    let y = product(&x.reshape(((), hidden))?, &weight, None)?;
                    let y = y.reshape((batch, tokens, ()))?;
                    let Some(got) = gelu_of_product(&x, &weight, bias)? else {
                        candle::bail!("nothing in {dtype:?}")
                    };
                    close(&got, &gelu(&y, bias, None)?, tolerance)?;
                    let projected = Projected {
                        qkv: &y,
                        bias,
                        norms: &norms,
                    };
                    let want = attend_with_gelu(&projected, num_heads, &rope)?;
                    let got =
                        attend_with_gelu_of_product(&x, &weight, bias, &norms, num_heads, &rope)?;
                    match got {
                        Some(got) => close(&got, &want, tolerance)?,
                        None => {
                            assert!(Avx512::detect().is_none());
                            skip("avx512");
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_tracked_or_does_not_fit_is_left() -> Result<()> {
        let (x, weight) = (random("x", (1, 3, 8))?, random("w", (4, 8))?);
        let tracked = candle::Var::from_tensor(&x)?;
        assert!(gelu_of_product(tracked.as_tensor(), &weight, None)?.is_none());
        assert!(gelu_of_product(&x, &random("w", (4, 7))?, None).is_err());
        assert!(gelu_of_product(&x, &weight, Some(&random("b", 3)?)).is_err());
        Ok(())
    }
}
