//! Where Qwen3 and its tokenizer are, and what sizes it has. `flux2.rs` computes with it.

use anyhow::{Context as _, Result, bail, ensure};
use candle::{DType, Device};

use super::{
    flux2::Qwen3Text,
    open::{check, count, tokenizer_in},
    qwen3::Qwen3,
    qwen3_config::Qwen3Config,
};
use crate::{
    checkpoint::{Checkpoint, with_hint},
    files::{Blob, Files},
    sample::tokenize::{Family, PromptTokenizer},
};

/// What to do about a file that is of no use.
const DAMAGED: &str = "name others with --text-encoders";

impl Qwen3Text {
    /// See [`super::TextEncoders::load`].
    pub(super) fn load(
        files: &Files,
        length: Option<usize>,
        default_length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (qwen, config) = open(files)?;
        let config = match config {
            Some(blob) => with_hint(qwen3_from_json(&blob), DAMAGED).with_context(|| {
                format!("`{}`", files.sub("text_encoder").describe("config.json"))
            })?,
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

/// The weights under the names that the encoders read, and their config where there is one.
fn open(files: &Files) -> Result<(Checkpoint, Option<Blob>)> {
    let (folder, word, known) = ("text_encoder", "qwen", "layers.0.self_attn.q_norm.weight");
    let sub = files.sub(folder);
    let (raw, config) = match with_hint(Checkpoint::open_if_present(&sub, "model"), DAMAGED)? {
        Some(raw) => (raw, sub.get("config.json")?),
        None => (single_file(files, word, folder)?, None),
    };
    let prefix = raw
        .names()
        .find_map(|name| name.strip_suffix(known))
        .map(str::to_owned);
    let prefix = prefix.with_context(|| {
        format!(
            "`{}` is no Qwen3 text encoder: there is no tensor `…{known}`",
            raw.name
        )
    })?;
    ensure!(
        !raw.contains(&format!("{prefix}scaled_fp8")) && !raw.contains("scaled_fp8"),
        "`{}` holds scaled 8-bit weights, which are not supported\nhint: use the 16-bit file",
        raw.name
    );
    let renamed = raw.rename(|name| Some(name.strip_prefix(&prefix)?.to_owned()))?;
    Ok((renamed, config))
}

/// The one file of the folder that is named after the encoder.
fn single_file(files: &Files, word: &str, folder: &str) -> Result<Checkpoint> {
    let named = |name: &String| {
        let lower = name.to_lowercase();
        lower.contains(word) && lower.ends_with(".safetensors") && !lower.contains("vision")
    };
    let found: Vec<String> = files.list()?.into_iter().filter(named).collect();
    match found.as_slice() {
        [one] => with_hint(
            Checkpoint::from_blob(&files.describe(one), &files.read(one)?),
            DAMAGED,
        ),
        [] => bail!(
            "`{}` holds no folder `{folder}` with a model.safetensors in it, and no `…{word}….safetensors`\nhint: fetch it, or name a folder with both text encoders with --text-encoders",
            files.model_ref()
        ),
        many => bail!(
            "`{}` holds several {word} text encoders ({}); leave one of them there",
            files.model_ref(),
            many.join(", ")
        ),
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
