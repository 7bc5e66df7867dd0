//! Sizes of images, and what follows from them: tokens, and how many images one forward takes.

use anyhow::{Result, ensure};

use super::denoise::LatentSize;
use crate::layout::Family;

/// Smallest side of an image, in pixels: one image token is 2×2 latent pixels of 8×8 pixels each.
pub const MIN_SIDE: usize = 16;
/// Largest side, in pixels: beyond it the position ids of FLUX make no sense and attention outgrows any machine.
pub const MAX_SIDE: usize = 8192;
/// Tokens in one forward unless asked otherwise: small images go through the model several at a time.
pub const TOKENS_PER_FORWARD: usize = 1536;
/// Image tokens from which an image counts as large: it takes long to generate on small machines, so fewer are sampled.
pub const LARGE_TOKENS: usize = 1024;
/// Image tokens of all held-out noised latents unless asked otherwise, within bounds.
const HELD_OUT_TOKENS: usize = 131_072;

/// Size of an image in pixels, both multiples of [`ImageSize::STEP`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl ImageSize {
    /// Sides are multiples of this many pixels.
    pub const STEP: usize = MIN_SIDE;

    /// The size rounded down to whole image tokens.
    ///
    /// # Errors
    /// When a side is out of range; the message names the flag.
    pub fn rounded(width: usize, height: usize) -> Result<Self> {
        let round = |flag: &str, value: usize| -> Result<usize> {
            ensure!(
                (MIN_SIDE..=MAX_SIDE).contains(&value),
                "{flag} {value}: images are between {MIN_SIDE} and {MAX_SIDE} pixels wide and high"
            );
            Ok(value / Self::STEP * Self::STEP)
        };
        Ok(Self {
            width: round("--width", width)?,
            height: round("--height", height)?,
        })
    }

    /// The size of its latents in a family: an eighth of the pixels each way.
    pub fn latent(self, family: Family) -> LatentSize {
        LatentSize {
            height: self.height / 8,
            width: self.width / 8,
            family,
        }
    }

    /// Image tokens.
    pub fn tokens(self) -> usize {
        self.width / Self::STEP * (self.height / Self::STEP)
    }

    /// Whether it takes long to generate.
    pub fn is_large(self) -> bool {
        self.tokens() >= LARGE_TOKENS
    }

    /// Held-out noised latents to compare velocities on, unless asked otherwise.
    pub fn default_held_out(self) -> usize {
        (HELD_OUT_TOKENS / self.tokens()).clamp(16, 256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_rounded_down_and_counted_in_tokens() {
        let size = ImageSize::rounded(1030, 527).unwrap();
        assert_eq!((size.width, size.height), (1024, 512));
        assert_eq!((size.tokens(), size.is_large()), (2048, true));
        let small = ImageSize::rounded(64, 64).unwrap();
        assert_eq!((small.tokens(), small.is_large()), (16, false));
        assert_eq!(
            (small.default_held_out(), size.default_held_out()),
            (256, 64)
        );
        for bad in [0, 15, 8193] {
            let error = ImageSize::rounded(64, bad).unwrap_err().to_string();
            assert!(error.contains("--height"), "{error}");
        }
    }
}
