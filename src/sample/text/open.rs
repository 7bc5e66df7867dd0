//! Where text encoders and tokenizers are, and what sizes they have: diffusers folders, or single files as ComfyUI keeps them.
//! `mod.rs` computes with them.

use anyhow::{Context as _, Result, bail, ensure};
use candle::{DType, Device};

use super::clip::{Clip, ClipConfig};
use super::ops::Activation;
use super::t5::T5;
use super::t5_config::{FeedForward, T5Config};
use super::{ClipText, flux1::ClipAndT5};
use crate::checkpoint::{
    Checkpoint,
    lora::{Lora, TextEncoder},
    with_hint,
};
use crate::files::{Blob, Files};
use crate::sample::tokenize::{Family, PromptTokenizer, TokenizerFiles};

/// FLUX.1's own tokenizers, for text encoders that come without.
const FLUX1_CLIP: TokenizerFiles = TokenizerFiles {
    class: None,
    tokenizer: None,
    vocab: Some(include_bytes!(
        "../../../configs/flux1/tokenizer/vocab.json"
    )),
    merges: Some(include_bytes!(
        "../../../configs/flux1/tokenizer/merges.txt"
    )),
    config: Some(include_bytes!(
        "../../../configs/flux1/tokenizer/tokenizer_config.json"
    )),
    special_tokens_map: Some(include_bytes!(
        "../../../configs/flux1/tokenizer/special_tokens_map.json"
    )),
};
const FLUX1_T5: TokenizerFiles = TokenizerFiles {
    class: None,
    tokenizer: Some(include_bytes!(
        "../../../configs/flux1/tokenizer_2/tokenizer.json"
    )),
    vocab: None,
    merges: None,
    config: Some(include_bytes!(
        "../../../configs/flux1/tokenizer_2/tokenizer_config.json"
    )),
    special_tokens_map: Some(include_bytes!(
        "../../../configs/flux1/tokenizer_2/special_tokens_map.json"
    )),
};

/// What to do about a file that is damaged.
pub(super) const DAMAGED: &str = "fetch the file again, or name others with --text-encoders";

/// Rows of the embeddings that belong to FLUX.1's tokenizers.
const FLUX1_CLIP_ROWS: usize = 49408;
const FLUX1_T5_ROWS: usize = 32128;

impl ClipAndT5 {
    /// See [`super::TextEncoders::load`].
    pub(super) fn load(
        files: &Files,
        lora: &[Lora],
        length: Option<usize>,
        default_length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (mut clip, clip_config) = open(files, Family::Clip)?;
        let (mut t5, t5_config) = open(files, Family::T5)?;
        let clip_config = match clip_config {
            Some(blob) => with_hint(clip_from_json(&blob), DAMAGED)
                .with_context(|| describe(files, Family::Clip))?,
            None => infer_clip(&clip)?,
        };
        let t5_config = match t5_config {
            Some(blob) => with_hint(t5_from_json(&blob), DAMAGED)
                .with_context(|| describe(files, Family::T5))?,
            None => infer_t5(&t5)?,
        };
        check(&clip, &clip_config.tensors())?;
        check(&t5, &t5_config.tensors())?;
        for lora in lora {
            lora.apply_text(TextEncoder::Clip, &mut clip)?;
            lora.apply_text(TextEncoder::T5, &mut t5)?;
        }

        let t5_tokenizer = tokenizer(files, Family::T5, t5_config.vocab_size)?;
        let limit = t5_tokenizer.model_max_length().unwrap_or(usize::MAX);
        // half-precision products on the CPU are made of float32 ones
        let weights = if device.is_cpu() { DType::F32 } else { dtype };
        Ok(Self {
            clip_tokenizer: tokenizer(files, Family::Clip, clip_config.vocab_size)?,
            t5_tokenizer,
            clip: Clip::new(&clip_config, &clip.var_builder(weights, device))?,
            t5: T5::new(t5_config, t5.var_builder(weights, device)),
            names: [clip.name, t5.name],
            text_length: length.unwrap_or(default_length.min(limit)),
            dtype,
        })
    }
}

impl ClipText {
    /// From the files of a whole CLIP: `config` is the text model's part of its config, `checkpoint` holds all its
    /// tensors. Computes in f32.
    ///
    /// # Errors
    /// When the tokenizer is missing or damaged, or a tensor has another shape than the config says.
    pub(crate) fn open(
        files: &Files,
        config: &serde_json::Value,
        checkpoint: &Checkpoint,
        device: &Device,
    ) -> Result<Self> {
        let mut json = clip_defaults();
        if let (Some(all), Some(said)) = (json.as_object_mut(), config.as_object()) {
            all.extend(said.clone());
        }
        let config: ClipConfig =
            serde_json::from_value(json).with_context(|| files.describe("config.json"))?;
        (config.check()).with_context(|| format!("`{}`", files.describe("config.json")))?;
        let text = checkpoint.rename(|name| Some(name.strip_prefix("text_model.")?.to_owned()))?;
        check(&text, &config.tensors())?;
        Ok(Self {
            tokenizer: tokenizer_in(files, None, Family::Clip, config.vocab_size)?,
            clip: Clip::new(&config, &text.var_builder(DType::F32, device))?,
        })
    }
}

/// What transformers' `CLIPTextConfig` has if a config says nothing.
fn clip_defaults() -> serde_json::Value {
    serde_json::json!({
        "vocab_size": FLUX1_CLIP_ROWS,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    })
}

/// What a text encoder is called in a pipeline, in a single file's name, and by which tensor it is known.
fn names(family: Family) -> (&'static str, &'static str, &'static str) {
    match family {
        Family::Clip => ("text_encoder", "clip", "embeddings.token_embedding.weight"),
        Family::T5 => (
            "text_encoder_2",
            "t5",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
        ),
        Family::Qwen2 => ("text_encoder", "qwen", "layers.0.self_attn.q_norm.weight"),
    }
}

pub(super) fn describe(files: &Files, family: Family) -> String {
    format!("`{}`", files.sub(names(family).0).describe("config.json"))
}

/// The weights under the names that the encoders read, and their config where there is one.
pub(super) fn open(files: &Files, family: Family) -> Result<(Checkpoint, Option<Blob>)> {
    let (folder, word, known) = names(family);
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
            "`{}` is no {family:?} text encoder: there is no tensor `…{known}`",
            raw.name
        )
    })?;
    ensure!(
        !raw.contains(&format!("{prefix}scaled_fp8")) && !raw.contains("scaled_fp8"),
        "`{}` holds scaled 8-bit weights, which are not supported\nhint: use the 16-bit file",
        raw.name
    );
    let shared = raw.contains(&format!("{prefix}shared.weight"));
    let renamed = raw.rename(|name| match name.strip_prefix(&prefix)? {
        // the same table under two names
        "encoder.embed_tokens.weight" => (!shared).then(|| "shared.weight".to_owned()),
        name => Some(name.to_owned()),
    })?;
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

/// Every tensor is there with the shape that the config says.
pub(super) fn check(checkpoint: &Checkpoint, tensors: &[(String, Vec<usize>)]) -> Result<()> {
    for (name, shape) in tensors {
        let found = checkpoint.expect_floats(name)?.shape();
        ensure!(
            found == shape,
            "`{}`: tensor `{name}` has shape {found:?}, but its config says {shape:?}",
            checkpoint.name
        );
    }
    Ok(())
}

fn clip_from_json(bytes: &[u8]) -> Result<ClipConfig> {
    let mut json: serde_json::Value = serde_json::from_slice(bytes)?;
    // the config of a whole CLIP has the text model's inside
    if let Some(text) = json.get_mut("text_config") {
        json = text.take();
    }
    let config: ClipConfig = serde_json::from_value(json)?;
    config.check()?;
    Ok(config)
}

fn t5_from_json(bytes: &[u8]) -> Result<T5Config> {
    let config: T5Config = serde_json::from_slice(bytes)?;
    config.check()?;
    Ok(config)
}

/// Layers 0, 1, 2, … for which `name` gives a tensor.
pub(super) fn count(checkpoint: &Checkpoint, name: impl Fn(usize) -> String) -> usize {
    let mut layers = 0usize;
    while checkpoint.contains(&name(layers)) {
        layers += 1;
    }
    layers
}

/// Sizes of a CLIP text model by its tensors; heads of 64 as in every CLIP.
fn infer_clip(checkpoint: &Checkpoint) -> Result<ClipConfig> {
    let [vocab_size, hidden_size] = checkpoint.dims("embeddings.token_embedding.weight")?;
    let [max_position_embeddings, _] = checkpoint.dims("embeddings.position_embedding.weight")?;
    let [intermediate_size, _] = checkpoint.dims("encoder.layers.0.mlp.fc1.weight")?;
    ensure!(
        vocab_size == FLUX1_CLIP_ROWS && hidden_size % 64 == 0,
        "`{}` is not the CLIP-L of FLUX.1 ({vocab_size} tokens, width {hidden_size}) and has no config.json",
        checkpoint.name
    );
    Ok(ClipConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers: count(checkpoint, |i| format!("encoder.layers.{i}.mlp.fc1.weight")),
        num_attention_heads: hidden_size / 64,
        max_position_embeddings,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
        eos_token_id: 49407,
    })
}

/// Sizes of a T5 v1.1 encoder by its tensors.
fn infer_t5(checkpoint: &Checkpoint) -> Result<T5Config> {
    let [vocab_size, d_model] = checkpoint.dims("shared.weight")?;
    let [buckets, num_heads] =
        checkpoint.dims("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")?;
    let [inner, _] = checkpoint.dims("encoder.block.0.layer.0.SelfAttention.q.weight")?;
    let [_, d_ff] = checkpoint.dims("encoder.block.0.layer.1.DenseReluDense.wo.weight")?;
    ensure!(
        num_heads > 0 && inner % num_heads == 0,
        "`{}`: {num_heads} heads do not divide {inner}",
        checkpoint.name
    );
    ensure!(
        checkpoint.contains("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        "`{}` is not the T5 v1.1 of FLUX.1 (its feed-forward layers are not gated) and has no config.json",
        checkpoint.name
    );
    Ok(T5Config {
        vocab_size,
        d_model,
        d_kv: inner / num_heads,
        d_ff,
        num_layers: count(checkpoint, |i| {
            format!("encoder.block.{i}.layer.0.SelfAttention.q.weight")
        }),
        num_heads,
        relative_attention_num_buckets: buckets,
        relative_attention_max_distance: 128,
        layer_norm_epsilon: 1e-6,
        feed_forward_proj: FeedForward {
            gated: true,
            act: Activation::GeluNew,
        },
    })
}

/// Number of tokens that T5's tokenizer makes of `prompt`.
pub(super) fn t5_token_count(files: &Files, prompt: &str) -> Result<usize> {
    tokenizer(files, Family::T5, FLUX1_T5_ROWS)?.token_count(prompt)
}

/// The tokenizer in the pipeline's folder, or FLUX.1's if there is none and the embedding has FLUX.1's size.
fn tokenizer(files: &Files, family: Family, rows: usize) -> Result<PromptTokenizer> {
    let folder = match family {
        Family::T5 => "tokenizer_2",
        Family::Clip | Family::Qwen2 => "tokenizer",
    };
    let index = files.json("model_index.json")?;
    let class = index.as_ref().and_then(|index| index[folder][1].as_str());
    tokenizer_in(&files.sub(folder), class, family, rows)
}

/// The tokenizer in the folder `sub`, of the transformers class `class` where something says so.
pub(super) fn tokenizer_in(
    sub: &Files,
    class: Option<&str>,
    family: Family,
    rows: usize,
) -> Result<PromptTokenizer> {
    let (flux1, flux1_rows) = match family {
        Family::Clip => (FLUX1_CLIP, FLUX1_CLIP_ROWS),
        Family::T5 => (FLUX1_T5, FLUX1_T5_ROWS),
        // 11 MB that every download of the text encoder brings along
        Family::Qwen2 => (TokenizerFiles::default(), usize::MAX),
    };
    let (json, vocab, merges) = (
        sub.get("tokenizer.json")?,
        sub.get("vocab.json")?,
        sub.get("merges.txt")?,
    );
    if json.is_none() && vocab.is_none() {
        ensure!(
            family != Family::Qwen2,
            "`{}` does not exist\nhint: name a folder with Qwen3 and its tokenizer (`text_encoder` and `tokenizer`) with --text-encoders",
            sub.describe("tokenizer.json")
        );
        ensure!(
            rows == flux1_rows,
            "`{}` does not exist, and FLUX.1's own tokenizer does not fit {rows} tokens",
            sub.describe("tokenizer.json")
        );
        return PromptTokenizer::new(family, &flux1).context("FLUX.1's own tokenizer");
    }
    let (config, map) = (
        sub.get("tokenizer_config.json")?,
        sub.get("special_tokens_map.json")?,
    );
    let tokenizer = TokenizerFiles {
        class,
        tokenizer: json.as_deref(),
        vocab: vocab.as_deref(),
        merges: merges.as_deref(),
        config: config.as_deref(),
        special_tokens_map: map.as_deref(),
    };
    PromptTokenizer::new(family, &tokenizer)
        .with_context(|| format!("tokenizer in `{}`", sub.model_ref()))
}
