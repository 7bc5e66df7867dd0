//! Names of the text encoders' modules in LoRA files.

use std::collections::HashMap;

use crate::checkpoint::Checkpoint;

/// A text encoder of FLUX.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextEncoder {
    /// CLIP's text model.
    Clip,
    /// T5's encoder.
    T5,
}

/// Where a text encoder's module begins in a name, with dots and with underscores.
const STARTS: [(&str, usize, TextEncoder); 6] = [
    ("text_model.", "text_model.".len(), TextEncoder::Clip),
    ("text_model_", "text_model_".len(), TextEncoder::Clip),
    ("encoder.layers.", 0, TextEncoder::Clip),
    ("encoder_layers_", 0, TextEncoder::Clip),
    ("encoder.block.", 0, TextEncoder::T5),
    ("encoder_block_", 0, TextEncoder::T5),
];

/// The encoder that a module as a file names it belongs to, and its name there.
pub(super) fn module(name: &str) -> Option<(TextEncoder, &str)> {
    let found = |(word, skipped, encoder): &(&str, usize, TextEncoder)| {
        let at = name.find(word)?;
        Some((*encoder, &name[at + skipped..]))
    };
    STARTS.iter().find_map(found)
}

/// The modules of an opened encoder, by both spellings of their names.
pub(super) fn names(encoder: &Checkpoint) -> HashMap<String, String> {
    let mut out = HashMap::new();
    for module in encoder
        .names()
        .filter_map(|name| name.strip_suffix(".weight"))
    {
        out.insert(module.replace('.', "_"), module.to_owned());
        out.insert(module.to_owned(), module.to_owned());
    }
    out
}
