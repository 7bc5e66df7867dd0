//! Special and added tokens as transformers merges them from its config files. `build.rs` makes the rest of a tokenizer.
//!
//! Source: transformers `tokenization_utils_base.py` (`_from_pretrained`) and `tokenization_utils_tokenizers.py` (`__init__`).

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokenizers::AddedToken;

use super::Family;

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

/// Special and added tokens, merged from the config files the way transformers merges them.
pub(super) struct AddedTokens {
    pub(super) tokens: Vec<AddedToken>,
    names: Vec<(&'static str, AddedToken)>,
}

impl AddedTokens {
    pub(super) fn collect(
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
            // special_tokens_map.json is only read if the config does not list its added tokens
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

    pub(super) fn named(&self, name: &str) -> Option<String> {
        self.names
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, t)| t.content.clone())
    }
}

fn default_token(family: Family, name: &str) -> Option<&'static str> {
    match (family, name) {
        (Family::Clip, "bos_token") => Some("<|startoftext|>"),
        (Family::Clip | Family::Qwen2, "eos_token" | "unk_token" | "pad_token") => {
            Some("<|endoftext|>")
        }
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
