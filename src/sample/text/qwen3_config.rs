//! Qwen3's sizes and the tensors that go with them. `qwen3.rs` computes.

use anyhow::ensure;
use serde::Deserialize;

use super::ops::{Activation, check_sizes};

/// The hidden states that the transformer is given, side by side: 0 would be the embeddings, 1 the output of the first
/// layer ([diffusers `Flux2KleinPipeline`][klein]).
///
/// [klein]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux2/pipeline_flux2_klein.py
pub(super) const STATES: [usize; 3] = [9, 18, 27];

/// `text_encoder/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct Qwen3Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    #[serde(default = "head_dim")]
    pub head_dim: usize,
    #[serde(default = "silu")]
    pub hidden_act: Activation,
    #[serde(default = "epsilon")]
    pub rms_norm_eps: f64,
    /// Where transformers 4 keeps the rotary base.
    pub rope_theta: Option<f64>,
    /// Where transformers 5 keeps it.
    pub rope_parameters: Option<RopeParameters>,
    pub rope_scaling: Option<RopeParameters>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub use_sliding_window: bool,
}

/// How positions are rotated.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct RopeParameters {
    pub rope_theta: Option<f64>,
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
}

fn head_dim() -> usize {
    128
}

fn silu() -> Activation {
    Activation::Silu
}

fn epsilon() -> f64 {
    1e-6
}

impl Qwen3Config {
    /// Fails at a size that no Qwen3 has, and at what is not computed here.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        check_sizes(
            ("num_hidden_layers", self.num_hidden_layers),
            &[
                ("vocab_size", self.vocab_size),
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_attention_heads", self.num_attention_heads),
                ("num_key_value_heads", self.num_key_value_heads),
                ("head_dim", self.head_dim),
            ],
        )?;
        let last = Self::LAYERS;
        ensure!(
            self.num_hidden_layers >= last,
            "`num_hidden_layers` is {}, but the hidden state {last} is needed",
            self.num_hidden_layers
        );
        ensure!(
            self.num_attention_heads
                .is_multiple_of(self.num_key_value_heads)
                && self.head_dim.is_multiple_of(2),
            "{} attention heads of {} do not go with {} heads of keys and values",
            self.num_attention_heads,
            self.head_dim,
            self.num_key_value_heads
        );
        let theta = self.theta();
        ensure!(
            theta.is_finite() && theta > 1.0,
            "`rope_theta` is {theta}, expected a number above 1"
        );
        let ropes = [&self.rope_parameters, &self.rope_scaling];
        let kinds = ropes
            .into_iter()
            .flatten()
            .filter_map(|r| r.rope_type.as_deref());
        for kind in kinds {
            ensure!(
                kind == "default",
                "rotary positions of the type `{kind}` are not supported"
            );
        }
        ensure!(
            !self.attention_bias && !self.use_sliding_window,
            "`attention_bias` and `use_sliding_window` are not supported"
        );
        Ok(())
    }

    /// Rotary base.
    pub(super) fn theta(&self) -> f64 {
        let parameters = self.rope_parameters.as_ref().and_then(|r| r.rope_theta);
        parameters.or(self.rope_theta).unwrap_or(1e6)
    }

    /// Layers that are needed: those up to the last hidden state.
    pub(super) const LAYERS: usize = STATES[STATES.len() - 1];

    /// Whether the last hidden state is the model's output, which is normalised.
    pub(super) fn ends_normed(&self) -> bool {
        self.num_hidden_layers == Self::LAYERS
    }

    /// Names and shapes of the tensors that are read.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, m) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        );
        let mut tensors = vec![("embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for i in 0..Self::LAYERS {
            for (name, shape) in [
                ("input_layernorm", vec![d]),
                ("self_attn.q_proj", vec![q, d]),
                ("self_attn.k_proj", vec![kv, d]),
                ("self_attn.v_proj", vec![kv, d]),
                ("self_attn.o_proj", vec![d, q]),
                ("self_attn.q_norm", vec![self.head_dim]),
                ("self_attn.k_norm", vec![self.head_dim]),
                ("post_attention_layernorm", vec![d]),
                ("mlp.gate_proj", vec![m, d]),
                ("mlp.up_proj", vec![m, d]),
                ("mlp.down_proj", vec![d, m]),
            ] {
                tensors.push((format!("layers.{i}.{name}.weight"), shape));
            }
        }
        if self.ends_normed() {
            tensors.push(("norm.weight".to_owned(), vec![d]));
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl Fn(&mut serde_json::Value)) -> anyhow::Result<Qwen3Config> {
        let mut json = serde_json::json!({
            "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 36,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5e5,
        });
        change(&mut json);
        let config: Qwen3Config = serde_json::from_value(json)?;
        config.check()?;
        Ok(config)
    }

    #[test]
    fn layers_above_the_last_state_are_not_read() {
        let all = config(|_| {}).unwrap();
        let names: Vec<String> = all.tensors().into_iter().map(|(name, _)| name).collect();
        assert!(names.iter().any(|n| n.starts_with("layers.26.")));
        assert!(!names.iter().any(|n| n.starts_with("layers.27.")));
        assert!(!names.contains(&"norm.weight".to_owned()));
        let short = config(|json| json["num_hidden_layers"] = 27.into()).unwrap();
        assert_eq!(short.tensors().len(), all.tensors().len() + 1);
    }

    #[test]
    fn the_base_is_found_where_either_version_keeps_it() {
        assert_eq!(config(|_| {}).unwrap().theta().to_bits(), 5e5f64.to_bits());
        let new = |json: &mut serde_json::Value| {
            json["rope_parameters"] =
                serde_json::json!({ "rope_theta": 1e4, "rope_type": "default" });
        };
        assert_eq!(config(new).unwrap().theta().to_bits(), 1e4f64.to_bits());
    }

    #[test]
    fn what_is_not_computed_here_is_refused_by_name() {
        for (key, bad) in [
            ("num_hidden_layers", serde_json::json!(26)),
            ("num_key_value_heads", serde_json::json!(3)),
            ("hidden_size", serde_json::json!(0)),
            ("rope_theta", serde_json::json!(0.5)),
            ("attention_bias", serde_json::json!(true)),
            ("rope_scaling", serde_json::json!({ "type": "yarn" })),
        ] {
            let error = config(|json| json[key] = bad.clone()).unwrap_err();
            let error = format!("{error:#}");
            let named = match key {
                "rope_scaling" => "yarn",
                "num_key_value_heads" => "keys and values",
                key => key,
            };
            assert!(error.contains(named), "{error}");
        }
    }
}
