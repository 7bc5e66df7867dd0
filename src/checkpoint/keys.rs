//! The grammar of original FLUX tensor names: `double_blocks.3.img_attn.qkv.weight` ⇄ (kind, slot, tail).
//!
//! "Canonical" names are Black Forest Labs' own, without prefix and with `.scale` for the q/k norms.

use crate::layout::{BlockKind, Family};

/// Prefixes that other tools put before the original names.
const PREFIXES: [&str; 4] = [
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
];

/// The family that tensors belong to, by their original names or those of diffusers.
pub fn family<'a>(mut names: impl Iterator<Item = &'a str>) -> Family {
    if names.any(|name| name.starts_with("single_stream_modulation.")) {
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

/// The canonical form of an original name as found in a file, or `None` when it is no FLUX tensor's.
///
/// `prefix` is what [`common_prefix`] found.
pub fn canonical(name: &str, prefix: &str) -> Option<String> {
    let name = name.strip_prefix(prefix)?;
    let top = name.split('.').next()?;
    const TOPS: [&str; 11] = [
        "img_in",
        "txt_in",
        "time_in",
        "vector_in",
        "guidance_in",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "double_blocks",
        "single_blocks",
        "final_layer",
    ];
    if !TOPS.contains(&top) {
        return None;
    }
    // newer exports call the norms' scale `weight`
    let norm = name
        .strip_suffix("query_norm.weight")
        .map(|stem| (stem, "query_norm.scale"));
    let norm = norm.or_else(|| {
        name.strip_suffix("key_norm.weight")
            .map(|stem| (stem, "key_norm.scale"))
    });
    Some(norm.map_or_else(|| name.to_owned(), |(stem, tail)| format!("{stem}{tail}")))
}

/// The prefix under which a file holds original FLUX names (`""` when none), or `None` when it holds none.
pub fn common_prefix<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<&'static str> {
    let mut prefixes = std::iter::once("").chain(PREFIXES);
    prefixes.find(|prefix| {
        let has = |wanted: &str| {
            names.clone().any(|name| {
                name.strip_prefix(prefix)
                    .is_some_and(|rest| rest.starts_with(wanted))
            })
        };
        has("img_in.") && (has("double_blocks.") || has("single_blocks."))
    })
}

/// A tensor that shows a file to be a LoRA, one without the weights that it goes with.
pub fn lora<'a>(mut names: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    const PARTS: [&str; 6] = [
        "lora_A.",
        "lora_B.",
        "lora_up.",
        "lora_down.",
        ".lora.",
        ".lokr_",
    ];
    let is_base =
        |name: &str| name.ends_with("img_in.weight") || name.ends_with("x_embedder.weight");
    if names.clone().any(is_base) {
        return None;
    }
    names.find(|name| PARTS.iter().any(|part| name.contains(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lora_is_known_by_its_names_and_by_what_it_lacks() {
        let kohya = ["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"];
        assert_eq!(lora(kohya.into_iter()), Some(kohya[0]));
        let peft = "transformer.x_embedder.lora_A.weight";
        assert_eq!(lora([peft].into_iter()), Some(peft));
        assert_eq!(lora([peft, "x_embedder.weight"].into_iter()), None);
        assert_eq!(lora(["img_in.bias"].into_iter()), None);
    }

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
    fn prefixes_and_norm_names_become_canonical() {
        let names = [
            "model.diffusion_model.img_in.weight",
            "model.diffusion_model.single_blocks.0.norm.query_norm.weight",
            "vae.decoder.conv_in.weight",
        ];
        let prefix = common_prefix(names.into_iter()).unwrap();
        assert_eq!(prefix, "model.diffusion_model.");
        assert_eq!(
            canonical(names[1], prefix).unwrap(),
            "single_blocks.0.norm.query_norm.scale"
        );
        assert_eq!(canonical(names[2], prefix), None);
        assert_eq!(common_prefix(["encoder.weight"].into_iter()), None);
    }
}
