//! Distances between two images or latents, and what many of them amount to. `detect` reads scenes.

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::sample::png::Image;

/// What equal images count as, in dB; no two 8-bit images of less than 10 megapixels that differ get this far.
pub const EQUAL: f64 = 120.0;

/// Mean squared difference of 8-bit values.
fn mean_square(a: &Image, b: &Image) -> Result<f64> {
    same_size(a, b)?;
    let sum: u64 = a
        .rgb
        .iter()
        .zip(&b.rgb)
        .map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2))
        .sum();
    Ok(sum as f64 / a.rgb.len() as f64)
}

fn same_size(a: &Image, b: &Image) -> Result<()> {
    ensure!(
        (a.width, a.height) == (b.width, b.height) && !a.rgb.is_empty(),
        "cannot compare an image of {}×{} with one of {}×{}",
        a.width,
        a.height,
        b.width,
        b.height
    );
    Ok(())
}

/// Peak signal-to-noise ratio in dB; [`EQUAL`] for equal images.
///
/// # Errors
/// When the images differ in size or are empty.
pub fn psnr(a: &Image, b: &Image) -> Result<f64> {
    let error = mean_square(a, b)?;
    Ok((10.0 * (255.0 * 255.0 / error).log10()).min(EQUAL))
}

/// Deviation of the window of [`ssim`], in pixels.
const SIGMA: f64 = 1.5;
/// Pixels from its middle to its end.
const REACH: usize = 5;

/// Structural similarity: the mean over all places and the three channels, with a Gaussian window of 11×11 pixels
/// (Wang et al. 2004, DOI 10.1109/TIP.2003.819861). Windows that reach over the edge are left out, as in scikit-image.
///
/// # Errors
/// When the images differ in size, or a side is shorter than the window.
pub fn ssim(a: &Image, b: &Image) -> Result<f64> {
    same_size(a, b)?;
    let (w, h) = (a.width as usize, a.height as usize);
    ensure!(
        w.min(h) > 2 * REACH,
        "SSIM takes images of at least {0}×{0} pixels",
        2 * REACH + 1
    );
    let weights: Vec<f64> = (0..=2 * REACH)
        .map(|i| (-0.5 * ((i as f64 - REACH as f64) / SIGMA).powi(2)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let (c1, c2) = ((0.01f64 * 255.0).powi(2), (0.03f64 * 255.0).powi(2));
    let mut sum = 0.0;
    for channel in 0..3 {
        let values = |p: &Image| -> Vec<f64> {
            let pixels = p.rgb.as_chunks::<3>().0;
            pixels.iter().map(|p| f64::from(p[channel])).collect()
        };
        let (a, b) = (values(a), values(b));
        let times = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).collect::<Vec<_>>();
        let blurred = |x: &[f64]| blur(x, w, &weights);
        let (mean_a, mean_b) = (blurred(&a), blurred(&b));
        let (aa, bb) = (blurred(&times(&a, &a)), blurred(&times(&b, &b)));
        let ab = blurred(&times(&a, &b));
        for i in 0..mean_a.len() {
            let (ma, mb) = (mean_a[i], mean_b[i]);
            let (va, vb, cov) = (aa[i] - ma * ma, bb[i] - mb * mb, ab[i] - ma * mb);
            sum += (2.0 * ma * mb + c1) * (2.0 * cov + c2)
                / ((ma * ma + mb * mb + c1) * (va + vb + c2));
        }
    }
    Ok(sum / (3 * (w - 2 * REACH) * (h - 2 * REACH)) as f64)
}

/// Weighted means over all windows that lie inside, first along rows of `width`, then along columns.
fn blur(values: &[f64], width: usize, weights: &[f64]) -> Vec<f64> {
    let inner = width + 1 - weights.len();
    let mut rows = Vec::with_capacity(values.len());
    for row in values.chunks_exact(width) {
        let windows = row.windows(weights.len());
        rows.extend(
            windows.map(|window| window.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>()),
        );
    }
    let last = rows.len() - (weights.len() - 1) * inner;
    (0..last)
        .map(|i| {
            let column = rows[i..].iter().step_by(inner);
            column.zip(weights).map(|(v, w)| v * w).sum()
        })
        .collect()
}

/// What many numbers amount to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many there are.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation of the sample.
    pub deviation: f64,
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Summary {
    /// Of these numbers; all zero if there are none.
    pub fn from_values(values: &[f64]) -> Self {
        let count = values.len();
        if count == 0 {
            return Self::default();
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let spread: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self {
            count,
            mean,
            deviation: (spread / count.saturating_sub(1).max(1) as f64).sqrt(),
            median: f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]),
            least: sorted[0],
            most: sorted[count - 1],
        }
    }
}

/// A share of successes with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Successes.
    pub successes: usize,
    /// Attempts.
    pub attempts: usize,
    /// Successes by attempts.
    pub share: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    /// `successes` in `attempts`, with Wilson's score interval, which stays sound near 0 and 1
    /// (Wilson 1927, DOI 10.1080/01621459.1927.10502953).
    pub fn wilson(successes: usize, attempts: usize) -> Self {
        const Z: f64 = 1.959_963_984_540_054;
        let n = attempts.max(1) as f64;
        let share = successes as f64 / n;
        let scale = 1.0 + Z * Z / n;
        let middle = (share + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        Self {
            successes,
            attempts,
            share,
            low: if successes == 0 { 0.0 } else { middle - half },
            high: if successes >= attempts {
                1.0
            } else {
                middle + half
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sample::image;

    fn golden() -> Vec<Image> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/scenes.png");
        let all = image::read(&path).unwrap();
        let side = all.width;
        let parts = all.rgb.chunks_exact(3 * (side * side) as usize);
        let image = |rgb: &[u8]| Image {
            width: side,
            height: side,
            rgb: rgb.to_vec(),
        };
        parts.map(image).collect()
    }

    #[test]
    #[expect(clippy::unreadable_literal, reason = "as they were printed")]
    fn psnr_and_ssim_are_those_of_scikit_image() {
        // scikit-image 0.26.0: peak_signal_noise_ratio(a, b, data_range=255), structural_similarity(a, b,
        // gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)
        let recorded = [
            (0, 1, 11.170033212421156, 0.5026200044172752),
            (2, 10, 6.743904557915624, 0.42440975669897885),
            (22, 26, 23.93081880388561, 0.9050418562166461),
            (25, 29, 32.77335568441413, 0.9612005923363084),
        ];
        let images = golden();
        for (i, j, their_psnr, their_ssim) in recorded {
            let (a, b) = (&images[i], &images[j]);
            let (psnr, ssim) = (psnr(a, b).unwrap(), ssim(a, b).unwrap());
            assert!((psnr - their_psnr).abs() < 1e-9, "{i} {j}: {psnr}");
            assert!((ssim - their_ssim).abs() < 1e-9, "{i} {j}: {ssim}");
        }
    }

    #[test]
    fn equal_images_are_as_near_as_can_be() {
        let image = &golden()[0];
        assert!((psnr(image, image).unwrap() - EQUAL).abs() < 1e-12);
        assert!((ssim(image, image).unwrap() - 1.0).abs() < 1e-12);
        let small = Image {
            width: 10,
            height: 64,
            rgb: vec![0; 3 * 640],
        };
        assert!(ssim(&small, &small).is_err());
        assert!(psnr(&small, image).is_err());
    }

    #[test]
    fn an_oblong_image_is_compared_along_the_right_axes() {
        // a step along x alone: turned by a quarter it must give the same number
        let image = |width: u32, height: u32, at: &dyn Fn(u32, u32) -> u8| Image {
            width,
            height,
            rgb: (0..height)
                .flat_map(|y| (0..width).flat_map(move |x| [at(x, y); 3]))
                .collect(),
        };
        let (a, b) = (
            image(30, 17, &|x, _| if x < 11 { 0 } else { 200 }),
            image(30, 17, &|x, _| if x < 14 { 0 } else { 180 }),
        );
        let (c, d) = (
            image(17, 30, &|_, y| if y < 11 { 0 } else { 200 }),
            image(17, 30, &|_, y| if y < 14 { 0 } else { 180 }),
        );
        let (along, across) = (ssim(&a, &b).unwrap(), ssim(&c, &d).unwrap());
        assert!((along - across).abs() < 1e-12 && along < 0.95);
    }

    #[test]
    fn summaries_and_intervals() {
        let s = Summary::from_values(&[4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.count, s.least, s.most), (4, 1.0, 4.0));
        assert!((s.mean - 2.5).abs() < 1e-12 && (s.median - 2.5).abs() < 1e-12);
        assert!((s.deviation - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Summary::from_values(&[]), Summary::default());
        // computed by hand from Wilson's formula
        let share = Share::wilson(62, 64);
        assert!((share.low - 0.893_027_082_290_416_9).abs() < 1e-12);
        assert!((share.high - 0.991_387_861_653_827_8).abs() < 1e-12);
        let none = Share::wilson(0, 10);
        assert!(none.low == 0.0 && (none.high - 0.277_532_799_862_889_15).abs() < 1e-12);
        let all = Share::wilson(10, 10);
        assert!(all.high >= 1.0 && (all.low - (1.0 - none.high)).abs() < 1e-12);
    }
}
