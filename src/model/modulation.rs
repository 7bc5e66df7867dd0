//! Shift, scale and gate: a projection of silu(vec), cut into equal parts, in each block or shared by all.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::ops;
use super::stream::{Conditioning, SharedParts};
use crate::layout::{FluxConfig, ModulationSource};

/// A modulation projection, `lin(silu(vec))` cut into N parts ([BFL `Modulation`][forward], diffusers
/// `AdaLayerNormZero.linear`).
///
/// [forward]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L120-L126
#[derive(Clone, Debug)]
pub struct Modulation<const N: usize> {
    /// hidden → N · hidden
    pub lin: Linear,
}

impl<const N: usize> Modulation<N> {
    /// Reads the projection of a model `hidden` wide, with or without a bias.
    pub fn new(hidden: usize, bias: bool, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            lin: Linear::load(hidden, N * hidden, bias, vb)?,
        })
    }

    /// The N parts, each a view (batch, hidden), in the order they are stored: shift, scale, gate, shift, scale, gate.
    pub fn forward(&self, conditioning: &Conditioning) -> Result<[Tensor; N]> {
        self.parts(conditioning.activated())
    }

    /// The N parts, each a view (batch, hidden), from `activated` = silu(vec), (batch, hidden).
    fn parts(&self, activated: &Tensor) -> Result<[Tensor; N]> {
        let all = self.lin.forward(activated)?;
        let width = all.dim(1)? / N;
        let parts = (0..N).map(|i| ops::narrow(&all, 1, i * width, width));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        parts.try_into().map_err(|parts: Vec<Tensor>| {
            candle::Error::Msg(format!(
                "a modulation of {} parts instead of {N}",
                parts.len()
            ))
        })
    }
}

/// The modulation projections of a model whose blocks share them ([diffusers `Flux2Modulation`][shared]; tensors
/// `double_stream_modulation_img.lin`, `double_stream_modulation_txt.lin`, `single_stream_modulation.lin`).
///
/// [shared]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_flux2.py#L1036-L1057
#[derive(Clone, Debug)]
pub(super) struct SharedModulation {
    img: Modulation<6>,
    txt: Modulation<6>,
    single: Modulation<3>,
}

impl SharedModulation {
    /// Reads the projections below `vb`; `None` if each block has its own.
    pub(super) fn load(config: &FluxConfig, vb: &VarBuilder) -> Result<Option<Self>> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        let vb = |name: &str| vb.pp(name).pp("lin");
        match config.family.modulation {
            ModulationSource::PerBlock => Ok(None),
            ModulationSource::Shared => Ok(Some(Self {
                img: Modulation::new(hidden, biases, &vb("double_stream_modulation_img"))?,
                txt: Modulation::new(hidden, biases, &vb("double_stream_modulation_txt"))?,
                single: Modulation::new(hidden, biases, &vb("single_stream_modulation"))?,
            })),
        }
    }

    /// The parts for one step, from silu(vec), (batch, hidden).
    pub(super) fn parts(&self, activated: &Tensor) -> Result<SharedParts> {
        Ok(SharedParts {
            img: self.img.parts(activated)?,
            txt: self.txt.parts(activated)?,
            single: self.single.parts(activated)?,
        })
    }
}

/// Where a block, or the layer in its place, takes its shift, scale and gate from.
#[derive(Clone, Debug)]
pub enum BlockModulation<const N: usize> {
    /// A projection of its own.
    Own(Modulation<N>),
    /// The parts that [`Conditioning`] holds for all blocks.
    Shared(SharedPart<N>),
}

/// Chooses a block's parts of those that all blocks share.
#[derive(Clone, Copy, Debug)]
pub struct SharedPart<const N: usize>(pub(super) fn(&SharedParts) -> &[Tensor; N]);

/// Shift, scale and gate of the first branch of a double block's image tokens and text tokens, and of a single block.
pub(super) const FIRST_OF_IMG: SharedPart<3> = SharedPart(|shared| first(&shared.img));
pub(super) const FIRST_OF_TXT: SharedPart<3> = SharedPart(|shared| first(&shared.txt));
pub(super) const OF_SINGLE: SharedPart<3> = SharedPart(|shared| &shared.single);

fn first(parts: &[Tensor; 6]) -> &[Tensor; 3] {
    parts
        .first_chunk()
        .expect("six parts have three first ones")
}

impl<const N: usize> BlockModulation<N> {
    /// Reads the projection below `vb` if blocks have their own; `shared` chooses the parts if not.
    pub(super) fn load(
        config: &FluxConfig,
        shared: fn(&SharedParts) -> &[Tensor; N],
        vb: &VarBuilder,
    ) -> Result<Self> {
        match config.family.modulation {
            ModulationSource::Shared => Ok(Self::Shared(SharedPart(shared))),
            ModulationSource::PerBlock => {
                Modulation::new(config.hidden_size, config.family.biases, vb).map(Self::Own)
            }
        }
    }

    /// The N parts, each (batch, hidden).
    pub fn forward(&self, conditioning: &Conditioning) -> Result<[Tensor; N]> {
        match self {
            Self::Own(modulation) => modulation.forward(conditioning),
            Self::Shared(part) => Ok((part.0)(conditioning.shared()?).clone()),
        }
    }

    /// The block's own projection, if it has one.
    pub fn linear(&self) -> Option<&Linear> {
        match self {
            Self::Own(modulation) => Some(&modulation.lin),
            Self::Shared(_) => None,
        }
    }

    /// The block's own projection, if it has one.
    pub(super) fn linear_mut(&mut self) -> Option<&mut Linear> {
        match self {
            Self::Own(modulation) => Some(&mut modulation.lin),
            Self::Shared(_) => None,
        }
    }
}
