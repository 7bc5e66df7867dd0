//! The grammar of original FLUX tensor names: `double_blocks.3.img_attn.qkv.weight` ⇄ (kind, slot, tail).
//!
//! "Canonical" names are Black Forest Labs' own, without prefix and with `.scale` for the q/k norms.

use crate::layout::{BlockKind, Family};

/// First components of original names.
const TOPS: [&str; 11] = [
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "double_blocks",
    "single_blocks",
    "final_layer",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
];

/// First components of diffusers' names.
const DIFFUSERS_TOPS: [&str; 8] = [
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "time_guidance_embed",
    "transformer_blocks",
    "single_transformer_blocks",
    "norm_out",
    "proj_out",
];

/// Whether a transformer's names begin with this component, in either naming.
pub(super) fn is_top(component: &str) -> bool {
    TOPS.contains(&component) || DIFFUSERS_TOPS.contains(&component)
}

/// Whether a transformer's name, in either naming, is that of a block's tensor.
pub(super) fn is_of_block(name: &str) -> bool {
    let first = name.split('.').next().unwrap_or_default();
    first.ends_with("_blocks") && is_top(first)
}

/// The family that tensors belong to, by their original names or those of diffusers.
pub fn family<'a>(mut names: impl Iterator<Item = &'a str>) -> Family {
    let shared = ["single_stream_modulation.", "double_stream_modulation_"];
    if names.any(|name| shared.iter().any(|start| name.starts_with(start))) {
        Family::FLUX2
    } else {
        Family::FLUX1
    }
}

/// A tensor name that belongs to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockKey<'a> {
    /// Double or single.
    pub kind: BlockKind,
    /// Number of the block in the file.
    pub slot: usize,
    /// What follows, such as `img_attn.qkv.weight`.
    pub tail: &'a str,
}

impl BlockKey<'_> {
    /// Whether the tensor belongs to a layer that stands for replaced blocks (`linear.txt.weight`), not to a kept block.
    pub fn of_replacement(&self) -> bool {
        self.tail.starts_with("linear.")
    }
}

/// Splits a canonical name into its block and tail; `None` for names outside the blocks.
pub fn parse(name: &str) -> Option<BlockKey<'_>> {
    let (kind, rest) = [BlockKind::Double, BlockKind::Single]
        .into_iter()
        .find_map(|kind| Some((kind, name.strip_prefix(kind.prefix())?.strip_prefix('.')?)))?;
    let (slot, tail) = rest.split_once('.')?;
    let slot = slot.parse().ok()?;
    Some(BlockKey { kind, slot, tail })
}

/// The canonical form of an original name without prefix: newer exports call the norms' scale `weight`.
pub(super) fn canonical(name: &str) -> String {
    let norm = ["query_norm", "key_norm"].iter().find_map(|norm| {
        let stem = name.strip_suffix(".weight")?;
        stem.ends_with(norm).then(|| format!("{stem}.scale"))
    });
    norm.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_names_split_into_kind_slot_and_tail() {
        let key = parse("double_blocks.3.img_attn.qkv.weight").unwrap();
        assert_eq!(
            (key.kind, key.slot, key.tail),
            (BlockKind::Double, 3, "img_attn.qkv.weight")
        );
        assert_eq!(parse("img_in.weight"), None);
        let of_replacement = |name| parse(name).unwrap().of_replacement();
        assert!(of_replacement("single_blocks.0.linear.img.weight"));
        assert!(!of_replacement("single_blocks.0.linear1.weight"));
        assert_eq!(parse("double_blocksX.3.a"), None);
    }

    #[test]
    fn norm_names_become_canonical() {
        for (name, expected) in [
            (
                "single_blocks.0.norm.query_norm.weight",
                "single_blocks.0.norm.query_norm.scale",
            ),
            (
                "double_blocks.0.img_attn.norm.key_norm.scale",
                "double_blocks.0.img_attn.norm.key_norm.scale",
            ),
            ("img_in.weight", "img_in.weight"),
        ] {
            assert_eq!(canonical(name), expected);
        }
        assert!(
            is_of_block("transformer_blocks.0.attn.to_q.weight") && !is_of_block("img_in.weight")
        );
    }
}
