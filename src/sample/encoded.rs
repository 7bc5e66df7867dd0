//! What images are drawn from: prompts as the transformer sees them, and reference images. `text` and `vae` encode them.

use anyhow::Result;
use candle::{DType, Device, Tensor};

/// Prompts as the transformer sees them.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Hidden states of the text encoder, (prompts, text tokens, width).
    pub txt: Tensor,
    /// Pooled text, (prompts, width); (prompts, 0) in a family that has none.
    pub vec: Tensor,
    /// The negative prompt, for models that are guided by one.
    pub negative: Option<NegativePrompt>,
    /// Reference images of each prompt.
    pub references: Option<References>,
}

/// What images are to be unlike, as the transformer sees it.
#[derive(Clone, Debug)]
pub struct NegativePrompt {
    /// Hidden states of the text encoder, (1, text tokens, width).
    pub txt: Tensor,
    /// Pooled text, (1, width); (1, 0) in a family that has none.
    pub vec: Tensor,
}

/// Reference images of prompts, of the same sizes for all of them.
#[derive(Clone, Debug)]
pub struct References {
    /// Packed latents of a prompt's images one after another, (prompts, tokens, channels), f32; (1, tokens, channels) if
    /// all prompts have the same.
    pub tokens: Tensor,
    /// Their positions, (tokens, axes), on the CPU.
    pub ids: Tensor,
}

/// A tensor on `device` as `dtype`; one without numbers, such as the pooled text of a family that has none, stays on the
/// CPU, as GPUs have no memory of no bytes.
///
/// # Errors
/// When memory is short there.
pub fn placed(t: &Tensor, device: &Device, dtype: DType) -> candle::Result<Tensor> {
    if t.elem_count() == 0 {
        return t.to_dtype(dtype);
    }
    t.to_device(device)?.to_dtype(dtype)
}

impl References {
    /// The tokens for `prompts` of them, (prompts, tokens, channels).
    ///
    /// # Errors
    /// When there are others.
    pub fn tokens_of(&self, prompts: usize) -> candle::Result<Tensor> {
        let (_, tokens, channels) = self.tokens.dims3()?;
        let all = self.tokens.broadcast_as((prompts, tokens, channels))?;
        all.contiguous()
    }
}

impl Encoded {
    /// Prompts without a negative prompt and reference images.
    pub fn new(txt: Tensor, vec: Tensor) -> Self {
        Self {
            txt,
            vec,
            negative: None,
            references: None,
        }
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.vec.dim(0).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Text tokens and tokens of reference images: all that a forward takes in addition to the image itself.
    pub fn tokens(&self) -> usize {
        let references = self.references.as_ref();
        let references = references.and_then(|r| r.tokens.dim(1).ok());
        self.txt.dim(1).unwrap_or(0) + references.unwrap_or(0)
    }

    /// The prompts of a range.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn range(&self, range: std::ops::Range<usize>) -> Result<Self> {
        self.each(|t| t.narrow(0, range.start, range.len())?.contiguous())
    }

    /// The prompts of these numbers, in their order.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn select(&self, numbers: &[u32]) -> Result<Self> {
        let numbers = Tensor::new(numbers, &Device::Cpu)?;
        self.each(|t| t.index_select(&numbers.to_device(t.device())?, 0))
    }

    /// The same on another device.
    ///
    /// # Errors
    /// When memory is short there.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut out = self.each(|t| placed(t, device, t.dtype()))?;
        let negative = self.negative.as_ref().map(|negative| {
            anyhow::Ok(NegativePrompt {
                txt: negative.txt.to_device(device)?,
                vec: placed(&negative.vec, device, negative.vec.dtype())?,
            })
        });
        out.negative = negative.transpose()?;
        Ok(out)
    }

    /// With another tensor in the place of each that has a row for every prompt.
    fn each(&self, f: impl Fn(&Tensor) -> candle::Result<Tensor>) -> Result<Self> {
        let references = self.references.as_ref().map(|r| {
            anyhow::Ok(References {
                tokens: match r.tokens.dim(0)? {
                    1 => r.tokens.clone(),
                    _ => f(&r.tokens)?,
                },
                ids: r.ids.clone(),
            })
        });
        Ok(Self {
            txt: f(&self.txt)?,
            vec: f(&self.vec)?,
            negative: self.negative.clone(),
            references: references.transpose()?,
        })
    }
}
