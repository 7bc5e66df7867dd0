//! Where Qwen3 and its tokenizer are, and what sizes it has. `flux2.rs` computes with it.

use anyhow::{Context as _, Result};
use candle::{DType, Device};

use super::{
    flux2::Qwen3Text,
    open::{DAMAGED, check, count, describe, open, tokenizer_in},
    qwen3::Qwen3,
    qwen3_config::Qwen3Config,
};
use crate::{
    checkpoint::{Checkpoint, with_hint},
    files::Files,
    sample::tokenize::{Family, PromptTokenizer},
};

impl Qwen3Text {
    /// See [`super::TextEncoders::load`].
    pub(super) fn load(
        files: &Files,
        length: Option<usize>,
        default_length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (qwen, config) = open(files, Family::Qwen2)?;
        let config = match config {
            Some(blob) => with_hint(qwen3_from_json(&blob), DAMAGED)
                .with_context(|| describe(files, Family::Qwen2))?,
            None => infer_qwen3(&qwen)?,
        };
        check(&qwen, &config.tensors())?;
        let tokenizer = qwen2_tokenizer(files)?;
        let limit = tokenizer.model_max_length().unwrap_or(usize::MAX);
        let weights = if device.is_cpu() { DType::F32 } else { dtype };
        Ok(Self {
            tokenizer,
            qwen: Qwen3::new(config, qwen.var_builder(weights, device)),
            name: qwen.name,
            text_length: length.unwrap_or(default_length.min(limit)),
            dtype,
        })
    }
}

fn qwen3_from_json(bytes: &[u8]) -> Result<Qwen3Config> {
    let config: Qwen3Config = serde_json::from_slice(bytes)?;
    config.check()?;
    Ok(config)
}

/// Sizes of a Qwen3 by its tensors.
fn infer_qwen3(checkpoint: &Checkpoint) -> Result<Qwen3Config> {
    let [vocab_size, hidden_size] = checkpoint.dims("embed_tokens.weight")?;
    let [head_dim] = checkpoint.dims("layers.0.self_attn.q_norm.weight")?;
    let [q, _] = checkpoint.dims("layers.0.self_attn.q_proj.weight")?;
    let [kv, _] = checkpoint.dims("layers.0.self_attn.k_proj.weight")?;
    let [intermediate_size, _] = checkpoint.dims("layers.0.mlp.gate_proj.weight")?;
    let heads = |rows: usize| rows.checked_div(head_dim).unwrap_or(0);
    let config: Qwen3Config = serde_json::from_value(serde_json::json!({
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": count(checkpoint, |i| format!("layers.{i}.self_attn.q_norm.weight")),
        "num_attention_heads": heads(q),
        "num_key_value_heads": heads(kv),
        "head_dim": head_dim,
    }))?;
    with_hint(config.check(), DAMAGED).with_context(|| format!("`{}`", checkpoint.name))?;
    Ok(config)
}

/// Qwen3's tokenizer in a pipeline's folder, or in `files` itself.
pub(super) fn qwen2_tokenizer(files: &Files) -> Result<PromptTokenizer> {
    let sub = files.sub("tokenizer");
    let index = files.json("model_index.json")?;
    let class = index.as_ref();
    let class = class.and_then(|index| index["tokenizer"][1].as_str());
    if sub.list()?.is_empty() && files.has("tokenizer.json")? {
        return tokenizer_in(files, class, Family::Qwen2, 0);
    }
    tokenizer_in(&sub, class, Family::Qwen2, 0)
}
