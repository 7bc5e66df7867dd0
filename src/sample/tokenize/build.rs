//! The pipelines (normaliser, splitter, model, post-processor) of the tokenizers. `mod.rs` handles special tokens.
//!
//! Sources: transformers `models/clip/tokenization_clip.py`, `models/t5/tokenization_t5.py` and
//! `models/qwen2/tokenization_qwen2.py`.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{
    Lowercase, NFC, NormalizerWrapper, Precompiled, Replace, Sequence, replace::ReplacePattern,
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as Splitters;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::TokenizerFiles;

/// How CLIP cuts a text into words.
const CLIP_WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// How Qwen3 cuts a text into words, digits and lines.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Vocabulary and merges of a byte-level BPE, from `tokenizer.json` or from `vocab.json` and `merges.txt`; `name` is for
/// messages.
fn vocab_and_merges(
    name: &str,
    json: &Value,
    files: &TokenizerFiles,
) -> Result<(Vocab, Vec<(String, String)>)> {
    if json.is_null() {
        let (Some(vocab), Some(merges)) = (files.vocab, files.merges) else {
            bail!("the {name} tokenizer needs `tokenizer.json`, or `vocab.json` and `merges.txt`");
        };
        let vocab: Value =
            serde_json::from_slice(vocab).context("`vocab.json` is not valid JSON")?;
        return Ok((
            vocabulary(&vocab).context("`vocab.json`")?,
            merges_text(merges)?,
        ));
    }
    Ok((
        vocabulary(&json["model"]["vocab"]).context("`tokenizer.json`: `model.vocab`")?,
        merges_json(&json["model"]["merges"])?,
    ))
}

/// Qwen3's byte-level BPE.
pub(super) fn qwen2(json: &Value, files: &TokenizerFiles, prefix: bool) -> Result<Tokenizer> {
    let (vocab, merges) = vocab_and_merges("Qwen3", json, files)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(|e| anyhow!("the Qwen3 vocabulary and merges do not fit: {e}"))?;
    let words = Split::new(
        SplitPattern::Regex(QWEN2_WORDS.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|e| anyhow!("{e}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer
        .with_normalizer(Some(NFC))
        .map_err(|e| anyhow!("{e}"))?
        .with_pre_tokenizer(Some(Splitters::new(vec![
            words.into(),
            ByteLevel::new(prefix, true, false).into(),
        ])));
    Ok(tokenizer)
}

/// CLIP's byte-level BPE.
pub(super) fn clip(json: &Value, files: &TokenizerFiles, unknown: String) -> Result<Tokenizer> {
    let (vocab, merges) = vocab_and_merges("CLIP", json, files)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(unknown)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(|e| anyhow!("the CLIP vocabulary and merges do not fit: {e}"))?;

    let spaces =
        Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|e| anyhow!("{e}"))?;
    let words = Split::new(
        SplitPattern::Regex(CLIP_WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )
    .map_err(|e| anyhow!("{e}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer
        .with_normalizer(Some(Sequence::new(vec![
            NFC.into(),
            spaces.into(),
            Lowercase.into(),
        ])))
        .map_err(|e| anyhow!("{e}"))?
        .with_pre_tokenizer(Some(Splitters::new(vec![
            words.into(),
            ByteLevel::new(false, true, true).into(),
        ])));
    Ok(tokenizer)
}

/// `<|startoftext|> … <|endoftext|>`.
pub(super) fn clip_processor(eos: (String, u32), bos: (String, u32)) -> PostProcessorWrapper {
    RobertaProcessing::new(eos, bos)
        .trim_offsets(false)
        .add_prefix_space(false)
        .into()
}

/// T5's unigram model, from `tokenizer.json`.
pub(super) fn t5(json: &Value) -> Result<Tokenizer> {
    if json.is_null() {
        bail!(
            "the T5 tokenizer needs `tokenizer.json` (`spiece.model` alone is not read; transformers' save_pretrained writes tokenizer.json)"
        );
    }
    let vocab = json["model"]["vocab"]
        .as_array()
        .context("`tokenizer.json`: `model.vocab` is not a list, so this is no T5 tokenizer")?;
    let vocab = vocab
        .iter()
        .map(|entry| Some((entry[0].as_str()?.to_owned(), entry[1].as_f64()?)))
        .collect::<Option<Vec<_>>>()
        .context(
            "`tokenizer.json`: `model.vocab` holds something else than [token, score] pairs",
        )?;
    let unigram = Unigram::from(vocab, Some(2), false)
        .map_err(|e| anyhow!("`tokenizer.json`: T5 vocabulary: {e}"))?;
    let mut tokenizer = Tokenizer::new(unigram);
    if let Some(map) = charsmap(&json["normalizer"])? {
        tokenizer
            .with_normalizer(Some(NormalizerWrapper::from(map)))
            .map_err(|e| anyhow!("{e}"))?;
    }
    let metaspace = Metaspace::new('▁', PrependScheme::Always, true);
    tokenizer.with_pre_tokenizer(Some(Splitters::new(vec![
        WhitespaceSplit.into(),
        metaspace.into(),
    ])));
    Ok(tokenizer)
}

/// `… </s>`.
pub(super) fn t5_processor(eos: u32) -> Result<PostProcessorWrapper> {
    let template = TemplateProcessing::builder()
        .try_single("$A </s>")
        .and_then(|b| b.try_pair("$A </s> $B </s>"))
        .map_err(|e| anyhow!("{e}"))?
        .special_tokens(vec![("</s>", eos)])
        .build()?;
    Ok(template.into())
}

/// `tokenizer.json` as it stands.
pub(super) fn verbatim(files: &TokenizerFiles) -> Result<Tokenizer> {
    let bytes = files
        .tokenizer
        .context("the tokenizer needs `tokenizer.json`")?;
    let json: Value =
        serde_json::from_slice(bytes).context("`tokenizer.json` is not valid JSON")?;
    for_each_map(&json, &mut check_map)?;
    check_template(&json["post_processor"])?;
    Tokenizer::from_bytes(bytes).map_err(|e| anyhow!("`tokenizer.json`: {e}"))
}

/// Fails where a template names what is not there: the library looks it up when it encodes, and panics.
fn check_template(processor: &Value) -> Result<()> {
    fn list(value: &Value) -> &[Value] {
        value.as_array().map(Vec::as_slice).unwrap_or_default()
    }
    list(&processor["processors"])
        .iter()
        .try_for_each(check_template)?;
    let single = list(&processor["single"]);
    ensure!(
        single.iter().all(|piece| piece["Sequence"]["id"] != "B"),
        "`tokenizer.json`: `post_processor` wants a second text where there is one"
    );
    let tokens = &processor["special_tokens"];
    for piece in single.iter().chain(list(&processor["pair"])) {
        if let Some(id) = piece["SpecialToken"]["id"].as_str() {
            ensure!(
                tokens.get(id).is_some(),
                "`tokenizer.json`: `post_processor` names the token `{id}`, which its `special_tokens` lack"
            );
        }
    }
    for (name, token) in tokens.as_object().into_iter().flatten() {
        ensure!(
            list(&token["ids"]).len() == list(&token["tokens"]).len(),
            "`tokenizer.json`: the token `{name}` of `post_processor` has not as many ids as tokens"
        );
    }
    Ok(())
}

/// Bytes that a text of `length` bytes could become by a normaliser of `tokenizer.json`: never fewer than it does.
pub(super) fn normalized_length(normalizer: &Value, length: usize) -> usize {
    let size = |key: &str| normalizer[key].as_str().map_or(0, str::len);
    match normalizer["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            let steps = normalizer["normalizers"].as_array().into_iter().flatten();
            steps.fold(length, |length, step| normalized_length(step, length))
        }
        "Replace" => length.saturating_add((length + 1).saturating_mul(size("content"))),
        "Prepend" => length.saturating_add(size("prepend")),
        "Lowercase" | "Strip" | "StripAccents" | "Nmt" => length.saturating_mul(3),
        "" => length,
        // the longest decomposition of Unicode is 18 characters
        _ => length.saturating_mul(20),
    }
}

/// Calls `check` with every SentencePiece character map in a JSON value.
fn for_each_map(json: &Value, check: &mut impl FnMut(&str) -> Result<()>) -> Result<()> {
    match json {
        Value::Object(map) => {
            if let Some(text) = map.get("precompiled_charsmap") {
                check(text.as_str().unwrap_or_default())?;
            }
            map.values()
                .try_for_each(|value| for_each_map(value, check))
        }
        Value::Array(values) => values
            .iter()
            .try_for_each(|value| for_each_map(value, check)),
        _ => Ok(()),
    }
}

/// Fails at a character map that its reader would look beyond the end of: the length of its trie, every place that can be
/// reached in it, and the texts that it names are checked. Source: `spm_precompiled` and darts-clone's double arrays.
fn check_map(text: &str) -> Result<()> {
    const WRONG: &str = "`tokenizer.json`: `precompiled_charsmap` is not a SentencePiece map";
    let bytes = base64(text).context(WRONG)?;
    let (length, rest) = bytes.split_first_chunk::<4>().context(WRONG)?;
    let length = u32::from_le_bytes(*length) as usize;
    let (trie, texts) = rest.split_at_checked(length).context(WRONG)?;
    let (units, odd) = trie.as_chunks::<4>();
    let texts = std::str::from_utf8(texts).ok().context(WRONG)?;
    ensure!(!units.is_empty() && odd.is_empty(), WRONG);
    let unit = |at: usize| units.get(at).map(|unit| u32::from_le_bytes(*unit) as usize);
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let first = unit(0).map(offset).context(WRONG)?;
    let (mut seen, mut open) = (std::collections::BTreeSet::from([first]), vec![first]);
    while let Some(base) = open.pop() {
        for label in 1..=255usize {
            let at = base ^ label;
            let found = unit(at).context(WRONG)?;
            if found & ((1 << 31) | 0xff) != label {
                continue;
            }
            let next = at ^ offset(found);
            if (found >> 8) & 1 == 1 {
                let text = unit(next).context(WRONG)? & ((1 << 31) - 1);
                ensure!(text <= texts.len() && texts.is_char_boundary(text), WRONG);
            }
            if seen.insert(next) {
                open.push(next);
            }
        }
    }
    Ok(())
}

/// The bytes of a base64 text (RFC 4648).
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let (mut bits, mut count, mut out) = (0u32, 0, Vec::with_capacity(text.len() * 3 / 4));
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

/// The first SentencePiece character map in a normaliser.
fn charsmap(normalizer: &Value) -> Result<Option<Precompiled>> {
    let list = normalizer["normalizers"].as_array();
    let found = list
        .map_or(std::slice::from_ref(normalizer), Vec::as_slice)
        .iter()
        .find(|n| n["type"] == "Precompiled");
    if let Some(map) = found {
        for_each_map(map, &mut check_map)?;
    }
    // the map can only be read from text; its own error would print all of it
    let read = |n: &Value| {
        serde_json::from_str(&n.to_string())
            .ok()
            .context("`tokenizer.json`: `precompiled_charsmap` is not a SentencePiece map")
    };
    found.map(read).transpose()
}

fn vocabulary(vocab: &Value) -> Result<Vocab> {
    let vocab = vocab
        .as_object()
        .context("the vocabulary is not a map from token to id")?;
    let entry = |(token, id): (&String, &Value)| {
        let id = id
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .with_context(|| format!("token `{token}` has no id"))?;
        Ok((token.clone(), id))
    };
    vocab.iter().map(entry).collect()
}

fn merges_json(merges: &Value) -> Result<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text
            .split_once(' ')
            .map(|(a, b)| (a.to_owned(), b.to_owned())),
        _ => Some((merge[0].as_str()?.to_owned(), merge[1].as_str()?.to_owned())),
    };
    let merges = merges
        .as_array()
        .context("`tokenizer.json`: `model.merges` is not a list")?;
    merges
        .iter()
        .map(pair)
        .collect::<Option<_>>()
        .context("`tokenizer.json`: `model.merges` holds something else than pairs")
}

fn merges_text(merges: &[u8]) -> Result<Vec<(String, String)>> {
    let text = std::str::from_utf8(merges).context("`merges.txt` is not UTF-8")?;
    let lines = text.lines().filter(|line| !line.starts_with("#version"));
    lines
        .map(|line| {
            let mut parts = line.split(' ');
            match (parts.next(), parts.next(), parts.next()) {
                (Some(a), Some(b), None) => Ok((a.to_owned(), b.to_owned())),
                _ => bail!("`merges.txt`: `{line}` is not a pair"),
            }
        })
        .collect()
}
