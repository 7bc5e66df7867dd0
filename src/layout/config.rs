//! The sizes, the family and the layout of a transformer.

use serde::{Deserialize, Serialize};

use super::{BlockId, BlockKind, BlockSpec, Replacement, original_ids};

/// Where a block's shift, scale and gate come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModulationSource {
    /// Every block projects silu(vec) by weights of its own.
    PerBlock,
    /// One projection for the image tokens of all double blocks, one for their text tokens, one for all single blocks.
    Shared,
}

/// What stands between the two projections of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// GELU in its tanh form.
    Gelu,
    /// silu(first half) · second half: the first projection is twice as wide as the second one's input.
    SwiGlu,
}

/// What encodes a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TextModel {
    /// CLIP's pooled output and T5's hidden states.
    ClipAndT5,
    /// Three hidden states of Qwen3, side by side.
    Qwen3,
}

/// In which order the numbers of starting noise are drawn; image tokens are the same in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseOrder {
    /// Latent pixel by latent pixel: (images, channels, rows, columns).
    Pixels,
    /// Patch of 2×2 latent pixels by patch: (images, 4 · channels, rows / 2, columns / 2).
    Patches,
}

/// What the dynamic shift of a schedule follows from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShiftRule {
    /// The number of image tokens, by the numbers in the scheduler's configuration.
    #[default]
    Tokens,
    /// The numbers of image tokens and of steps, by numbers measured once for all models of the family.
    TokensAndSteps,
}

/// What differs between the families of FLUX in addition to sizes. The code of the model is one for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// Whether projections have biases. Layers that replace blocks always have one.
    pub biases: bool,
    /// Where blocks get shift, scale and gate from.
    pub modulation: ModulationSource,
    /// The MLP's activation, in both block kinds.
    pub activation: Activation,
    /// Numbers in a token's position: image, row, column, and with a fourth the place in the text.
    pub position_axes: usize,
    /// First number of the position of the first reference image, and what each further one adds to it.
    pub reference_step: usize,
    /// What encodes prompts.
    pub text: TextModel,
    /// The order in which starting noise is drawn.
    pub noise: NoiseOrder,
    /// What the schedule's dynamic shift follows from.
    pub shift: ShiftRule,
}

impl Family {
    /// FLUX.1: dev, schnell and their relatives.
    pub const FLUX1: Self = Self {
        biases: true,
        modulation: ModulationSource::PerBlock,
        activation: Activation::Gelu,
        position_axes: 3,
        reference_step: 1,
        text: TextModel::ClipAndT5,
        noise: NoiseOrder::Pixels,
        shift: ShiftRule::Tokens,
    };

    /// FLUX.2: klein in its sizes.
    pub const FLUX2: Self = Self {
        biases: false,
        modulation: ModulationSource::Shared,
        activation: Activation::SwiGlu,
        position_axes: 4,
        reference_step: 10,
        text: TextModel::Qwen3,
        noise: NoiseOrder::Patches,
        shift: ShiftRule::TokensAndSteps,
    };

    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self.text {
            TextModel::ClipAndT5 => "FLUX.1",
            TextModel::Qwen3 => "FLUX.2",
        }
    }
}

/// Every size of a FLUX transformer, its family and its layout. All but the rotary numbers are read off the tensors.
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
    /// Width of the MLP's hidden layer after the activation, in both block kinds.
    pub mlp_size: usize,
    /// Width of the text tokens: of T5's hidden states in FLUX.1.
    pub context_in_dim: usize,
    /// Width of the pooled text (CLIP's in FLUX.1); 0 for a model that takes none.
    pub vec_in_dim: usize,
    /// Whether the model was distilled with a guidance embedding (dev) or not (schnell).
    pub guidance_embed: bool,
    /// Rotary sizes of the position axes (three in FLUX.1); they sum to the head size.
    pub axes_dims: Vec<usize>,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Biases, modulation, activation.
    pub family: Family,
    /// The blocks in network order.
    pub layout: Vec<BlockSpec>,
}

impl FluxConfig {
    /// Size of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Columns that the first projection of an MLP puts out: more than [`mlp_size`](Self::mlp_size) if the activation
    /// takes halves.
    pub fn mlp_in_size(&self) -> usize {
        match self.family.activation {
            Activation::Gelu => self.mlp_size,
            Activation::SwiGlu => 2 * self.mlp_size,
        }
    }

    /// Whether all blocks of a kind share their modulation.
    pub fn shares_modulation(&self) -> bool {
        self.family.modulation == ModulationSource::Shared
    }

    /// Each layout entry with the tensor-name prefix of its slot, `None` if it has no tensors.
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

    /// The same model before any block was replaced.
    #[must_use]
    pub fn unpruned(&self) -> Self {
        let [double, single] =
            [BlockKind::Double, BlockKind::Single].map(|k| self.original_blocks(k));
        Self {
            layout: super::unpruned(double, single),
            ..self.clone()
        }
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
