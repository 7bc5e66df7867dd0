//! Images as CLIP's vision model is given them: Pillow's bicubic scaling to the bit, the middle cut out, normalised.
//!
//! Sources: Pillow `src/libImaging/Resample.c`; transformers `CLIPImageProcessorPil`.

use anyhow::{Result, ensure};
use candle::{Device, Tensor};
use serde::Deserialize;

use crate::sample::png::Image;

/// Binary places of the weights in Pillow's sums of 8-bit values.
const PLACES: u32 = 32 - 8 - 2;
/// Pixels on either side that a bicubic weight reaches at the same size.
const SUPPORT: f64 = 2.0;

/// `preprocessor_config.json`, as far as it differs between models.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct Preparation {
    image_mean: [f64; 3],
    image_std: [f64; 3],
}

impl Default for Preparation {
    /// OpenAI's.
    fn default() -> Self {
        Self {
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        }
    }
}

impl Preparation {
    /// (3, side, side) on the CPU: the shorter side scaled to `side`, the middle of the longer one.
    pub(super) fn pixels(&self, image: &Image, side: usize) -> Result<Tensor> {
        let (width, height) = (image.width as usize, image.height as usize);
        ensure!(width * height > 0, "an empty image");
        let scaled = |long: usize, short: usize| side * long / short;
        let (new_width, new_height) = if width <= height {
            (side, scaled(height, width))
        } else {
            (scaled(width, height), side)
        };
        let rgb = scale_across(&image.rgb, width, new_width);
        let rgb = scale_down(&rgb, new_width, height, new_height);
        let (left, top) = ((new_width - side) / 2, (new_height - side) / 2);
        let mut values = Vec::with_capacity(3 * side * side);
        for channel in 0..3 {
            let (mean, std) = (
                self.image_mean[channel] as f32,
                self.image_std[channel] as f32,
            );
            for y in top..top + side {
                for x in left..left + side {
                    let value = f32::from(rgb[(y * new_width + x) * 3 + channel]) / 255.0;
                    values.push((value - mean) / std);
                }
            }
        }
        Ok(Tensor::from_vec(values, (3, side, side), &Device::Cpu)?)
    }
}

/// What one pixel of the result is made of: the first of the old ones, and their weights.
struct Taps {
    first: usize,
    weights: Vec<i64>,
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn taps(old: usize, new: usize) -> Vec<Taps> {
    let scale = old as f64 / new as f64;
    let spread = scale.max(1.0);
    let support = SUPPORT * spread;
    let of = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(old);
        let weights = (first..end).map(|x| bicubic((x as f64 - centre + 0.5) / spread));
        let weights: Vec<f64> = weights.collect();
        let sum: f64 = weights.iter().sum();
        let whole = |w: &f64| {
            let w = w / sum * f64::from(1u32 << PLACES);
            (w + 0.5f64.copysign(w)) as i64
        };
        Taps {
            first,
            weights: weights.iter().map(whole).collect(),
        }
    };
    (0..new).map(of).collect()
}

/// A weighted sum of 8-bit values, `stride` apart.
fn weigh(values: &[u8], stride: usize, weights: &[i64]) -> u8 {
    let half = 1i64 << (PLACES - 1);
    let each = values.iter().step_by(stride).zip(weights);
    let sum: i64 = each.map(|(v, w)| i64::from(*v) * w).sum();
    ((sum + half) >> PLACES).clamp(0, 255) as u8
}

/// Rows of `old` pixels to rows of `new`.
fn scale_across(rgb: &[u8], old: usize, new: usize) -> Vec<u8> {
    if old == new {
        return rgb.to_vec();
    }
    let taps = taps(old, new);
    let mut out = Vec::with_capacity(rgb.len() / old * new);
    for row in rgb.chunks_exact(3 * old) {
        for tap in &taps {
            for channel in 0..3 {
                out.push(weigh(&row[3 * tap.first + channel..], 3, &tap.weights));
            }
        }
    }
    out
}

/// `old` rows of `width` pixels to `new` rows.
fn scale_down(rgb: &[u8], width: usize, old: usize, new: usize) -> Vec<u8> {
    if old == new {
        return rgb.to_vec();
    }
    let row = 3 * width;
    let mut out = Vec::with_capacity(row * new);
    for tap in taps(old, new) {
        for x in 0..row {
            out.push(weigh(&rgb[tap.first * row + x..], row, &tap.weights));
        }
    }
    out
}
