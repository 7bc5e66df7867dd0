//! Prompt → token ids, exactly as transformers' `CLIPTokenizer`, `T5Tokenizer` and `Qwen2Tokenizer` give them to diffusers. No models here.

use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{PostProcessor as _, Tokenizer};

use added::AddedTokens;

mod added;
mod build;

/// The contents of a tokenizer's folder, as far as they are there.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenizerFiles<'a> {
    /// Class named by the pipeline's `model_index.json` (`T5TokenizerFast`); wins over `tokenizer_class` of the config.
    pub class: Option<&'a str>,
    /// `tokenizer.json`.
    pub tokenizer: Option<&'a [u8]>,
    /// `vocab.json`, read if there is no `tokenizer.json`.
    pub vocab: Option<&'a [u8]>,
    /// `merges.txt`, read if there is no `tokenizer.json`.
    pub merges: Option<&'a [u8]>,
    /// `tokenizer_config.json`.
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a [u8]>,
    /// Rows of the text encoder's embedding, if they are known: no tokenizer has more tokens.
    pub rows: Option<usize>,
}

/// Most tokens of a tokenizer whose embedding is not known.
const MAX_TOKENS: usize = 1 << 20;
/// Longest text after a tokenizer's own normalisation, in bytes.
const MAX_NORMALIZED: usize = 8 << 20;

/// The tokenizers of FLUX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Byte-level BPE with an end-of-word suffix, `<|startoftext|> … <|endoftext|>`.
    Clip,
    /// SentencePiece unigram, `… </s>`.
    T5,
    /// Byte-level BPE without start and end: Qwen3's chat template has both.
    Qwen2,
}

/// A tokenizer with its padding and truncation rules.
#[derive(Debug)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    pad_id: u32,
    pad_left: bool,
    truncate: TruncationDirection,
    max_length: Option<usize>,
    /// The file's own normalisation, if the tokenizer is taken as it stands.
    normalizer: Option<Value>,
}

impl PromptTokenizer {
    /// Builds the tokenizer that transformers would build from the same files.
    ///
    /// `CLIPTokenizer`, `T5Tokenizer` and `Qwen2Tokenizer` take only vocabulary, merges and character map from
    /// `tokenizer.json` and bring their own normalisation; any other class takes `tokenizer.json` as it stands.
    pub fn new(family: Family, files: &TokenizerFiles) -> Result<Self> {
        let parse = |bytes: Option<&[u8]>, name: &str| -> Result<Value> {
            bytes.map_or(Ok(Value::Null), |b| {
                serde_json::from_slice(b).with_context(|| format!("`{name}` is not valid JSON"))
            })
        };
        let config = parse(files.config, "tokenizer_config.json")?;
        let special_map = parse(files.special_tokens_map, "special_tokens_map.json")?;
        let json = parse(files.tokenizer, "tokenizer.json")?;

        let class = files.class.or_else(|| config["tokenizer_class"].as_str());
        let native = match class {
            Some(
                "CLIPTokenizer" | "CLIPTokenizerFast" | "T5Tokenizer" | "T5TokenizerFast"
                | "Qwen2Tokenizer" | "Qwen2TokenizerFast",
            )
            | None => true,
            Some(_) => json.is_null(),
        };
        let added = AddedTokens::collect(
            family,
            native,
            files.rows.unwrap_or(MAX_TOKENS),
            &config,
            &special_map,
            &json,
        )?;
        let mut tokenizer = match (native, family) {
            (true, Family::Clip) => {
                build::clip(&json, files, added.named("unk_token").unwrap_or_default())?
            }
            (true, Family::T5) => build::t5(&json)?,
            (true, Family::Qwen2) => build::qwen2(
                &json,
                files,
                config["add_prefix_space"] == Value::Bool(true),
            )?,
            (false, _) => build::verbatim(files)?,
        };
        tokenizer
            .add_tokens(added.tokens.iter().cloned())
            .map_err(|e| anyhow!("adding special tokens: {e}"))?;
        tokenizer
            .set_encode_special_tokens(config["split_special_tokens"].as_bool().unwrap_or(false));
        let id = |name: &str| -> Result<(String, u32)> {
            let content = added
                .named(name)
                .with_context(|| format!("tokenizer config names no `{name}`"))?;
            let id = tokenizer.token_to_id(&content).with_context(|| {
                format!("`{name}` `{content}` is not in the tokenizer's vocabulary")
            })?;
            Ok((content, id))
        };
        let processor = match family {
            _ if !native => None,
            Family::Qwen2 => None,
            Family::Clip => Some(build::clip_processor(id("eos_token")?, id("bos_token")?)),
            Family::T5 => Some(build::t5_processor(id("eos_token")?.1)?),
        };
        let pad_id = match id("pad_token") {
            Ok((_, id)) => id,
            Err(e) => json["padding"]["pad_id"]
                .as_u64()
                .map(|id| id as u32)
                .ok_or(e)?,
        };
        if processor.is_some() {
            tokenizer.with_post_processor(processor);
        }
        let side = |key: &str, section: &str| {
            let side = config[key]
                .as_str()
                .or_else(|| json[section]["direction"].as_str())
                .unwrap_or("right");
            side.eq_ignore_ascii_case("left")
        };
        let (pad_left, cut_left) = (
            side("padding_side", "padding"),
            side("truncation_side", "truncation"),
        );
        // transformers writes 1e30 if a tokenizer has no limit
        let max_length = config["model_max_length"].as_u64().map(|n| n as usize);
        tokenizer
            .with_truncation(None)
            .map_err(|e| anyhow!("tokenizer: {e}"))?
            .with_padding(None);
        let truncate = if cut_left {
            TruncationDirection::Left
        } else {
            TruncationDirection::Right
        };
        Ok(Self {
            tokenizer,
            pad_id,
            pad_left,
            truncate,
            max_length,
            normalizer: (!native).then(|| json["normalizer"].clone()),
        })
    }

    /// `model_max_length` of the tokenizer's config; `None` if it has no limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// Token ids of a prompt, cut and padded to exactly `max_length` of them, with the tokenizer's start and end tokens.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        Ok(self.encode_padded(prompt, max_length)?.0)
    }

    /// The same, and which of the ids are not padding.
    pub fn encode_padded(
        &self,
        prompt: &str,
        max_length: usize,
    ) -> Result<(Vec<u32>, Range<usize>)> {
        let added = self
            .tokenizer
            .get_post_processor()
            .map_or(0, |p| p.added_tokens(false));
        ensure!(
            max_length >= added.max(1),
            "a text length of {max_length} leaves no room for the tokenizer's {added} special tokens"
        );
        self.check_growth(prompt)?;
        let mut encoding = self
            .tokenizer
            .encode_fast(prompt, false)
            .map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))?;
        encoding.truncate(max_length - added, 0, self.truncate);
        let encoding = self
            .tokenizer
            .post_process(encoding, None, true)
            .map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))?;
        let mut ids = encoding.get_ids().to_vec();
        let (real, missing) = (ids.len(), max_length.saturating_sub(ids.len()));
        let padding = std::iter::repeat_n(self.pad_id, missing);
        if self.pad_left {
            ids = padding.chain(ids).collect();
            return Ok((ids, missing..missing + real));
        }
        ids.extend(padding);
        Ok((ids, 0..real))
    }

    /// Fails before a normaliser of the file multiplies a prompt until memory is full.
    fn check_growth(&self, prompt: &str) -> Result<()> {
        let Some(normalizer) = &self.normalizer else {
            return Ok(());
        };
        ensure!(
            build::normalized_length(normalizer, prompt.len()) <= MAX_NORMALIZED,
            "`tokenizer.json`: its normalizer could make more than {} MB of a prompt of {} bytes",
            MAX_NORMALIZED >> 20,
            prompt.len()
        );
        Ok(())
    }

    /// Number of ids the whole prompt takes, before cutting and padding; tells whether [`Self::encode`] cuts it.
    pub fn token_count(&self, prompt: &str) -> Result<usize> {
        self.check_growth(prompt)?;
        let encoding = self
            .tokenizer
            .encode_fast(prompt, true)
            .map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))?;
        Ok(encoding.get_ids().len())
    }
}

#[cfg(test)]
mod tests;
