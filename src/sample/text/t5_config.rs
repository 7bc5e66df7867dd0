//! T5's sizes and the tensors that go with them. `t5.rs` computes.

use serde::{Deserialize, Deserializer, de::Error as _};

use super::ops::{Activation, check_sizes};

/// `text_encoder_2/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(super) struct T5Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    #[serde(default = "buckets")]
    pub relative_attention_num_buckets: usize,
    #[serde(default = "max_distance")]
    pub relative_attention_max_distance: usize,
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    #[serde(default)]
    pub feed_forward_proj: FeedForward,
}

fn buckets() -> usize {
    32
}

fn max_distance() -> usize {
    128
}

fn epsilon() -> f64 {
    1e-6
}

/// `gated-gelu`, `gated-silu`, `relu`, …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FeedForward {
    pub gated: bool,
    pub act: Activation,
}

impl Default for FeedForward {
    fn default() -> Self {
        Self {
            gated: false,
            act: Activation::Relu,
        }
    }
}

impl<'de> Deserialize<'de> for FeedForward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (gated, name) = text
            .strip_prefix("gated-")
            .map_or((false, text.as_str()), |name| (true, name));
        // transformers reads `gated-gelu`, and nothing else, as the approximation with tanh
        let name = if gated && name == "gelu" {
            "gelu_new"
        } else {
            name
        };
        let act = serde_json::from_value(name.into()).map_err(|_| {
            D::Error::custom(format!("`feed_forward_proj` `{text}` is not supported"))
        })?;
        Ok(Self { gated, act })
    }
}

impl T5Config {
    /// Fails at a size that no T5 has.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        check_sizes(
            ("num_layers", self.num_layers),
            &[
                ("vocab_size", self.vocab_size),
                ("d_model", self.d_model),
                ("d_kv", self.d_kv),
                ("d_ff", self.d_ff),
                ("num_heads", self.num_heads),
                (
                    "relative_attention_num_buckets",
                    self.relative_attention_num_buckets,
                ),
                (
                    "relative_attention_max_distance",
                    self.relative_attention_max_distance,
                ),
            ],
        )
    }

    /// Names and shapes of the tensors that the encoder reads.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, inner) = (self.d_model, self.num_heads * self.d_kv);
        let mut tensors = vec![
            ("shared.weight".to_owned(), vec![self.vocab_size, d]),
            (
                format!("encoder.block.0.{BIAS}"),
                vec![self.relative_attention_num_buckets, self.num_heads],
            ),
            ("encoder.final_layer_norm.weight".to_owned(), vec![d]),
        ];
        for i in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((
                    format!("encoder.block.{i}.layer.{name}.weight"),
                    shape.to_vec(),
                ));
            };
            for name in ["q", "k", "v"] {
                add(&format!("0.SelfAttention.{name}"), &[inner, d]);
            }
            add("0.SelfAttention.o", &[d, inner]);
            add("0.layer_norm", &[d]);
            add("1.layer_norm", &[d]);
            let inputs: &[&str] = if self.feed_forward_proj.gated {
                &["wi_0", "wi_1"]
            } else {
                &["wi"]
            };
            for name in inputs {
                add(&format!("1.DenseReluDense.{name}"), &[self.d_ff, d]);
            }
            add("1.DenseReluDense.wo", &[d, self.d_ff]);
        }
        tensors
    }
}

/// The table of position biases in the first block, which all blocks share.
pub(super) const BIAS: &str = "layer.0.SelfAttention.relative_attention_bias.weight";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feed_forward_names_mean_what_they_mean_in_transformers() {
        let parse = |text: &str| serde_json::from_value::<FeedForward>(text.into());
        assert_eq!(
            parse("relu").unwrap(),
            FeedForward {
                gated: false,
                act: Activation::Relu
            }
        );
        assert_eq!(
            parse("gelu").unwrap(),
            FeedForward {
                gated: false,
                act: Activation::Gelu
            }
        );
        assert_eq!(
            parse("gated-gelu").unwrap(),
            FeedForward {
                gated: true,
                act: Activation::GeluNew
            }
        );
        assert_eq!(
            parse("gated-silu").unwrap(),
            FeedForward {
                gated: true,
                act: Activation::Silu
            }
        );
        assert!(
            parse("gated-mish")
                .unwrap_err()
                .to_string()
                .contains("gated-mish")
        );
    }
}
