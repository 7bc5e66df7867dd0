//! What text encoders compute: attention over heads, norms, and activation functions by transformers' names. No weights' names here.

use candle::{D, DType, Result, Tensor};
use serde::Deserialize;

/// An activation function under the names of transformers' `ACT2FN`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Activation {
    /// max(x, 0)
    Relu,
    /// x·Φ(x), with the error function
    #[serde(alias = "gelu_python")]
    Gelu,
    /// x·Φ(x), with tanh
    #[serde(
        alias = "gelu_pytorch_tanh",
        alias = "gelu_fast",
        alias = "gelu_python_tanh"
    )]
    GeluNew,
    /// x·σ(1.702 x)
    QuickGelu,
    /// x·σ(x)
    #[serde(alias = "swish")]
    Silu,
}

impl Activation {
    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu => x.relu(),
            Self::Gelu => x.gelu_erf(),
            Self::GeluNew => x.gelu(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Self::Silu => x.silu(),
        }
    }
}

/// softmax(q·kᵀ·scale + bias)·v of every head: q, k, v (b, n, heads · d) → (b, n, heads · d). `bias` (1 or b, 1 or heads, n, n) is
/// float32, and so are the scores.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    scale: f64,
    bias: &Tensor,
) -> Result<Tensor> {
    let (b, n, width) = q.dims3()?;
    let split = |x: &Tensor| {
        x.reshape((b, n, heads, width / heads))?
            .transpose(1, 2)?
            .contiguous()
    }; // (b, heads, n, d)
    let (q, k, v) = (split(&(q * scale)?)?, split(k)?, split(v)?);
    // multiplied in float32: T5's scores are large, and rounded to bfloat16 they would be off by tenths
    let (q, k) = (q.to_dtype(DType::F32)?, k.to_dtype(DType::F32)?);
    let scores = q.matmul(&k.t()?)?.broadcast_add(bias)?; // (b, heads, n, n)
    let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
    weights.matmul(&v)?.transpose(1, 2)?.reshape((b, n, width))
}

/// x / √(mean x² + ε) · weight, in float32.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(square + eps)?.sqrt()?)?
        .broadcast_mul(&weight.to_dtype(DType::F32)?)
}

/// x (b, n, k), weight (o, k) → (b, n, o).
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (b, n, k) = x.dims3()?;
    x.reshape((b * n, k))?
        .matmul(&weight.t()?)?
        .reshape((b, n, ()))
}

/// Token ids as a (b, n) tensor; an id for which the embedding has no row is refused.
pub(super) fn id_tensor(ids: &[Vec<u32>], rows: usize, device: &candle::Device) -> Result<Tensor> {
    if let Some(id) = ids.iter().flatten().find(|id| **id as usize >= rows) {
        candle::bail!(
            "token id {id} is beyond the {rows} rows of the text encoder's embedding: tokenizer and text encoder do not belong together"
        )
    }
    let n = ids.first().map_or(0, Vec::len);
    if n == 0 || ids.iter().any(|row| row.len() != n) {
        candle::bail!("prompts of different lengths, or none, cannot be encoded together")
    }
    Tensor::from_vec(ids.concat(), (ids.len(), n), device)
}

/// Fails at a number of layers, or a size, that a config cannot mean; the message names its field.
pub(super) fn check_sizes(
    layers: (&'static str, usize),
    sizes: &[(&'static str, usize)],
) -> anyhow::Result<()> {
    const MAX_LAYERS: usize = 512;
    const LARGEST: usize = 1 << 24;
    let sizes = sizes.iter().map(|size| (*size, LARGEST));
    for ((field, value), most) in std::iter::once((layers, MAX_LAYERS)).chain(sizes) {
        anyhow::ensure!(
            (1..=most).contains(&value),
            "`{field}` is {value}, expected a number from 1 to {most}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::noise::Generator;
    use candle::Device;

    #[test]
    fn activations_have_transformers_values_and_names() -> anyhow::Result<()> {
        // torch, at x = 1.5 and -0.7
        let expected = [
            ("relu", [1.5, 0.0]),
            ("gelu", [1.399_789_1, -0.169_374_6]),
            ("gelu_new", [1.399_571_5, -0.169_429_9]),
            ("quick_gelu", [1.391_662_2, -0.163_106]),
            ("silu", [1.226_361_6, -0.232_268_6]),
        ];
        let x = Tensor::new(&[1.5f32, -0.7], &Device::Cpu)?;
        for (name, values) in expected {
            let activation: Activation = serde_json::from_value(name.into())?;
            let y = activation.forward(&x)?.to_vec1::<f32>()?;
            assert!(
                y.iter().zip(values).all(|(a, b)| (a - b).abs() <= 2e-6),
                "{name}: {y:?}"
            );
        }
        assert!(serde_json::from_value::<Activation>("mish".into()).is_err());
        Ok(())
    }

    #[test]
    fn large_scores_are_not_rounded_to_bfloat16() -> Result<()> {
        let mut random = Generator::new(6);
        let mut narrow = |factor: f64| {
            let x = random.randn((2, 24, 2 * 64), &Device::Cpu)? * factor;
            x?.to_dtype(DType::BF16)
        };
        // scores of more than 100, as T5 has them
        let (q, k, v) = (narrow(4.0)?, narrow(4.0)?, narrow(1.0)?);
        let bias = Tensor::zeros((1, 1, 1, 1), DType::F32, &Device::Cpu)?;
        let of = |dtype| -> Result<Tensor> {
            let [q, k, v] = [&q, &k, &v].map(|x| x.to_dtype(dtype));
            attention(&q?, &k?, &v?, 2, 1.0, &bias)?.to_dtype(DType::F32)
        };
        let (got, want) = (of(DType::BF16)?, of(DType::F32)?);
        let size = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
        let error = (size(&(got - &want)?)? / size(&want)?).sqrt();
        assert!(error < 5e-3, "{error}"); // 0.017 if they are rounded
        Ok(())
    }

    #[test]
    fn an_id_beyond_the_embedding_is_refused() {
        let error = id_tensor(&[vec![1, 2], vec![3, 9]], 9, &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(error.contains("token id 9"), "{error}");
        assert!(id_tensor(&[vec![1, 2], vec![3]], 9, &Device::Cpu).is_err());
        assert!(id_tensor(&[], 9, &Device::Cpu).is_err());
    }
}
