//! What of a reference was compared, what was not, and what a reference lacks: silence is not agreement.

use super::reference::Reference;
use crate::{
    layout::{BlockKind, BlockSpec, TextModel},
    pipeline::Pipeline,
};

/// Parts of a recording by the beginnings of their names, and what people call them.
const PARTS: [(&str, &str); 6] = [
    ("clip.", "CLIP"),
    ("t5.", "T5"),
    ("qwen.", "Qwen3"),
    ("transformer.", "one call of the transformer"),
    ("vae.", "the VAE"),
    ("pipeline.", "the whole pipeline"),
];

/// What was not compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Coverage {
    /// Tensors that nothing was compared with, although their part of the model is there.
    pub(super) unknown: Vec<String>,
    /// Parts of the model of which nothing is recorded.
    pub(super) missing: Vec<String>,
}

impl Coverage {
    /// After everything was compared; `skipped` are the beginnings of names of parts that the model came without.
    pub(super) fn new(reference: &Reference, pipeline: &Pipeline, skipped: &[&str]) -> Self {
        let replaced = blocks_within(pipeline);
        let explained = |name: &String| {
            skipped.iter().any(|part| name.starts_with(part))
                || replaced.iter().any(|block| name.starts_with(block))
        };
        let unread = reference.unread().into_iter();
        Self {
            unknown: unread.filter(|name| !explained(name)).collect(),
            missing: missing(reference, pipeline),
        }
    }
}

/// Beginnings of the names of blocks that this model does not compute: inside of a run that collapsed into one, or taken
/// out.
fn blocks_within(pipeline: &Pipeline) -> Vec<String> {
    let config = &pipeline.config;
    let computed: Vec<_> = config
        .layout
        .iter()
        .map(|spec| match spec {
            BlockSpec::Original(id) => *id,
            BlockSpec::Replaced(r) => r.replaces.last().copied().unwrap_or(spec.id()),
        })
        .collect();
    let ids = config.original_ids().filter(|id| !computed.contains(id));
    ids.map(|id| format!("blocks.{}.{}.", id.kind.prefix(), id.index))
        .collect()
}

fn missing(reference: &Reference, pipeline: &Pipeline) -> Vec<String> {
    let names = || reference.tensors.names();
    let has = |part: &str| names().any(|name| name.starts_with(part));
    let qwen = pipeline.config.family.text == TextModel::Qwen3;
    let of_model = |part: &&str| match *part {
        "clip." | "t5." => !qwen,
        "qwen." => qwen,
        _ => true,
    };
    let mut missing: Vec<String> = PARTS
        .iter()
        .filter(|(part, _)| of_model(part) && !has(part))
        .map(|(_, name)| (*name).to_owned())
        .collect();
    if has("transformer.") && !reference.has("transformer.velocity") {
        missing.push("the transformer's velocity".to_owned());
    }
    let (mut blocks, mut found) = (0, 0);
    for id in pipeline.config.original_ids() {
        let tail = match id.kind {
            BlockKind::Double => "img",
            BlockKind::Single => "x",
        };
        blocks += 1;
        let name = format!("blocks.{}.{}.{tail}", id.kind.prefix(), id.index);
        found += usize::from(reference.has(&name));
    }
    if found < blocks {
        missing.push(format!("{} of {blocks} blocks", blocks - found));
    }
    missing
}
