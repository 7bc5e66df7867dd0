//! Any `tokenizer.json`, `tokenizer_config.json` and prompt, separated by NUL bytes, for both families.
#![no_main]

use fastflux::sample::tokenize::{Family, PromptTokenizer, TokenizerFiles};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let tokenizer = parts.next();
    let config = parts.next();
    let prompt = String::from_utf8_lossy(parts.next().unwrap_or(b"a fox")).into_owned();
    for family in [Family::Clip, Family::T5] {
        let files = TokenizerFiles {
            tokenizer,
            config,
            rows: Some(1 << 16),
            ..TokenizerFiles::default()
        };
        if let Ok(tokenizer) = PromptTokenizer::new(family, &files) {
            let _ = tokenizer.encode(&prompt, 77);
            let _ = tokenizer.token_count(&prompt);
        }
    }
});
