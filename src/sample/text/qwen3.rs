//! Qwen3 as an encoder: three of its hidden states, not the words that it would answer with. `sample::tokenize` makes the tokens.
//!
//! Layers are read when they are needed and dropped afterwards, as T5's are; layers above the last hidden state and the
//! projection to words are never read. candle-transformers has Qwen3 too, but gives only the last state, keeps its layers
//! private and holds all of them.
//! Source: transformers `models/qwen3/modeling_qwen3.py` (`Qwen3Model`).

use std::ops::Range;

use candle::{D, DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, rotary_emb::rope};

use super::{
    ops::{id_tensor, linear, rms_norm},
    qwen3_config::{Qwen3Config, STATES},
};

/// Most attention scores that are kept at once: 256 MiB of float32.
const SCORES: usize = 1 << 26;

/// Token ids of a prompt, and which of them are not padding.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    pub(super) real: Range<usize>,
}

/// Qwen3; holds no weights but knows where they are.
pub(super) struct Qwen3 {
    config: Qwen3Config,
    vb: VarBuilder<'static>,
}

impl Qwen3 {
    /// `vb` holds transformers' names below `model.` (`embed_tokens.weight`, `layers.0.…`).
    pub(super) fn new(config: Qwen3Config, vb: VarBuilder<'static>) -> Self {
        Self { config, vb }
    }

    /// Width of what [`Self::hidden`] gives.
    pub(super) fn width(&self) -> usize {
        STATES.len() * self.config.hidden_size
    }

    /// Prompts, all of one length → the hidden states of [`STATES`] side by side, (b, n, 3 · hidden), float32. Padding is
    /// seen by no token, but has states too.
    pub(super) fn hidden(&self, prompts: &[Prompt]) -> Result<Tensor> {
        let (c, vb) = (&self.config, &self.vb);
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
        let ids = id_tensor(&ids, c.vocab_size, vb.device())?;
        let (b, n) = ids.dims2()?;
        // the sum over all layers is kept in float32 whatever the weights' format
        let mut x = vb
            .get((c.vocab_size, c.hidden_size), "embed_tokens.weight")?
            .index_select(&ids.flatten_all()?, 0)?
            .to_dtype(DType::F32)?
            .reshape((b, n, c.hidden_size))?;
        let rotary = Rotary::new(c, n, vb.device())?;
        let masks = masks(prompts, n, vb.device())?;
        // as many prompts at a time as keep the scores small
        let batch = (SCORES / (c.num_attention_heads * n * n).max(1)).clamp(1, b);
        let mut states = Vec::new();
        for i in 0..Qwen3Config::LAYERS {
            let layer = Layer::new(c, &vb.pp("layers").pp(i))?;
            let part = |at: usize| {
                let len = batch.min(b - at);
                layer.forward(&x.narrow(0, at, len)?, &rotary, &masks.narrow(0, at, len)?)
            };
            let parts: Result<Vec<Tensor>> = (0..b).step_by(batch).map(part).collect();
            x = Tensor::cat(&parts?, 0)?;
            if STATES.contains(&(i + 1)) {
                states.push(x.clone());
            }
        }
        if c.ends_normed() {
            let norm = vb.get(c.hidden_size, "norm.weight")?;
            states.pop();
            states.push(rms_norm(&x, &norm, c.rms_norm_eps)?);
        }
        Tensor::cat(&states, D::Minus1)
    }
}

/// (b, 1, n, n) float32, minus infinity where a token does not see another: what follows it, and padding.
fn masks(prompts: &[Prompt], n: usize, device: &Device) -> Result<Tensor> {
    let values = prompts.iter().flat_map(|prompt| {
        let real = prompt.real.clone();
        (0..n).flat_map(move |query| {
            let real = real.clone();
            // padding before the prompt sees itself, as softmax needs something
            let alone = query < real.start;
            let sees =
                move |key: usize| (key <= query && real.contains(&key)) || (alone && key == query);
            (0..n).map(move |key| if sees(key) { 0.0 } else { f32::NEG_INFINITY })
        })
    });
    Tensor::from_iter(values, device)?.reshape((prompts.len(), 1, n, n))
}

/// Cosines and sines of positions 0 to n, (n, head size / 2), float32.
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(config: &Qwen3Config, n: usize, device: &Device) -> Result<Self> {
        let (half, theta) = (config.head_dim / 2, config.theta() as f32);
        // float32 in torch's order
        let frequency = |i: usize| 1.0 / theta.powf((2 * i) as f32 / config.head_dim as f32);
        let angles =
            (0..n).flat_map(|position| (0..half).map(move |i| position as f32 * frequency(i)));
        let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((n, half))?;
        Ok(Self {
            cos: angles.cos()?.to_device(device)?,
            sin: angles.sin()?.to_device(device)?,
        })
    }
}

struct Layer<'a> {
    config: &'a Qwen3Config,
    norms: [Tensor; 2],
    head_norms: [Tensor; 2],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl<'a> Layer<'a> {
    fn new(c: &'a Qwen3Config, vb: &VarBuilder) -> Result<Self> {
        let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let (d, m) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (
            c.num_attention_heads * c.head_dim,
            c.num_key_value_heads * c.head_dim,
        );
        Ok(Self {
            config: c,
            norms: [
                vb.get(d, "input_layernorm.weight")?,
                vb.get(d, "post_attention_layernorm.weight")?,
            ],
            head_norms: [
                attention.get(c.head_dim, "q_norm.weight")?,
                attention.get(c.head_dim, "k_norm.weight")?,
            ],
            q: attention.get((q, d), "q_proj.weight")?,
            k: attention.get((kv, d), "k_proj.weight")?,
            v: attention.get((kv, d), "v_proj.weight")?,
            o: attention.get((d, q), "o_proj.weight")?,
            gate: mlp.get((m, d), "gate_proj.weight")?,
            up: mlp.get((m, d), "up_proj.weight")?,
            down: mlp.get((d, m), "down_proj.weight")?,
        })
    }

    /// x (b, n, hidden) float32 → the same; products in the weights' format.
    fn forward(&self, x: &Tensor, rotary: &Rotary, mask: &Tensor) -> Result<Tensor> {
        let (dtype, eps) = (self.q.dtype(), self.config.rms_norm_eps);
        let y = rms_norm(x, &self.norms[0], eps)?.to_dtype(dtype)?;
        let y = linear(&self.attention(&y, rotary, mask)?, &self.o)?;
        let x = (x + y.to_dtype(DType::F32)?)?;
        let y = rms_norm(&x, &self.norms[1], eps)?.to_dtype(dtype)?;
        let gate = self.config.hidden_act.forward(&linear(&y, &self.gate)?)?;
        // float16 overflows here, as in T5
        let wide = if dtype == DType::F16 {
            DType::F32
        } else {
            dtype
        };
        let hidden = (gate.to_dtype(wide)? * linear(&y, &self.up)?.to_dtype(wide)?)?;
        x + linear(&hidden, &self.down.to_dtype(wide)?)?.to_dtype(DType::F32)?
    }

    /// y (b, n, hidden) → (b, n, heads · head size) in the weights' format; scores in float32.
    fn attention(&self, y: &Tensor, rotary: &Rotary, mask: &Tensor) -> Result<Tensor> {
        let (c, dtype) = (self.config, self.q.dtype());
        let (b, n, _) = y.dims3()?;
        // (b, heads, n, head size)
        let split = |weight: &Tensor, heads: usize| -> Result<Tensor> {
            linear(y, weight)?
                .reshape((b, n, heads, c.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let rotated = |weight: &Tensor, heads: usize, norm: &Tensor| -> Result<Tensor> {
            let x = split(weight, heads)?.to_dtype(DType::F32)?;
            rope(
                &rms_norm(&x, norm, c.rms_norm_eps)?,
                &rotary.cos,
                &rotary.sin,
            )
        };
        let (heads, groups) = (c.num_attention_heads, c.num_key_value_heads);
        // heads in a row share keys and values
        let shared = |x: Tensor| -> Result<Tensor> {
            let each = heads / groups;
            x.unsqueeze(2)?
                .broadcast_as((b, groups, each, n, c.head_dim))?
                .reshape((b, heads, n, c.head_dim))
        };
        let q = (rotated(&self.q, heads, &self.head_norms[0])? * (c.head_dim as f64).powf(-0.5))?;
        let k = shared(rotated(&self.k, groups, &self.head_norms[1])?)?;
        let scores = q.matmul(&k.t()?)?.broadcast_add(mask)?;
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(dtype)?;
        weights
            .matmul(&shared(split(&self.v, groups)?)?)?
            .transpose(1, 2)?
            .reshape((b, n, heads * c.head_dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_what_stands_before_it_and_no_padding() -> Result<()> {
        let prompt = |real: Range<usize>| Prompt {
            ids: vec![0; 4],
            real,
        };
        let sees = |real: Range<usize>| -> Result<Vec<String>> {
            let mask = masks(&[prompt(real)], 4, &Device::Cpu)?.reshape((4, 4))?;
            let rows = mask.to_vec2::<f32>()?.into_iter();
            let text = |row: Vec<f32>| {
                row.iter()
                    .map(|v| if *v < 0.0 { '.' } else { 'x' })
                    .collect()
            };
            Ok(rows.map(text).collect())
        };
        assert_eq!(sees(0..4)?, ["x...", "xx..", "xxx.", "xxxx"]);
        assert_eq!(sees(0..2)?, ["x...", "xx..", "xx..", "xx.."]);
        assert_eq!(sees(2..4)?, ["x...", ".x..", "..x.", "..xx"]);
        Ok(())
    }
}
