//! Where Qwen3 and its tokenizer are, and what sizes it has. `flux2.rs` computes with it.

use anyhow::{Context as _, Result, ensure};
use candle::{DType, Device};

use super::{
    files::{OTHERS, TextFiles},
    flux2::Qwen3Text,
    open::{check, count, tokenizer_in},
    qwen3::Qwen3,
    qwen3_config::{Qwen3Config, STATES},
};
use crate::{
    checkpoint::{Checkpoint, with_hint},
    files::Files,
    sample::tokenize::{Family, PromptTokenizer},
};

/// The encoder as its headers and small files describe it; no weight is read.
struct Opened {
    qwen: Checkpoint,
    config: Qwen3Config,
    tokenizer: PromptTokenizer,
}

/// Opens and checks the encoder; `width` is that of the text that the transformer takes.
fn open(files: &TextFiles, width: Option<usize>) -> Result<Opened> {
    let hidden = width.map(|width| width / STATES.len());
    let encoder = files.encoder(Family::Qwen2, hidden)?;
    let qwen = encoder.weights;
    let config = match &encoder.config {
        Some((name, blob)) => {
            with_hint(qwen3_from_json(blob), OTHERS).with_context(|| format!("`{name}`"))?
        }
        None => infer_qwen3(&qwen)?,
    };
    check(&qwen, &config.tensors())?;
    let found = STATES.len() * config.hidden_size;
    if let Some(width) = width {
        ensure!(
            found == width,
            "the Qwen3 text encoder `{}` gives {found} numbers a token, but the transformer takes {width}\nhint: name the model's own text encoder with --text-encoders",
            qwen.name
        );
    }
    Ok(Opened {
        tokenizer: qwen2_tokenizer(files.folder()?)?,
        qwen,
        config,
    })
}

/// See [`super::TextEncoders::check`].
pub(super) fn check_qwen3(files: &TextFiles, width: usize) -> Result<()> {
    open(files, Some(width)).map(drop)
}

impl Qwen3Text {
    /// See [`super::TextEncoders::load`].
    pub(super) fn load(
        files: &TextFiles,
        width: Option<usize>,
        length: Option<usize>,
        default_length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let opened = open(files, width)?;
        let limit = opened.tokenizer.model_max_length().unwrap_or(usize::MAX);
        let weights = if device.is_cpu() { DType::F32 } else { dtype };
        Ok(Self {
            tokenizer: opened.tokenizer,
            qwen: Qwen3::new(opened.config, opened.qwen.var_builder(weights, device)),
            name: opened.qwen.name,
            text_length: length.unwrap_or(default_length.min(limit)),
            dtype,
        })
    }
}

fn qwen3_from_json(bytes: &[u8]) -> Result<Qwen3Config> {
    let json: serde_json::Value = serde_json::from_slice(bytes)?;
    let kind = json["model_type"].as_str().unwrap_or("qwen3");
    ensure!(
        kind == "qwen3",
        "is the config of a `{kind}`, not of a Qwen3{}",
        if kind.starts_with("mistral") {
            ": FLUX.2-dev's text encoder is not built"
        } else {
            ""
        }
    );
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
    with_hint(config.check(), OTHERS).with_context(|| format!("`{}`", checkpoint.name))?;
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
