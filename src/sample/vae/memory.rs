//! Memory that decoding takes, counted from the configuration alone. An upper estimate of what is alive at once.

use super::{VaeConfig, conv::MAX_UNFOLDED};

/// Bytes that decoding one image takes in addition to the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Of what is computed with.
    pub work: u64,
    /// Of what waits for its turn, if bands are kept; nothing when the image is decoded at once.
    pub offloaded: u64,
    /// Numbers, not bytes, of the largest feature map.
    pub largest: u64,
}

/// What one layer has at work, for each pixel of its input.
#[derive(Clone, Copy, Default)]
struct Work {
    /// Numbers in the number format of the image.
    maps: u64,
    /// Numbers in f32.
    wide: u64,
    /// Numbers that taps see, at most [`MAX_UNFOLDED`] at once.
    columns: u64,
    /// Numbers of the largest map.
    largest: u64,
}

impl VaeConfig {
    /// Number of parameters of the decoder, roughly: of its 3×3 convolutions.
    pub fn decoder_parameters(&self) -> u64 {
        let widest = self.decoder_channels().last().copied().unwrap_or(0) as u64;
        let mut sum = 4 * 9 * widest * widest + 4 * widest * widest;
        for level in self.decoder_levels() {
            let (input, output) = (level.input as u64, level.output as u64);
            let inner = 2 * self.layers_per_block as u64 + 2; // of `output` channels, the change of size included
            sum += 9 * output * (input + inner * output) + input * output;
        }
        sum
    }

    /// What decoding latents of `height`×`width` takes, at once or in bands of `rows` rows of them, in numbers of
    /// `element` bytes; `unfolded` if convolutions write what their taps see, nine times their input, a strip of
    /// rows at a time, and norms are composed in f32.
    pub fn decode_memory(
        &self,
        (height, width): (usize, usize),
        rows: Option<usize>,
        element: u64,
        unfolded: bool,
    ) -> MemoryEstimate {
        let band = rows.unwrap_or(height).min(height) as u64;
        let mut out = MemoryEstimate::default();
        let mut see = |pixels: u64, kept: u64, work: Work| {
            let all = pixels * height as u64 * width as u64 * element;
            out.offloaded = out.offloaded.max(all * kept);
            // a band has a row of its neighbours on either side
            let share = pixels * (band + 2).min(height as u64) * width as u64;
            let mut bytes = share * work.maps * element;
            if unfolded {
                bytes += share * work.wide * 4
                    + (share * work.columns).min(MAX_UNFOLDED as u64) * element;
            }
            // allocators keep some of what is freed: 3.3 GB were measured at 1024², of which 2.7 are alive
            out.work = out.work.max(bytes / 4 * 5);
            out.largest = out.largest.max(share * work.largest);
        };
        // strips, and what they are joined to
        let result = 1 + u64::from(unfolded);
        for (i, level) in self.decoder_levels().enumerate() {
            let (input, output) = (level.input as u64, level.output as u64);
            let pixels = 1 << (2 * i);
            let widest = Work {
                largest: input.max(output),
                ..Work::default()
            };
            // input, what is normed, output, and on the way back to the input what is added
            let first = Work {
                maps: 2 * input + result * output,
                columns: 9 * input,
                ..widest
            };
            let second = Work {
                maps: input + (2 + result) * output,
                columns: 9 * output,
                ..widest
            };
            see(pixels, input + output, first);
            see(pixels, input + output, second);
            if unfolded {
                for (maps, wide) in [(input, 2 * input), (input + output, 2 * output)] {
                    let norm = Work {
                        maps,
                        wide,
                        ..widest
                    };
                    see(pixels, input + output, norm);
                }
            }
            if level.doubles {
                let upsampled = u64::from(unfolded);
                let turn = Work {
                    maps: (1 + 4 * (upsampled + result)) * output,
                    columns: 4 * 9 * output,
                    largest: 4 * output,
                    ..widest
                };
                see(pixels, 5 * output, turn);
            }
        }
        if rows.is_none() {
            out.offloaded = 0;
        }
        out
    }

    fn decoder_levels(&self) -> impl Iterator<Item = DecoderLevel> + '_ {
        let channels = self.decoder_channels();
        let count = channels.len();
        let mut input = channels.last().copied().unwrap_or(0);
        let levels = channels.iter().rev().enumerate();
        levels.map(move |(i, &output)| {
            let level = DecoderLevel {
                input,
                output,
                doubles: i + 1 < count,
            };
            input = output;
            level
        })
    }
}

struct DecoderLevel {
    input: usize,
    output: usize,
    doubles: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flux() -> VaeConfig {
        VaeConfig {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            ..VaeConfig::default()
        }
    }

    #[test]
    fn bands_take_a_fraction_of_the_whole() {
        let config = flux();
        // 49.5 million parameters in the file of FLUX.1
        let parameters = config.decoder_parameters();
        assert!(
            (48_000_000..51_000_000).contains(&parameters),
            "{parameters}"
        );
        let of = |side, rows, unfolded| config.decode_memory((side, side), rows, 2, unfolded);
        let whole = of(128, None, true);
        assert_eq!(whole.offloaded, 0);
        // most of it a norm of 256 channels of every pixel, in f32
        assert!((3e9..3.6e9).contains(&(whole.work as f64)), "{whole:?}");
        assert_eq!(whole.largest, 256 << 20);
        let lean = of(128, None, false);
        assert!((1.3e9..2.0e9).contains(&(lean.work as f64)), "{lean:?}");
        let bands = of(128, Some(16), true);
        assert!(bands.work < whole.work / 5, "{bands:?}");
        assert!(bands.offloaded < whole.work / 4, "{bands:?}");
        assert!(bands.largest < whole.largest / 6, "{bands:?}");
        // four times the pixels, four times the memory
        assert_eq!(of(256, None, true).work, 4 * whole.work);
    }
}
