//! What is drawn for a comparison, and from what. `images.rs` draws.

use anyhow::Result;
use candle::Tensor;

use crate::sample::{denoise::LatentSize, encoded::Encoded};

/// What the whole pipeline made of a recorded prompt: packed latents from the recorded noise, and from a recorded seed.
pub(super) struct Drawn {
    pub(super) size: LatentSize,
    pub(super) latents: Tensor,
    pub(super) seeded: Option<Tensor>,
    pub(super) edited: Option<Tensor>,
}

/// A recorded prompt, and the same with a recorded reference image.
pub(super) struct Prompts {
    pub(super) plain: Encoded,
    pub(super) edited: Option<Encoded>,
}

/// Recorded latents as image tokens: they are, or are patches (b, channels, rows, columns).
pub(super) fn tokens(latents: &Tensor) -> Result<Tensor> {
    Ok(match latents.rank() {
        4 => latents.flatten_from(2)?.transpose(1, 2)?.contiguous()?,
        _ => latents.clone(),
    })
}
