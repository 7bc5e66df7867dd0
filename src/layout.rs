//! The vocabulary every stage shares: which blocks a FLUX transformer has and what stands in their place.
//!
//! No tensors, files or devices here; this module imports nothing of the crate.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The two block kinds of FLUX.1: double-stream (text and image have weights of their own) and single-stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockKind {
    /// `double_blocks.*`, diffusers' `transformer_blocks.*`.
    Double,
    /// `single_blocks.*`, diffusers' `single_transformer_blocks.*`.
    Single,
}

impl BlockKind {
    /// The name used in block identities: `double` or `single`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Double => "double",
            Self::Single => "single",
        }
    }

    /// The tensor-name prefix of all blocks of this kind in the original naming.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Double => "double_blocks",
            Self::Single => "single_blocks",
        }
    }
}

/// A block's identity *in the unpruned model*; never renumbered. Prints as `double.07`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId {
    /// Double-stream blocks come before single-stream blocks, in the model and in the order of ids.
    pub kind: BlockKind,
    /// Position among the blocks of this kind, from 0.
    pub index: usize,
}

impl BlockId {
    /// Block `index` of the double-stream blocks.
    pub fn double(index: usize) -> Self {
        Self {
            kind: BlockKind::Double,
            index,
        }
    }

    /// Block `index` of the single-stream blocks.
    pub fn single(index: usize) -> Self {
        Self {
            kind: BlockKind::Single,
            index,
        }
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `pad` so that tables can align ids
        f.pad(&format!("{}.{:02}", self.kind.as_str(), self.index))
    }
}

/// A text that is not a block id.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a block: expected `double.N` or `single.N`")]
pub struct BlockIdError(String);

impl FromStr for BlockId {
    type Err = BlockIdError;

    fn from_str(text: &str) -> Result<Self, BlockIdError> {
        let parsed = text.split_once('.').and_then(|(kind, index)| {
            let kind = match kind {
                "double" => BlockKind::Double,
                "single" => BlockKind::Single,
                _ => return None,
            };
            // `usize::from_str` takes a leading plus sign, a block id does not
            let digits = !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit());
            let index = digits.then(|| index.parse().ok()).flatten()?;
            Some(Self { kind, index })
        });
        parsed.ok_or_else(|| BlockIdError(text.to_owned()))
    }
}

impl Serialize for BlockId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BlockId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What stands in the place of a replaced block's residual branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Nothing: y = x. No tensors, no slot (the baseline of FLUX.1-lite).
    Remove,
    /// The paper's linear layer: y = x + W x + b (FastFLUX, arXiv 2506.10035).
    Linear,
    /// y = x + W x + V silu(vec) + b: also sees timestep, guidance and pooled text; nothing more per token.
    Conditioned,
    /// y = x + g ⊙ (W (LN(x)(1 + s) + t) + b): keeps the block's own shift t, scale s and gate g around the layer.
    Modulated,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Remove => "remove",
            Self::Linear => "linear",
            Self::Conditioned => "conditioned",
            Self::Modulated => "modulated",
        })
    }
}

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let forms = [
            Self::Remove,
            Self::Linear,
            Self::Conditioned,
            Self::Modulated,
        ];
        let form = forms.into_iter().find(|form| form.to_string() == text);
        form.ok_or_else(|| "expected linear, conditioned, modulated or remove".to_owned())
    }
}

/// One replacement: the original blocks it stands for and its form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replacement {
    /// The replaced blocks, in network order; more than one when a run collapsed into one layer.
    pub replaces: Vec<BlockId>,
    /// What stands in their place.
    pub form: Form,
    /// One layer for text and image tokens together instead of one for each stream.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub joint: bool,
}

/// One entry of a model's layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockSpec {
    /// A block of the original model, unchanged.
    Original(BlockId),
    /// A replacement of one or more original blocks.
    Replaced(Replacement),
}

impl BlockSpec {
    /// The first original block this entry stands for; identifies the entry in tables and messages.
    pub fn id(&self) -> BlockId {
        match self {
            Self::Original(id) => *id,
            // `FluxConfig` never holds an empty replacement; an empty one would name block 0
            Self::Replaced(r) => r.replaces.first().copied().unwrap_or(BlockId::double(0)),
        }
    }

    /// The kind of slot this entry's tensors are named after.
    pub fn kind(&self) -> BlockKind {
        self.id().kind
    }

    /// Whether the entry owns tensors in the checkpoint.
    pub fn has_tensors(&self) -> bool {
        !matches!(self, Self::Replaced(r) if r.form == Form::Remove)
    }
}

/// Every size of a FLUX transformer, and its layout. All but the rotary numbers are read off the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FluxConfig {
    /// Channels of one packed image token going in (64 for FLUX.1-dev, 384 for Fill).
    pub in_channels: usize,
    /// Channels of one packed image token of the predicted velocity.
    pub out_channels: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Attention heads; `hidden_size / num_heads` is the head size.
    pub num_heads: usize,
    /// Width of the MLP's hidden layer, in both block kinds.
    pub mlp_size: usize,
    /// Width of the T5 hidden states.
    pub context_in_dim: usize,
    /// Width of the pooled CLIP vector.
    pub vec_in_dim: usize,
    /// Whether the model was distilled with a guidance embedding (dev) or not (schnell).
    pub guidance_embed: bool,
    /// Rotary sizes of the three position axes; they sum to the head size.
    pub axes_dims: Vec<usize>,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// The blocks in network order.
    pub layout: Vec<BlockSpec>,
}

impl FluxConfig {
    /// Size of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Each layout entry with the tensor-name prefix of its slot, `None` where it has no tensors.
    ///
    /// Slots are numbered contiguously per kind, so that loaders which count blocks by name see no gap; the
    /// identity in the original model stays in the entry.
    pub fn slots(&self) -> Vec<(&BlockSpec, Option<String>)> {
        let (mut double, mut single) = (0, 0);
        self.layout
            .iter()
            .map(|spec| {
                let next = match spec.kind() {
                    BlockKind::Double => &mut double,
                    BlockKind::Single => &mut single,
                };
                let prefix = spec.has_tensors().then(|| {
                    *next += 1;
                    format!("{}.{}", spec.kind().prefix(), *next - 1)
                });
                (spec, prefix)
            })
            .collect()
    }

    /// How many original blocks of a kind the unpruned model had.
    pub fn original_blocks(&self, kind: BlockKind) -> usize {
        self.original_ids().filter(|id| id.kind == kind).count()
    }

    /// The ids of all blocks of the unpruned model, in network order.
    pub fn original_ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        original_ids(&self.layout)
    }

    /// The blocks that are not replaced, in network order.
    pub fn kept_ids(&self) -> Vec<BlockId> {
        let ids = self.layout.iter().filter_map(|spec| match spec {
            BlockSpec::Original(id) => Some(*id),
            BlockSpec::Replaced(_) => None,
        });
        ids.collect()
    }

    /// The replaced entries of the layout.
    pub fn replaced(&self) -> impl Iterator<Item = &Replacement> + '_ {
        self.layout.iter().filter_map(|spec| match spec {
            BlockSpec::Original(_) => None,
            BlockSpec::Replaced(r) => Some(r),
        })
    }
}

/// The ids of all blocks of the unpruned model that a layout comes from, in network order.
pub fn original_ids(layout: &[BlockSpec]) -> impl Iterator<Item = BlockId> + '_ {
    layout.iter().flat_map(|spec| match spec {
        BlockSpec::Original(id) => std::slice::from_ref(id).to_vec(),
        BlockSpec::Replaced(r) => r.replaces.clone(),
    })
}

/// The layout of an unpruned model.
pub fn unpruned(double: usize, single: usize) -> Vec<BlockSpec> {
    let doubles = (0..double).map(BlockId::double);
    let singles = (0..single).map(BlockId::single);
    doubles.chain(singles).map(BlockSpec::Original).collect()
}

/// FLUX.1-dev, for tests that count.
#[cfg(test)]
pub(crate) fn flux_dev() -> FluxConfig {
    FluxConfig {
        in_channels: 64,
        out_channels: 64,
        hidden_size: 3072,
        num_heads: 24,
        context_in_dim: 4096,
        vec_in_dim: 768,
        guidance_embed: true,
        axes_dims: vec![16, 56, 56],
        theta: 10_000.0,
        mlp_size: 12_288,
        layout: unpruned(19, 38),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_ids_print_and_parse() {
        assert_eq!(BlockId::double(7).to_string(), "double.07");
        assert_eq!("single.37".parse::<BlockId>().unwrap(), BlockId::single(37));
        assert_eq!("double.7".parse::<BlockId>().unwrap(), BlockId::double(7));
        for bad in [
            "",
            "double",
            "double.",
            "double.-1",
            "double.+1",
            "triple.1",
            "single.1x",
        ] {
            assert!(bad.parse::<BlockId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn slots_stay_contiguous_when_blocks_are_replaced_or_removed() {
        let mut layout = unpruned(3, 2);
        layout[1] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::double(1)],
            form: Form::Linear,
            joint: false,
        });
        layout[3] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(0)],
            form: Form::Remove,
            joint: false,
        });
        let config = FluxConfig {
            in_channels: 64,
            out_channels: 64,
            hidden_size: 8,
            num_heads: 2,
            mlp_size: 32,
            context_in_dim: 4,
            vec_in_dim: 4,
            guidance_embed: false,
            axes_dims: vec![2, 2],
            theta: 1e4,
            layout,
        };
        let prefixes: Vec<_> = config.slots().into_iter().map(|(_, p)| p).collect();
        let expected = [
            Some("double_blocks.0"),
            Some("double_blocks.1"),
            Some("double_blocks.2"),
            None,
            Some("single_blocks.0"),
        ];
        assert_eq!(prefixes, expected.map(|p| p.map(str::to_owned)));
        assert_eq!(config.original_blocks(BlockKind::Single), 2);
        let json = serde_json::to_string(&config.layout).unwrap();
        assert!(
            json.starts_with(r#"["double.00",{"replaces":["double.01"],"form":"linear"}"#),
            "{json}"
        );
        assert_eq!(
            serde_json::from_str::<Vec<BlockSpec>>(&json).unwrap(),
            config.layout
        );
    }
}
