//! The normal numbers that torch's CPU generator draws for a seed, so that a seed gives diffusers' image. The caller gives the shapes.
//!
//! Source: PyTorch `aten/src/ATen/core/DistributionsHelper.h` and `aten/src/ATen/native/cpu/DistributionTemplates.h`.

use candle::{Device, Result, Shape, Tensor};
use rand_mt::Mt;

/// Values that torch turns into normal ones together: 8 radii and 8 angles.
const BLOCK: usize = 16;

/// `torch.Generator("cpu").manual_seed(seed)`.
#[derive(Debug)]
pub struct Generator {
    engine: Mt,
    /// Second number of the last pair; only draws of fewer than 16 numbers leave and take one.
    cached: Option<f64>,
}

impl Generator {
    /// Seeds the generator. torch keeps 64 bits of a seed but gives its Mersenne Twister the lower 32.
    pub fn new(seed: u64) -> Self {
        Self {
            engine: Mt::new(seed as u32),
            cached: None,
        }
    }

    /// `torch.randn(shape, generator=…)`: float32 on the device.
    pub fn randn(&mut self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        Tensor::from_vec(self.normal(shape.elem_count()), shape, device)
    }

    /// The next `n` numbers of N(0, 1), as one call of `torch.randn` draws them.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.one() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        let (whole, tail) = values.as_chunks_mut::<BLOCK>();
        whole.iter_mut().for_each(box_muller);
        if !tail.is_empty() {
            // torch draws the last 16 numbers again, over some that it had finished
            let mut last = [0f32; BLOCK];
            last.fill_with(|| self.uniform());
            box_muller(&mut last);
            values[n - BLOCK..].copy_from_slice(&last);
        }
        values
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.engine.next_u32() & 0x00ff_ffff) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1) with 53 bits.
    fn uniform_double(&mut self) -> f64 {
        let high = u64::from(self.engine.next_u32());
        let low = u64::from(self.engine.next_u32());
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    fn one(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value;
        }
        let angle = 2.0 * std::f64::consts::PI * self.uniform_double();
        let radius = (-2.0 * (-self.uniform_double()).ln_1p()).sqrt();
        self.cached = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

fn box_muller(block: &mut [f32; BLOCK]) {
    for j in 0..BLOCK / 2 {
        let (radius, angle) = (block[j], block[j + BLOCK / 2]);
        let radius = (-2.0 * (1.0 - radius).ln()).sqrt();
        let angle = 2.0 * std::f32::consts::PI * angle;
        block[j] = radius * angle.cos();
        block[j + BLOCK / 2] = radius * angle.sin();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest distance from what `torch.randn(len, generator=…)` printed.
    fn off(drawn: &[f32], torch: &[f64]) -> f64 {
        assert_eq!(drawn.len(), torch.len());
        drawn
            .iter()
            .zip(torch)
            .map(|(a, b)| (f64::from(*a) - b).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn few_numbers_come_in_pairs_of_doubles() {
        // seed 7: three, two, seventeen and one number; the one left over of the first three comes first in the second draw
        let mut generator = Generator::new(7);
        let torch = [
            -0.146_795_094_013_214_1,
            0.786_141_276_359_558_1,
            0.946_821_630_001_068_1,
        ];
        assert!(off(&generator.normal(3), &torch) <= 0.0);
        let torch = [-1.114_344_000_816_345_2, 1.690_790_176_391_601_6];
        assert!(off(&generator.normal(2), &torch) <= 0.0);
        let seventeen = [
            0.609_473_466_873_169_1,
            0.087_478_376_924_991_61,
            -1.384_961_366_653_442_4,
            0.503_563_880_920_410_2,
            -0.083_528_228_104_114_53,
            -0.023_477_932_438_254_356,
            0.174_375_355_243_682_86,
            2.298_342_704_772_949,
            0.957_102_179_527_282_7,
            0.482_354_164_123_535_16,
            1.398_918_390_274_047_9,
            1.405_852_913_856_506_3,
            -1.401_250_839_233_398_4,
            1.297_335_863_113_403_3,
            1.640_933_275_222_778_3,
            -1.056_684_136_390_686,
            -0.261_586_725_711_822_5,
        ];
        assert!(off(&generator.normal(17), &seventeen) <= 1e-6);
        assert!(off(&generator.normal(1), &[-0.894_827_902_317_047_1]) <= 0.0);
    }

    #[test]
    fn sixteen_numbers_are_one_block() {
        let torch = [
            1.926_915_287_971_496_6,
            1.487_284_064_292_907_7,
            0.900_717_198_848_724_4,
            -2.105_520_963_668_823_2,
            0.678_418_457_508_087_2,
            -1.234_544_873_237_609_9,
            -0.043_067_477_643_489_84,
            -1.604_666_948_318_481_4,
            -0.752_135_276_794_433_6,
            1.648_723_006_248_474_1,
            -0.392_478_644_847_869_9,
            -1.403_607_130_050_659_2,
            -0.727_881_312_370_300_3,
            -0.559_430_181_980_133_1,
            -0.768_838_882_446_289_1,
            0.762_445_390_224_456_8,
        ];
        assert!(off(&Generator::new(42).normal(16), &torch) <= 1e-6);
    }

    #[test]
    fn a_long_seed_keeps_its_lower_half() {
        let torch = [-0.486_780_762_672_424_3, -0.603_821_575_641_632_1];
        assert!(off(&Generator::new((1 << 40) + 5).normal(2), &torch) <= 0.0);
    }

    #[test]
    fn a_large_draw_is_standard_normal() {
        let values = Generator::new(3).normal(100_003);
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(
            mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03,
            "{mean} {variance}"
        );
    }

    #[test]
    fn a_tensor_is_filled_in_row_major_order() -> Result<()> {
        let tensor = Generator::new(5).randn((2, 3, 4), &Device::Cpu)?;
        assert_eq!(
            tensor.flatten_all()?.to_vec1::<f32>()?,
            Generator::new(5).normal(24)
        );
        Ok(())
    }
}
