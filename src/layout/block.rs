//! Blocks by name, and what may stand in their place.

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
