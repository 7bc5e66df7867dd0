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
fn a_tokenizer_has_no_more_tokens_than_the_encoder_has_rows() {
    let files = TokenizerFiles {
        tokenizer: Some(T5.as_bytes()),
        config: Some(br#"{"extra_ids": 4000000000}"#),
        ..TokenizerFiles::default()
    };
    for rows in [None, Some(106)] {
        let files = TokenizerFiles { rows, ..files };
        let error = PromptTokenizer::new(Family::T5, &files).unwrap_err();
        assert!(format!("{error:#}").contains("extra_ids"), "{error:#}");
    }
}

#[test]
fn a_normalizer_that_multiplies_a_prompt_is_refused() -> Result<()> {
    let step = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "CONTENT"}"#;
    let with = |steps: usize| {
        let step = step.replace("CONTENT", &"a".repeat(100));
        let steps = vec![step; steps].join(",");
        let normalizer = format!(r#"{{"type": "Sequence", "normalizers": [{steps}]}}"#);
        let json = T5.replace(
            "\"normalizer\": null",
            &format!("\"normalizer\": {normalizer}"),
        );
        let files = TokenizerFiles {
            class: Some("PreTrainedTokenizerFast"),
            tokenizer: Some(json.as_bytes()),
            config: Some(br#"{"pad_token": "<pad>"}"#),
            ..TokenizerFiles::default()
        };
        PromptTokenizer::new(Family::T5, &files)
    };
    let error = with(6)?.encode("aaaaaaaa", 8).unwrap_err().to_string();
    assert!(error.contains("normalizer"), "{error}");
    assert!(with(6)?.token_count("aaaaaaaa").is_err());
    assert_eq!(with(1)?.encode("a", 8)?.len(), 8);
    Ok(())
}

#[test]
fn a_character_map_that_lies_is_refused() {
    for map in ["BAAAAP////8=", "/P///w==", "", "AAAAAA==", "not base64"] {
        let normalizer = format!(r#"{{"type": "Precompiled", "precompiled_charsmap": "{map}"}}"#);
        let json = T5.replace(
            "\"normalizer\": null",
            &format!("\"normalizer\": {normalizer}"),
        );
        let files = TokenizerFiles {
            tokenizer: Some(json.as_bytes()),
            ..TokenizerFiles::default()
        };
        for class in [None, Some("PreTrainedTokenizerFast")] {
            let files = TokenizerFiles { class, ..files };
            let error = PromptTokenizer::new(Family::T5, &files)
                .map(drop)
                .unwrap_err();
            assert!(
                format!("{error:#}").contains("charsmap"),
                "{map}: {error:#}"
            );
        }
    }
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

#[test]
fn a_template_that_names_what_is_not_there_is_refused() {
    let template = r#"{"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1],
        "tokens": ["</s>"]}}}"#;
    let encode = |template: &str| {
        let tokenizer = T5.replace(
            "\"post_processor\": null",
            &format!("\"post_processor\": {template}"),
        );
        let files = TokenizerFiles {
            tokenizer: Some(tokenizer.as_bytes()),
            config: Some(br#"{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}"#),
            ..TokenizerFiles::default()
        };
        PromptTokenizer::new(Family::T5, &files)?.encode("a b", 8)
    };
    encode(template).unwrap();
    for (from, to, why) in [
        ("\"</s>\": {", "\"<s>\": {", "its `special_tokens` lack"),
        ("\"id\": \"A\"", "\"id\": \"B\"", "a second text"),
        ("[1]", "[1, 1]", "not as many ids as tokens"),
    ] {
        let damaged = template.replace(from, to);
        assert_ne!(damaged, template);
        let sequence = format!(r#"{{"type": "Sequence", "processors": [{damaged}]}}"#);
        for damaged in [damaged, sequence] {
            let error = encode(&damaged).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
