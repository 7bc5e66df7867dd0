//! Under which names the modules of a transformer go in LoRA files: a list made from the tables of original and diffusers
//! names, with dots and with underscores, and `XLabs`' processors. A second family is another table, not other code.

use std::{collections::HashMap, ops::Range};

use crate::{
    checkpoint::{diffusers, source::RowMap},
    layout::{BlockId, BlockKind, FluxConfig},
};

/// What stands before the names of the transformer's modules, several of them one behind the other too: diffusers and
/// ai-toolkit, `ComfyUI`, PEFT, pipelines and wrappers of PyTorch, kohya, `OneTrainer`, `LyCORIS`; nothing in files of `XLabs`.
const PREFIXES: [&str; 12] = [
    "transformer.",
    "diffusion_model.",
    "base_model.model.",
    "model.",
    "unet.",
    "pipe.",
    "module.",
    "_orig_mod.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "transformer_",
];

/// `XLabs`' processors of double blocks: 1 is the image's, 2 the text's.
const PROCESSORS_DOUBLE: [(&str, &str); 4] = [
    ("processor.qkv_lora1", "img_attn.qkv"),
    ("processor.qkv_lora2", "txt_attn.qkv"),
    ("processor.proj_lora1", "img_attn.proj"),
    ("processor.proj_lora2", "txt_attn.proj"),
];

/// Those of single blocks; the first acts on q, k and v only.
const PROCESSORS_SINGLE: [(&str, &str); 2] = [
    ("processor.qkv_lora", "linear1"),
    ("processor.proj_lora", "linear2"),
];

/// Under which names diffusers' models have q, k and v as one module once they were fused, as PEFT and LoKr then name it.
const FUSED: [(&str, &str); 2] = [
    ("attn.to_qkv", "img_attn.qkv"),
    ("attn.to_added_qkv", "txt_attn.qkv"),
];

/// What some exports of FLUX.2 leave of `transformer_blocks`.
const CUT: &str = "sformer_blocks";

/// Where a module of a LoRA file acts on the unpruned model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The block by its number in the file; `None` for what is outside of the blocks.
    pub(super) block: Option<BlockId>,
    /// The original module, below the block if there is one: `img_attn.qkv`.
    pub(super) module: &'static str,
    /// Which of its rows.
    pub(super) part: Part,
}

/// Rows of an original module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of them.
    Whole,
    /// All, the second half first: diffusers' final modulation.
    Swapped,
    /// Some of the parts that are as wide as the stream; with the last one all that is behind it too.
    Parts {
        first: usize,
        /// `None`: the rest.
        count: Option<usize>,
    },
}

impl Part {
    /// The rows of a tensor of `height` rows that the rows of a change are added to, and how many the change must have.
    pub(super) fn rows(&self, height: usize, unit: usize) -> (Vec<RowMap>, usize) {
        let one = |at: usize, rows: Range<usize>| RowMap { at, rows };
        match self {
            Self::Whole => (vec![one(0, 0..height)], height),
            Self::Swapped => {
                let half = height / 2;
                (
                    vec![one(0, half..height), one(height - half, 0..half)],
                    height,
                )
            }
            Self::Parts { first, count } => {
                let start = (first * unit).min(height);
                let rest = height - start;
                let len = count.map_or(rest, |count| (count * unit).min(rest));
                (vec![one(start, 0..len)], len)
            }
        }
    }
}

/// All names of the modules of one model.
pub(super) struct Names {
    places: HashMap<String, Place>,
    /// Whether a name may have dots in some places and underscores in others, as converters for FLUX.2 leave it. Not for
    /// FLUX.1: there such names are `HunyuanVideo`'s.
    mixed: bool,
}

impl Names {
    /// Those of the unpruned model that `config` comes from, and of as many blocks more as a file may name.
    pub(super) fn new(config: &FluxConfig, blocks: [usize; 2]) -> Self {
        let mut out = Self {
            places: HashMap::new(),
            mixed: config.shares_modulation(),
        };
        for (ours, theirs) in diffusers::global_modules(config) {
            out.put(None, ours, ours, &[theirs]);
        }
        let (ours, theirs) = diffusers::FINAL_MODULATION;
        out.add(ours.to_owned(), None, ours, Part::Whole);
        out.add(theirs.to_owned(), None, ours, Part::Swapped);
        for (kind, count) in [BlockKind::Double, BlockKind::Single]
            .into_iter()
            .zip(blocks)
        {
            for index in 0..count.max(config.original_blocks(kind)) {
                let block = Some(BlockId { kind, index });
                let original = format!("{}.{index}", kind.prefix());
                for (ours, theirs) in diffusers::block_modules(config, kind) {
                    let named = theirs.iter().map(|module| {
                        format!("{}.{index}.{module}", diffusers::block_prefix(kind))
                    });
                    let named: Vec<String> = named.collect();
                    let named: Vec<&str> = named.iter().map(String::as_str).collect();
                    out.put(block, &format!("{original}.{ours}"), ours, &named);
                }
                for (ours, theirs) in diffusers::block_norms(config, kind) {
                    let theirs = format!("{}.{index}.{theirs}", diffusers::block_prefix(kind));
                    out.put(block, &format!("{original}.{ours}"), ours, &[&theirs]);
                }
                if kind == BlockKind::Double {
                    for (fused, ours) in FUSED {
                        let name = format!("{}.{index}.{fused}", diffusers::block_prefix(kind));
                        out.add(name, block, ours, Part::Whole);
                    }
                }
                let processors: &[(&str, &'static str)] = match kind {
                    BlockKind::Double => &PROCESSORS_DOUBLE,
                    BlockKind::Single => &PROCESSORS_SINGLE,
                };
                for (processor, ours) in processors {
                    let part = match *ours {
                        "linear1" => Part::Parts {
                            first: 0,
                            count: Some(3),
                        },
                        _ => Part::Whole,
                    };
                    out.add(format!("{original}.{processor}"), block, ours, part);
                }
            }
        }
        out
    }

    /// The place of a module as a file names it.
    pub(super) fn place(&self, module: &str) -> Option<&Place> {
        let mut name = module;
        loop {
            let place = self.known(name);
            if place.is_some() {
                return place;
            }
            name = PREFIXES
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix))?;
        }
    }

    /// The place of a name without prefixes.
    fn known(&self, name: &str) -> Option<&Place> {
        let known = self.places.get(name);
        if known.is_some() || !self.mixed {
            return known;
        }
        let name = name.replace('.', "_");
        let whole = name.starts_with(CUT).then(|| format!("tran{name}"));
        self.places.get(&whole.unwrap_or(name))
    }

    /// An original module, and the modules whose rows make it up.
    fn put(&mut self, block: Option<BlockId>, original: &str, ours: &'static str, theirs: &[&str]) {
        self.add(original.to_owned(), block, ours, Part::Whole);
        for (first, module) in theirs.iter().enumerate() {
            let last = first + 1 == theirs.len();
            let part = match theirs.len() {
                1 => Part::Whole,
                _ => Part::Parts {
                    first,
                    count: (!last).then_some(1),
                },
            };
            self.add((*module).to_owned(), block, ours, part);
        }
    }

    fn add(&mut self, name: String, block: Option<BlockId>, module: &'static str, part: Part) {
        let place = Place {
            block,
            module,
            part,
        };
        self.places.insert(name.replace('.', "_"), place.clone());
        self.places.insert(name, place);
    }
}

/// The first numbers beyond those of all double and single blocks that the names of a file speak of.
pub(super) fn counts<'a>(modules: impl Iterator<Item = &'a str>) -> [usize; 2] {
    let mut out = [0, 0];
    for module in modules {
        for (count, words) in out.iter_mut().zip([
            ["double_blocks", "transformer_blocks"],
            ["single_blocks", "single_transformer_blocks"],
        ]) {
            for word in words {
                let Some(at) = module.find(word) else {
                    continue;
                };
                if word == "transformer_blocks" && module[..at].ends_with("single_") {
                    continue;
                }
                let digits = module[at + word.len()..].trim_start_matches(['.', '_']);
                let end = digits
                    .find(|c: char| !c.is_ascii_digit())
                    .unwrap_or(digits.len());
                if let Ok(index) = digits[..end].parse::<usize>() {
                    *count = (*count).max(index.saturating_add(1).min(MAX_BLOCKS));
                }
            }
        }
    }
    out
}

/// More blocks than any model has: higher numbers are not listed.
const MAX_BLOCKS: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::flux_dev;

    #[test]
    fn one_module_has_a_name_in_every_dialect() {
        let names = Names::new(&flux_dev(), [0, 0]);
        let place = |name: &str| {
            names
                .place(name)
                .cloned()
                .unwrap_or_else(|| panic!("{name}"))
        };
        for (block, module, part, spellings) in [
            (
                Some(BlockId::double(4)),
                "img_attn.proj",
                Part::Whole,
                &[
                    "transformer.transformer_blocks.4.attn.to_out.0",
                    "base_model.model.transformer_blocks.4.attn.to_out.0",
                    "lora_unet_double_blocks_4_img_attn_proj",
                    "diffusion_model.double_blocks.4.img_attn.proj",
                    "double_blocks.4.processor.proj_lora1",
                    "lora_transformer_transformer_blocks_4_attn_to_out_0",
                    "lycoris_double_blocks_4_img_attn_proj",
                ][..],
            ),
            (
                Some(BlockId::single(37)),
                "linear1",
                Part::Parts {
                    first: 2,
                    count: Some(1),
                },
                &[
                    "transformer.single_transformer_blocks.37.attn.to_v",
                    "lora_transformer_single_transformer_blocks_37_attn_to_v",
                ],
            ),
            (
                Some(BlockId::single(0)),
                "linear1",
                Part::Parts {
                    first: 3,
                    count: None,
                },
                &["transformer.single_transformer_blocks.0.proj_mlp"],
            ),
            (
                Some(BlockId::single(1)),
                "linear1",
                Part::Parts {
                    first: 0,
                    count: Some(3),
                },
                &["single_blocks.1.processor.qkv_lora"],
            ),
            (
                None,
                "final_layer.adaLN_modulation.1",
                Part::Swapped,
                &[
                    "transformer.norm_out.linear",
                    "lora_transformer_norm_out_linear",
                ],
            ),
            (
                None,
                "final_layer.linear",
                Part::Whole,
                &["transformer.proj_out", "lora_unet_final_layer_linear"],
            ),
        ] {
            for spelling in spellings {
                let expected = Place {
                    block,
                    module,
                    part: part.clone(),
                };
                assert_eq!(place(spelling), expected, "{spelling}");
            }
        }
        assert_eq!(names.place("lora_unet_input_blocks_4_1_proj_in"), None);
        assert_eq!(
            names.place("transformer.transformer_blocks.19.attn.to_q"),
            None
        );
    }

    #[test]
    fn rows_of_parts_are_those_that_the_fused_module_has() {
        let rows = |part: &Part| part.rows(70, 10);
        let map = |at, rows| vec![RowMap { at, rows }];
        let rest = Part::Parts {
            first: 3,
            count: None,
        };
        assert_eq!(rows(&rest), (map(30, 0..40), 40));
        let qkv = Part::Parts {
            first: 0,
            count: Some(3),
        };
        assert_eq!(rows(&qkv), (map(0, 0..30), 30));
        let (swapped, len) = Part::Swapped.rows(20, 10);
        assert_eq!(
            (swapped[0].rows.clone(), swapped[1].at, len),
            (10..20, 10, 20)
        );
    }

    #[test]
    fn block_numbers_are_found_in_every_spelling() {
        let found = counts(
            [
                "lora_unet_double_blocks_18_img_mlp_0",
                "transformer.single_transformer_blocks.37.x",
            ]
            .into_iter(),
        );
        assert_eq!(found, [19, 38]);
    }
}
