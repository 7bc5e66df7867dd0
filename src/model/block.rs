//! One entry of the trunk, whatever its kind.

use std::{fmt, sync::Arc};

use candle::{DType, Result};
use candle_nn::VarBuilder;

use super::double::DoubleBlock;
use super::linear::{Linear, Lora};
use super::modulation::{BlockModulation, FIRST_OF_IMG, FIRST_OF_TXT, Modulation, OF_SINGLE};
use super::output_projection::OutputProjection;
use super::replacement::ReplacementBlock;
use super::single::SingleBlock;
use super::stream::{Conditioning, Stream};
use crate::layout::{BlockKind, BlockSpec, FluxConfig};

/// The largest number of float16.
const F16_MAX: f64 = 65_504.0;

/// The loaded weights of one [`BlockSpec`]. Clones share the tensors.
#[derive(Clone, Debug)]
pub enum Block {
    /// Text and image tokens with weights of their own.
    Double(Box<DoubleBlock>),
    /// All tokens with the same weights.
    Single(Box<SingleBlock>),
    /// What stands in for removed blocks.
    Replacement(Box<ReplacementBlock>),
    /// Read from where its weights are whenever it is run.
    Offloaded(Box<Offloaded>),
}

/// A block whose weights are not on the device, and the LoRA next to them, which is.
#[derive(Clone)]
pub struct Offloaded {
    config: Arc<FluxConfig>,
    spec: BlockSpec,
    vb: VarBuilder<'static>,
    lora: Vec<(&'static str, Lora)>,
    /// Projections that have taken the place of those that are read, wherever their tensors are.
    exchanged: Vec<(&'static str, Linear)>,
}

impl fmt::Debug for Offloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Offloaded").field(&self.spec).finish()
    }
}

impl From<ReplacementBlock> for Block {
    fn from(block: ReplacementBlock) -> Self {
        Self::Replacement(Box::new(block))
    }
}

impl Block {
    /// Reads the block of `spec`, whose tensors are below `vb`.
    pub fn new(config: &FluxConfig, spec: &BlockSpec, vb: &VarBuilder) -> Result<Self> {
        Ok(match spec {
            BlockSpec::Original(id) => match id.kind {
                BlockKind::Double => Self::Double(Box::new(DoubleBlock::new(config, vb)?)),
                BlockKind::Single => Self::Single(Box::new(SingleBlock::new(config, vb)?)),
            },
            BlockSpec::Replaced(replacement) => {
                Self::Replacement(Box::new(ReplacementBlock::new(config, replacement, vb)?))
            }
        })
    }

    /// A block that is read below `vb` whenever it is run.
    pub fn offloaded(config: &Arc<FluxConfig>, spec: &BlockSpec, vb: &VarBuilder<'static>) -> Self {
        Self::Offloaded(Box::new(Offloaded {
            config: config.clone(),
            spec: spec.clone(),
            vb: vb.clone(),
            lora: Vec::new(),
            exchanged: Vec::new(),
        }))
    }

    /// Whether its weights are read whenever it is run.
    pub fn is_offloaded(&self) -> bool {
        matches!(self, Self::Offloaded(_))
    }

    /// The block with its weights on the device.
    pub fn resident(&self) -> Result<Self> {
        let Self::Offloaded(offloaded) = self else {
            return Ok(self.clone());
        };
        let mut block = Self::new(&offloaded.config, &offloaded.spec, &offloaded.vb)?;
        for (name, linear) in block.linears_mut() {
            if let Some((_, other)) = offloaded.exchanged.iter().find(|(other, _)| *other == name) {
                *linear = other.to_device(offloaded.vb.device())?;
            }
            if let Some((_, lora)) = offloaded.lora.iter().find(|(other, _)| *other == name) {
                linear.set_lora(Some(lora.clone()))?;
            }
        }
        Ok(block)
    }

    /// [`resident`](Self::resident), for another thread to run: candle gives every thread a CUDA stream of its own, so the
    /// copies that this one has started must have ended.
    pub(super) fn load_on_thread(&self) -> Result<Self> {
        let block = self.resident()?;
        self.synchronize()?;
        Ok(block)
    }

    /// Waits until all that this thread has started on an offloaded block's device is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        match self {
            Self::Offloaded(offloaded) => offloaded.vb.device().synchronize(),
            _ => Ok(()),
        }
    }

    /// Puts `linear` in the place of the projection `name`. An offloaded block keeps it where its tensors are, so that they
    /// may wait on the host, and brings it to the device with the rest.
    ///
    /// Fails if there is no projection of that name.
    pub fn exchange(&mut self, name: &'static str, linear: Linear) -> Result<()> {
        if let Self::Offloaded(offloaded) = self {
            offloaded.exchanged.retain(|(other, _)| *other != name);
            offloaded.exchanged.push((name, linear));
            return Ok(());
        }
        let mut linears = self.linears_mut().into_iter();
        match linears.find(|(other, _)| *other == name) {
            Some((_, place)) => *place = linear,
            None => candle::bail!("there is no projection `{name}`"),
        }
        Ok(())
    }

    /// This offloaded block with the LoRA of `resident`; a block that is not offloaded is `resident` itself.
    #[must_use]
    pub fn with_lora_of(&self, mut resident: Self) -> Self {
        let Self::Offloaded(offloaded) = self else {
            return resident;
        };
        let mut offloaded = offloaded.clone();
        let linears = resident.linears_mut();
        offloaded.lora = linears
            .into_iter()
            .filter_map(|(name, linear)| Some((name, linear.lora()?.clone())))
            .collect();
        Self::Offloaded(offloaded)
    }

    /// Whether a LoRA is attached to one of its projections.
    pub fn has_lora(&self) -> bool {
        match self {
            Self::Offloaded(offloaded) => !offloaded.lora.is_empty(),
            _ => {
                let mut block = self.clone();
                let linears = block.linears_mut();
                linears.iter().any(|(_, linear)| linear.lora().is_some())
            }
        }
    }

    /// The same block outside of any gradient graph, sharing the storage of its tensors.
    #[must_use]
    pub fn detached(&self) -> Self {
        let mut block = self.clone();
        if let Self::Offloaded(offloaded) = &mut block {
            for (_, lora) in &mut offloaded.lora {
                *lora = lora.detached();
            }
        }
        for (_, linear) in block.linears_mut() {
            *linear = linear.detached();
        }
        block
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Stream> {
        let out = match self {
            Self::Offloaded(_) => return self.resident()?.forward(stream, conditioning),
            Self::Double(block) => block.forward(stream, conditioning)?,
            Self::Single(block) => block.forward(stream, conditioning)?,
            Self::Replacement(block) => block.forward(stream, conditioning)?,
        };
        if out.tokens.dtype() != DType::F16 {
            return Ok(out);
        }
        // as diffusers does with float16 streams: https://github.com/huggingface/diffusers/blob/v0.35.1/src/diffusers/models/transformers/transformer_flux.py#L401-L402
        let tokens = out.tokens.clamp(-F16_MAX, F16_MAX)?;
        Ok(out.with_tokens(tokens))
    }

    /// Shift, scale and gate of the block's first branch, for its text and its image tokens, as a modulated
    /// replacement keeps them; `None` for replacements.
    pub fn modulations(&self) -> Result<Option<[BlockModulation<3>; 2]>> {
        let (modulations, shared) = match self {
            Self::Double(block) => (block.modulations(), [FIRST_OF_TXT, FIRST_OF_IMG]),
            Self::Single(block) => (block.modulations(), [OF_SINGLE; 2]),
            Self::Replacement(_) => return Ok(None),
            Self::Offloaded(_) => return self.resident()?.modulations(),
        };
        let Some([txt, img]) = modulations else {
            return Ok(Some(shared.map(BlockModulation::Shared)));
        };
        // the first three parts of three (single) or six (double)
        let first = |lin: &Linear| -> Result<BlockModulation<3>> {
            let rows = 3 * lin.shape()?.1;
            let weight = lin.weight()?.narrow(0, 0, rows)?;
            let bias = lin.bias().map(|b| b.narrow(0, 0, rows)).transpose()?;
            Ok(BlockModulation::Own(Modulation {
                lin: Linear::new(weight, bias)?,
            }))
        };
        Ok(Some([first(txt)?, first(img)?]))
    }

    /// The last step of a kept block: one for all tokens (single), or text first, then image (double); none for
    /// replacements.
    pub fn output_projections(
        &self,
        stream: &Stream,
        conditioning: &Conditioning,
    ) -> Result<Vec<OutputProjection>> {
        Ok(match self {
            Self::Double(block) => block.output_projections(stream, conditioning)?.into(),
            Self::Single(block) => vec![block.output_projection(stream, conditioning)?],
            Self::Replacement(_) => vec![],
            Self::Offloaded(_) => return self.resident()?.output_projections(stream, conditioning),
        })
    }

    /// What [`Self::forward`] of a stream like `stream` gives, from what [`Self::output_projections`] did, whatever the
    /// projections are now.
    pub fn project(&self, stream: &Stream, projections: &[OutputProjection]) -> Result<Stream> {
        let tokens = match (self, projections) {
            (Self::Double(block), [txt, img]) => block.project(txt, img)?,
            (Self::Single(block), [last]) => block.project(last)?,
            _ => candle::bail!("these are not the output projections of this block"),
        };
        Ok(stream.with_tokens(tokens))
    }

    /// Every projection with its canonical name below the block (`img_attn.qkv`, `linear1`, `linear.img`): the one
    /// place to attach LoRA, merge or count. None for an offloaded block: make it [`resident`](Self::resident) first.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        match self {
            Self::Double(block) => block.linears_mut(),
            Self::Single(block) => block.linears_mut(),
            Self::Replacement(block) => block.linears_mut(),
            Self::Offloaded(_) => vec![],
        }
    }
}

#[cfg(test)]
mod tests;
