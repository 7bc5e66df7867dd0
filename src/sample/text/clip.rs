//! CLIP's text model, as far as its pooled output. `sample::tokenize` makes the tokens.
//!
//! candle-transformers has one too, but with fixed activations and epsilon and without the rule for the pooled token.
//! Source: transformers `models/clip/modeling_clip.py` (`CLIPTextModel`).

use candle::{Device, Module as _, Result, Tensor, bail};
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder};
use serde::Deserialize;

pub(crate) use super::ops::Activation;
use super::ops::{attention, check_sizes, id_tensor};

/// `text_encoder/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct ClipConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "quick_gelu")]
    pub hidden_act: Activation,
    #[serde(default = "epsilon")]
    pub layer_norm_eps: f64,
    #[serde(default = "end_of_text")]
    pub eos_token_id: u32,
}

fn quick_gelu() -> Activation {
    Activation::QuickGelu
}

fn epsilon() -> f64 {
    1e-5
}

fn end_of_text() -> u32 {
    49407
}

impl ClipConfig {
    /// Fails at a size that no CLIP has.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        check_sizes(
            ("num_hidden_layers", self.num_hidden_layers),
            &[
                ("vocab_size", self.vocab_size),
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_attention_heads", self.num_attention_heads),
                ("max_position_embeddings", self.max_position_embeddings),
            ],
        )
    }

    /// Names and shapes of the tensors that [`Clip`] reads.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, m) = (self.hidden_size, self.intermediate_size);
        let mut tensors = vec![
            (
                "embeddings.token_embedding.weight".to_owned(),
                vec![self.vocab_size, d],
            ),
            (
                "embeddings.position_embedding.weight".to_owned(),
                vec![self.max_position_embeddings, d],
            ),
        ];
        let mut layer = |name: String, output: usize, input: Option<usize>| {
            tensors.push((
                format!("{name}.weight"),
                std::iter::once(output).chain(input).collect(),
            ));
            tensors.push((format!("{name}.bias"), vec![output]));
        };
        for i in 0..self.num_hidden_layers {
            for name in ["layer_norm1", "layer_norm2"] {
                layer(format!("encoder.layers.{i}.{name}"), d, None);
            }
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                layer(format!("encoder.layers.{i}.self_attn.{name}"), d, Some(d));
            }
            layer(format!("encoder.layers.{i}.mlp.fc1"), m, Some(d));
            layer(format!("encoder.layers.{i}.mlp.fc2"), d, Some(m));
        }
        layer("final_layer_norm".to_owned(), d, None);
        tensors
    }
}

/// CLIP's text model.
#[derive(Debug)]
pub(super) struct Clip {
    tokens: Embedding,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
    eos: u32,
    device: Device,
}

impl Clip {
    /// Reads the weights; `vb` holds names as transformers 5 writes them (`embeddings.…`, `encoder.…`).
    pub(super) fn new(config: &ClipConfig, vb: &VarBuilder) -> Result<Self> {
        let d = config.hidden_size;
        let embeddings = vb.pp("embeddings");
        let tokens = embeddings.get((config.vocab_size, d), "token_embedding.weight")?;
        let layers = vb.pp("encoder.layers");
        let layer = LayerConfig {
            hidden: d,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            act: config.hidden_act,
            eps: config.layer_norm_eps,
        };
        Ok(Self {
            tokens: Embedding::new(tokens, d),
            positions: embeddings.get(
                (config.max_position_embeddings, d),
                "position_embedding.weight",
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&layer, &layers.pp(i)))
                .collect::<Result<_>>()?,
            norm: candle_nn::layer_norm(d, config.layer_norm_eps, vb.pp("final_layer_norm"))?,
            eos: config.eos_token_id,
            device: vb.device().clone(),
        })
    }

    /// Longest prompt in tokens.
    pub(super) fn max_length(&self) -> usize {
        self.positions.dims()[0]
    }

    /// Width of the pooled output.
    pub(super) fn width(&self) -> usize {
        self.positions.dims()[1]
    }

    /// Token ids, all rows of one length → the hidden state at the end-of-text token (b, hidden).
    pub(super) fn pooled(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let tokens = id_tensor(ids, self.tokens.embeddings().dim(0)?, &self.device)?;
        let (b, n) = tokens.dims2()?;
        if n > self.max_length() {
            bail!(
                "CLIP: {n} tokens are more than the {} positions it has",
                self.max_length()
            )
        }
        let mut x = self
            .tokens
            .forward(&tokens)?
            .broadcast_add(&self.positions.narrow(0, 0, n)?)?;
        let mask = causal_mask(n, &self.device)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        let rows: Vec<u32> = ids
            .iter()
            .zip(0u32..)
            .map(|(ids, row)| row * n as u32 + pooled_position(ids, self.eos) as u32)
            .collect();
        let rows = Tensor::from_vec(rows, b, &self.device)?;
        self.norm.forward(&x.flatten(0, 1)?.index_select(&rows, 0)?)
    }
}

/// Where the pooled output is taken from.
fn pooled_position(ids: &[u32], eos: u32) -> usize {
    let first = |wanted: u32| ids.iter().position(|id| *id == wanted).unwrap_or(0);
    // configs from before transformers #24773 say 2; the end-of-text token then is the highest id
    if eos == 2 {
        ids.iter().max().map_or(0, |highest| first(*highest))
    } else {
        first(eos)
    }
}

/// (1, 1, n, n), minus infinity above the diagonal.
fn causal_mask(n: usize, device: &Device) -> Result<Tensor> {
    let values =
        (0..n).flat_map(|i| (0..n).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }));
    Tensor::from_iter(values, device)?.reshape((1, 1, n, n))
}

/// Sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerConfig {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) heads: usize,
    pub(crate) act: Activation,
    pub(crate) eps: f64,
}

/// One layer of CLIP's text or vision model.
#[derive(Debug)]
pub(crate) struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    act: Activation,
    heads: usize,
}

impl Layer {
    pub(crate) fn new(config: &LayerConfig, vb: &VarBuilder) -> Result<Self> {
        let (d, m, eps) = (config.hidden, config.intermediate, config.eps);
        if config.heads == 0 || !d.is_multiple_of(config.heads) {
            bail!(
                "CLIP: {} attention heads do not divide `hidden_size` {d}",
                config.heads
            )
        }
        let attention = vb.pp("self_attn");
        Ok(Self {
            norm1: candle_nn::layer_norm(d, eps, vb.pp("layer_norm1"))?,
            q: candle_nn::linear(d, d, attention.pp("q_proj"))?,
            k: candle_nn::linear(d, d, attention.pp("k_proj"))?,
            v: candle_nn::linear(d, d, attention.pp("v_proj"))?,
            out: candle_nn::linear(d, d, attention.pp("out_proj"))?,
            norm2: candle_nn::layer_norm(d, eps, vb.pp("layer_norm2"))?,
            fc1: candle_nn::linear(d, m, vb.pp("mlp.fc1"))?,
            fc2: candle_nn::linear(m, d, vb.pp("mlp.fc2"))?,
            act: config.act,
            heads: config.heads,
        })
    }

    /// x (b, n, hidden) → the same; `mask` (1, 1, 1 or n, 1 or n) is added to the scores.
    pub(crate) fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let y = self.norm1.forward(x)?;
        let (q, k, v) = (
            self.q.forward(&y)?,
            self.k.forward(&y)?,
            self.v.forward(&y)?,
        );
        let scale = ((q.dim(2)? / self.heads) as f64).powf(-0.5);
        let x = (x + self
            .out
            .forward(&attention(&q, &k, &v, self.heads, scale, mask)?)?)?;
        let y = self
            .act
            .forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        x + self.fc2.forward(&y)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pooled_token_is_the_first_end_of_text() {
        assert_eq!(pooled_position(&[7, 3, 9, 5, 5, 5], 5), 3);
        assert_eq!(
            pooled_position(&[7, 3, 9, 5, 9], 2),
            2,
            "configs that say 2 mean the highest id"
        );
        assert_eq!(
            pooled_position(&[7, 3], 5),
            0,
            "as torch's argmax of nothing but zeros"
        );
    }

    #[test]
    fn sizes_that_no_encoder_has_are_refused_by_name() {
        let good = serde_json::json!({
            "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 4,
        });
        let check = |json| serde_json::from_value::<ClipConfig>(json).unwrap().check();
        check(good.clone()).unwrap();
        for (key, bad) in [
            ("num_hidden_layers", 1u64 << 31),
            ("num_hidden_layers", 0),
            ("hidden_size", 1 << 63),
            ("num_attention_heads", 0),
        ] {
            let mut json = good.clone();
            json[key] = bad.into();
            let error = check(json).unwrap_err().to_string();
            assert!(
                error.contains(key) && error.contains(&bad.to_string()),
                "{error}"
            );
        }
    }

    #[test]
    fn a_config_without_a_size_names_it() {
        let error = serde_json::from_str::<ClipConfig>(r#"{"vocab_size": 9, "hidden_size": 8}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("intermediate_size"), "{error}");
    }
}
