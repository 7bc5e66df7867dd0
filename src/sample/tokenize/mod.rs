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
}

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
        let added = AddedTokens::collect(family, native, &config, &special_map, &json)?;
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

    /// Number of ids the whole prompt takes, before cutting and padding; tells whether [`Self::encode`] cuts it.
    pub fn token_count(&self, prompt: &str) -> Result<usize> {
        let encoding = self
            .tokenizer
            .encode_fast(prompt, true)
            .map_err(|e| anyhow!("cannot tokenize the prompt: {e}"))?;
        Ok(encoding.get_ids().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T5: &str = r#"{"version": "1.0", "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, "model":
        {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["a", -2.0], ["b", -2.0]]}}"#;
    const CLIP_VOCAB: &str = r#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    const CLIP_MERGES: &str = "#version: 0.2\na b</w>\n";

    fn t5(config: &str) -> Result<PromptTokenizer> {
        let files = TokenizerFiles {
            tokenizer: Some(T5.as_bytes()),
            config: Some(config.as_bytes()),
            ..TokenizerFiles::default()
        };
        PromptTokenizer::new(Family::T5, &files)
    }

    fn clip(config: &str) -> Result<PromptTokenizer> {
        let (vocab, merges, config) = (
            Some(CLIP_VOCAB.as_bytes()),
            Some(CLIP_MERGES.as_bytes()),
            Some(config.as_bytes()),
        );
        PromptTokenizer::new(
            Family::Clip,
            &TokenizerFiles {
                vocab,
                merges,
                config,
                ..TokenizerFiles::default()
            },
        )
    }

    #[test]
    fn prompts_are_framed_cut_and_padded() -> Result<()> {
        let clip = clip("{}")?;
        assert_eq!(clip.encode("A AB b", 8)?, [5, 2, 4, 3, 6, 6, 6, 6]);
        assert_eq!(clip.encode("A AB b", 4)?, [5, 2, 4, 6]);
        assert_eq!(clip.encode("", 3)?, [5, 6, 6]);
        assert_eq!(clip.token_count("A AB b")?, 5);
        let t5 = t5(r#"{"extra_ids": 0, "model_max_length": 7}"#)?;
        assert_eq!(t5.encode("a ab", 6)?, [3, 3, 5, 1, 0, 0]);
        assert_eq!(t5.encode("a ab", 3)?, [3, 3, 1]);
        assert_eq!(t5.model_max_length(), Some(7));
        Ok(())
    }

    #[test]
    fn the_config_decides_padding_and_cutting() -> Result<()> {
        let t5 = t5(
            r#"{"extra_ids": 0, "padding_side": "left", "truncation_side": "left", "pad_token": "b", "model_max_length": 1e30}"#,
        )?;
        assert_eq!(t5.encode("a ab", 6)?, [5, 5, 3, 3, 5, 1]);
        assert_eq!(t5.encode("a ab", 3)?, [3, 5, 1]);
        assert_eq!(
            t5.model_max_length(),
            None,
            "transformers' way to say that there is no limit"
        );
        Ok(())
    }

    #[test]
    fn extra_ids_are_added_as_transformers_adds_them() -> Result<()> {
        assert_eq!(
            t5(r#"{"extra_ids": 2}"#)?.encode("<extra_id_1>", 2)?,
            [7, 1]
        );
        assert_eq!(
            t5(r#"{"extra_special_tokens": ["<x>"]}"#)?.encode("<x>", 2)?,
            [6, 1]
        );
        Ok(())
    }

    #[test]
    fn another_class_takes_the_file_as_it_stands() -> Result<()> {
        // no `▁` before words and no `</s>`: the file's own splitter and post-processor
        let raw = t5(r#"{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}"#)?;
        assert_eq!(raw.encode("a b", 3)?, [4, 5, 0]);
        let files = TokenizerFiles {
            class: Some("T5TokenizerFast"),
            tokenizer: Some(T5.as_bytes()),
            ..TokenizerFiles::default()
        };
        assert_eq!(
            PromptTokenizer::new(Family::T5, &files)?.encode("a", 3)?,
            [3, 1, 0]
        );
        Ok(())
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = |result: Result<PromptTokenizer>| format!("{:#}", result.unwrap_err());
        assert!(
            error(PromptTokenizer::new(
                Family::Clip,
                &TokenizerFiles::default()
            ))
            .contains("merges.txt")
        );
        assert!(
            error(PromptTokenizer::new(Family::T5, &TokenizerFiles::default()))
                .contains("tokenizer.json")
        );
        assert!(error(clip("{")).contains("tokenizer_config.json"));
        let merges = TokenizerFiles {
            vocab: Some(CLIP_VOCAB.as_bytes()),
            merges: Some(b"a b c"),
            ..TokenizerFiles::default()
        };
        assert!(error(PromptTokenizer::new(Family::Clip, &merges)).contains("a b c"));
        assert!(error(clip("{}").and_then(|t| t.encode("a", 1).map(|_| t))).contains("no room"));
    }
}
