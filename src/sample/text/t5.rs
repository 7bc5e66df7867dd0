//! T5's encoder. `sample::tokenize` makes the tokens.
//!
//! FLUX masks no text: every token, padding too, sees every other. Layers are read when they are needed and dropped afterwards, so that
//! no more than one of them is in memory: T5-XXL's 4.7 billion parameters run once for all prompts and are not needed again.
//! candle-transformers has T5 too, but keeps all of it, multiplies by a copy of each weight per prompt and knows fewer activations.
//! Source: transformers `models/t5/modeling_t5.py` (`T5EncoderModel`).

use candle::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::ops::{Activation, attention, id_tensor, linear, rms_norm as norm};
use super::t5_config::{BIAS, T5Config};

/// Most attention scores that are kept at once: 256 MiB of float32.
const SCORES: usize = 1 << 26;

/// T5's encoder; holds no weights but knows where they are.
pub(super) struct T5 {
    config: T5Config,
    vb: VarBuilder<'static>,
}

impl T5 {
    /// `vb` holds transformers' names, the embedding under `shared.weight`.
    pub(super) fn new(config: T5Config, vb: VarBuilder<'static>) -> Self {
        Self { config, vb }
    }

    /// Width of the hidden states.
    pub(super) fn width(&self) -> usize {
        self.config.d_model
    }

    /// Token ids, all rows of one length → last hidden states (b, n, d_model), float32.
    pub(super) fn hidden(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (c, vb) = (&self.config, &self.vb);
        let ids = id_tensor(ids, c.vocab_size, vb.device())?;
        let (b, n) = ids.dims2()?;
        let mut x = {
            let table = vb.get((c.vocab_size, c.d_model), "shared.weight")?;
            // the sum over all layers is kept in float32 whatever the weights' format: it overflows float16
            table
                .index_select(&ids.flatten_all()?, 0)?
                .to_dtype(DType::F32)?
                .reshape((b, n, c.d_model))?
        };
        let blocks = vb.pp("encoder.block");
        let bias = self.position_bias(n, &blocks.pp(0))?;
        // as many prompts at a time as keep the scores small
        let batch = (SCORES / (c.num_heads * n * n).max(1)).clamp(1, b);
        for i in 0..c.num_layers {
            let block = Block::new(c, &blocks.pp(i))?;
            let parts: Result<Vec<Tensor>> = (0..b)
                .step_by(batch)
                .map(|at| block.forward(&x.narrow(0, at, batch.min(b - at))?, &bias))
                .collect();
            x = Tensor::cat(&parts?, 0)?;
        }
        norm(
            &x,
            &vb.get(c.d_model, "encoder.final_layer_norm.weight")?,
            c.layer_norm_epsilon,
        )
    }

    /// (1, heads, n, n) float32.
    fn position_bias(&self, n: usize, block: &VarBuilder) -> Result<Tensor> {
        let c = &self.config;
        if c.relative_attention_num_buckets < 4
            || c.relative_attention_max_distance <= c.relative_attention_num_buckets / 4
        {
            bail!(
                "T5: {} buckets do not cover distances up to {}",
                c.relative_attention_num_buckets,
                c.relative_attention_max_distance
            )
        }
        let table = block.get((c.relative_attention_num_buckets, c.num_heads), BIAS)?;
        let buckets = (0..n).flat_map(|query| {
            (0..n).map(move |key| {
                bucket(
                    key as i64 - query as i64,
                    c.relative_attention_num_buckets,
                    c.relative_attention_max_distance,
                )
            })
        });
        let buckets = Tensor::from_iter(buckets, table.device())?;
        table
            .index_select(&buckets, 0)?
            .to_dtype(DType::F32)?
            .reshape((n, n, c.num_heads))?
            .permute((2, 0, 1))?
            .unsqueeze(0)?
            .contiguous()
    }
}

/// Which of `buckets` biases a key at `distance` from the query gets: half of them for each direction, half of those exact.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let far = distance.unsigned_abs() as usize;
    let index = if far < exact {
        far
    } else {
        // float32 in torch's order: at powers of two the result is a whole number that must not fall below itself
        let scale = (max_distance as f64 / exact as f64).ln() as f32;
        let steps = (far as f32 / exact as f32).ln() / scale * (half - exact) as f32;
        (exact + steps as usize).min(half - 1)
    };
    (index + if distance > 0 { half } else { 0 }) as u32
}

struct Block {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    norm0: Tensor,
    norm1: Tensor,
    inputs: Vec<Tensor>,
    wo: Tensor,
    act: Activation,
    heads: usize,
    eps: f64,
}

impl Block {
    fn new(c: &T5Config, vb: &VarBuilder) -> Result<Self> {
        let (attention, dense) = (
            vb.pp("layer.0.SelfAttention"),
            vb.pp("layer.1.DenseReluDense"),
        );
        let (d, inner) = (c.d_model, c.num_heads * c.d_kv);
        let inputs: &[&str] = if c.feed_forward_proj.gated {
            &["wi_0.weight", "wi_1.weight"]
        } else {
            &["wi.weight"]
        };
        Ok(Self {
            q: attention.get((inner, d), "q.weight")?,
            k: attention.get((inner, d), "k.weight")?,
            v: attention.get((inner, d), "v.weight")?,
            o: attention.get((d, inner), "o.weight")?,
            norm0: vb.get(d, "layer.0.layer_norm.weight")?,
            norm1: vb.get(d, "layer.1.layer_norm.weight")?,
            inputs: inputs
                .iter()
                .map(|name| dense.get((c.d_ff, d), name))
                .collect::<Result<_>>()?,
            wo: dense.get((d, c.d_ff), "wo.weight")?,
            act: c.feed_forward_proj.act,
            heads: c.num_heads,
            eps: c.layer_norm_epsilon,
        })
    }

    /// x (b, n, d_model) float32 → the same; products in the weights' format.
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let dtype = self.q.dtype();
        let y = norm(x, &self.norm0, self.eps)?.to_dtype(dtype)?;
        let (q, k, v) = (
            linear(&y, &self.q)?,
            linear(&y, &self.k)?,
            linear(&y, &self.v)?,
        );
        let y = linear(&attention(&q, &k, &v, self.heads, 1.0, bias)?, &self.o)?;
        let x = (x + y.to_dtype(DType::F32)?)?;

        let y = norm(&x, &self.norm1, self.eps)?.to_dtype(dtype)?;
        let mut hidden = self.act.forward(&linear(&y, &self.inputs[0])?)?;
        if let Some(gate) = self.inputs.get(1) {
            hidden = (hidden * linear(&y, gate)?)?;
        }
        // this product overflows float16, so transformers keeps `wo` in float32 there
        let wide = if dtype == DType::F16 {
            DType::F32
        } else {
            dtype
        };
        x + linear(&hidden.to_dtype(wide)?, &self.wo.to_dtype(wide)?)?.to_dtype(DType::F32)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_transformers() {
        // T5Attention._relative_position_bucket of these distances, 32 buckets up to 128
        let distances = [
            -200, -128, -127, -91, -90, -64, -63, -32, -31, -16, -15, -11, -8, -7, -1, 0, 1, 7, 8,
            16, 32, 64, 91, 128, 500,
        ];
        let expected = [
            15, 15, 15, 15, 14, 14, 13, 12, 11, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 26, 28, 30, 31,
            31, 31,
        ];
        assert_eq!(distances.map(|d| bucket(d, 32, 128)), expected);
    }
}
