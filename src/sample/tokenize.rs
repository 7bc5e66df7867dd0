//! Prompt → token ids, exactly as transformers' `CLIPTokenizer` and `T5Tokenizer` give them to diffusers. No models here.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{AddedToken, PostProcessor as _, Tokenizer};

use super::tokenize_build as build;

/// Attributes that name a special token, in the order in which transformers adds them.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The contents of a tokenizer's folder, as far as they are there.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenizerFiles<'a> {
    /// Class named by the pipeline's `model_index.json` (`T5TokenizerFast`); wins over `tokenizer_class` of the config.
    pub class: Option<&'a str>,
    /// `tokenizer.json`.
    pub tokenizer: Option<&'a [u8]>,
    /// `vocab.json`, read where there is no `tokenizer.json`.
    pub vocab: Option<&'a [u8]>,
    /// `merges.txt`, read where there is no `tokenizer.json`.
    pub merges: Option<&'a [u8]>,
    /// `tokenizer_config.json`.
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a [u8]>,
}

/// The two tokenizers of FLUX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Byte-level BPE with an end-of-word suffix, `<|startoftext|> … <|endoftext|>`.
    Clip,
    /// SentencePiece unigram, `… </s>`.
    T5,
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
    /// `CLIPTokenizer` and `T5Tokenizer` take only vocabulary, merges and character map from `tokenizer.json` and bring
    /// their own normalisation; any other class takes `tokenizer.json` as it stands.
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
            Some("CLIPTokenizer" | "CLIPTokenizerFast" | "T5Tokenizer" | "T5TokenizerFast")
            | None => true,
            Some(_) => json.is_null(),
        };
        let mut tokenizer = match (native, family) {
            (true, Family::Clip) => build::clip(&json, files)?,
            (true, Family::T5) => build::t5(&json)?,
            (false, _) => build::verbatim(files)?,
        };

        let added = AddedTokens::collect(family, native, &config, &special_map, &json)?;
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
        // transformers writes 1e30 where a tokenizer has no limit
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

    /// `model_max_length` of the tokenizer's config; `None` where it has no limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// Token ids of a prompt, cut and padded to exactly `max_length` of them, with the tokenizer's start and end tokens.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
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
        let padding = std::iter::repeat_n(self.pad_id, max_length.saturating_sub(ids.len()));
        if self.pad_left {
            ids = padding.chain(ids).collect();
        } else {
            ids.extend(padding);
        }
        Ok(ids)
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

/// Special and added tokens, merged from the config files the way transformers merges them.
struct AddedTokens {
    tokens: Vec<AddedToken>,
    names: Vec<(&'static str, AddedToken)>,
}

impl AddedTokens {
    fn collect(
        family: Family,
        native: bool,
        config: &Value,
        special_map: &Value,
        json: &Value,
    ) -> Result<Self> {
        let decoder = config["added_tokens_decoder"].as_object();
        let mut known: Vec<(u64, AddedToken)> = match decoder {
            Some(decoder) => decoder
                .iter()
                .map(|(id, t)| Ok((id.parse()?, token(t)?)))
                .collect::<Result<_>>(),
            None => json["added_tokens"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|t| Ok((t["id"].as_u64().unwrap_or(0), token(t)?)))
                .collect(),
        }
        .context("tokenizer config: `added_tokens_decoder`")?;
        known.sort_by_key(|(id, _)| *id);
        let mut tokens: Vec<AddedToken> = known.into_iter().map(|(_, t)| t).collect();
        let known = tokens.clone();
        let by_content = |content: &str| known.iter().find(|t| t.content == content).cloned();

        let mut names = Vec::new();
        let mut new = Vec::new();
        for name in NAMED {
            // special_tokens_map.json is only read where the config does not list its added tokens
            let mapped = decoder
                .is_none()
                .then(|| &special_map[name])
                .filter(|v| !v.is_null());
            let value = mapped.or_else(|| config.get(name).filter(|v| !v.is_null()));
            let token = match value {
                Some(Value::String(content)) => AddedToken::from(content.clone(), true),
                Some(value) => token(value)
                    .with_context(|| format!("tokenizer config: `{name}`"))?
                    .special(true),
                None => match default_token(family, name).filter(|_| native) {
                    Some(content) => AddedToken::from(content, true),
                    None => continue,
                },
            };
            if let Some(token) = by_content(&token.content) {
                names.push((name, token));
            } else {
                names.push((name, token.clone()));
                new.push(token);
            }
        }
        let listed = ["extra_special_tokens", "additional_special_tokens"]
            .iter()
            .find_map(|key| config[*key].as_array());
        match listed {
            Some(listed) => {
                for value in listed {
                    let token = match value {
                        Value::String(content) => AddedToken::from(content.clone(), true),
                        value => {
                            token(value).context("tokenizer config: `extra_special_tokens`")?
                        }
                    };
                    if by_content(&token.content).is_none() {
                        new.push(token);
                    }
                }
            }
            None if native && family == Family::T5 => {
                let extra = (0..config["extra_ids"].as_u64().unwrap_or(100))
                    .map(|i| AddedToken::from(format!("<extra_id_{i}>"), true));
                new.extend(extra.filter(|t| by_content(&t.content).is_none()));
            }
            None => {}
        }
        tokens.extend(new);
        Ok(Self { tokens, names })
    }

    fn named(&self, name: &str) -> Option<String> {
        self.names
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, t)| t.content.clone())
    }
}

fn default_token(family: Family, name: &str) -> Option<&'static str> {
    match (family, name) {
        (Family::Clip, "bos_token") => Some("<|startoftext|>"),
        (Family::Clip, "eos_token" | "unk_token" | "pad_token") => Some("<|endoftext|>"),
        (Family::T5, "eos_token") => Some("</s>"),
        (Family::T5, "unk_token") => Some("<unk>"),
        (Family::T5, "pad_token") => Some("<pad>"),
        _ => None,
    }
}

/// An `AddedToken` as the config files write it.
fn token(value: &Value) -> Result<AddedToken> {
    let Some(content) = value["content"].as_str() else {
        bail!("an added token has no `content`: {value}")
    };
    let flag = |key: &str| value[key].as_bool();
    let special = flag("special").unwrap_or(false);
    Ok(AddedToken::from(content, special)
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .single_word(flag("single_word").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special)))
}
