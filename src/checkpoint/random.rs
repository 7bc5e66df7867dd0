//! Random numbers as the bytes of a tensor, any part of it at any time. What is random about a FLUX is in `init`.

use std::ops::Range;

use anyhow::{Result, bail};
use half::{bf16, f16};
use rand_mt::Mt;
use rayon::prelude::*;
use safetensors::Dtype;
use sha2::{Digest, Sha256};

/// How many values share a generator; parts of a tensor can be made from here on, and on several cores.
const CHUNK: usize = 1 << 16;

/// Independent normal numbers, in memory only while they are asked for.
#[derive(Clone, Debug)]
pub struct Random {
    key: [u32; 8],
    dtype: Dtype,
    mean: f32,
    std: f32,
}

impl Random {
    /// The numbers of the tensor `name` under a seed; the same on every machine. `std` 0 makes all of them `mean`.
    ///
    /// # Errors
    /// When `dtype` is not f32, f16 or bf16.
    pub fn new(seed: u64, name: &str, dtype: Dtype, mean: f32, std: f32) -> Result<Self> {
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            bail!("cannot make random tensors of dtype {dtype:?}: expected F32, F16 or BF16")
        }
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name);
        let digest: [u8; 32] = hash.finalize().into();
        let mut key = [0; 8];
        for (word, bytes) in key.iter_mut().zip(digest.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Ok(Self {
            key,
            dtype,
            mean,
            std,
        })
    }

    /// The number format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The bytes `range` of the tensor, in row-major order.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        match self.dtype {
            Dtype::F32 => self.encoded(range, f32::to_le_bytes),
            Dtype::F16 => self.encoded(range, |v| f16::from_f32(v).to_le_bytes()),
            _ => self.encoded(range, |v| bf16::from_f32(v).to_le_bytes()),
        }
    }

    fn encoded<const N: usize>(
        &self,
        range: Range<usize>,
        le: impl Fn(f32) -> [u8; N] + Sync,
    ) -> Vec<u8> {
        let first = range.start / (CHUNK * N);
        let skip = range.start - first * CHUNK * N;
        // whole values, from the start of the first chunk
        let mut bytes = vec![0; (range.len() + skip).next_multiple_of(N)];
        bytes
            .par_chunks_mut(CHUNK * N)
            .enumerate()
            .for_each(|(i, chunk)| {
                let mut normal = Normal::new(&self.key, first + i);
                for slot in chunk.as_chunks_mut::<N>().0 {
                    let value = if self.std == 0.0 {
                        self.mean
                    } else {
                        self.mean + self.std * normal.draw()
                    };
                    *slot = le(value);
                }
            });
        bytes.truncate(range.len() + skip);
        bytes.drain(..skip);
        bytes
    }
}

/// N(0, 1) by Box and Muller.
struct Normal {
    engine: Mt,
    second: Option<f32>,
}

impl Normal {
    fn new(key: &[u32; 8], chunk: usize) -> Self {
        let key = key
            .iter()
            .copied()
            .chain([chunk as u32, (chunk >> 32) as u32]);
        Self {
            engine: Mt::new_with_key(key),
            second: None,
        }
    }

    /// Uniform in (0, 1].
    fn uniform(&mut self) -> f32 {
        ((self.engine.next_u32() >> 8) + 1) as f32 / (1u32 << 24) as f32
    }

    fn draw(&mut self) -> f32 {
        if let Some(second) = self.second.take() {
            return second;
        }
        let radius = (-2.0 * libm::logf(self.uniform())).sqrt();
        let (sin, cos) = libm::sincosf(std::f32::consts::TAU * self.uniform());
        self.second = Some(radius * sin);
        radius * cos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64, name: &str, dtype: Dtype) -> Random {
        Random::new(seed, name, dtype, 0.0, 2.0).unwrap()
    }

    #[test]
    fn any_part_is_the_same_as_in_the_whole() {
        let n = 3 * CHUNK + 11;
        for (dtype, size) in [(Dtype::F32, 4), (Dtype::BF16, 2), (Dtype::F16, 2)] {
            let random = random(7, "a", dtype);
            let whole = random.bytes(0..n * size);
            assert_eq!(whole.len(), n * size);
            for range in [
                0..size,
                5 * size..8 * size,
                (CHUNK - 1) * size..(2 * CHUNK + 3) * size,
                (n - 1) * size..n * size,
                9 * size..9 * size,
            ] {
                assert_eq!(
                    random.bytes(range.clone()),
                    whole[range.clone()],
                    "{range:?}"
                );
            }
        }
    }

    #[test]
    fn seeds_and_names_give_other_numbers() {
        let bytes = |seed, name: &str| random(seed, name, Dtype::F32).bytes(0..64);
        assert_eq!(bytes(1, "a"), bytes(1, "a"));
        assert_ne!(bytes(1, "a"), bytes(2, "a"));
        assert_ne!(bytes(1, "a"), bytes(1, "b"));
    }

    #[test]
    fn the_numbers_are_normal() {
        let n = 400_000;
        let bytes = random(3, "a", Dtype::F32).bytes(0..4 * n);
        let values: Vec<f64> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)) / 2.0)
            .collect();
        let moment = |p: i32| values.iter().map(|v| v.powi(p)).sum::<f64>() / n as f64;
        // five standard errors of each moment
        assert!(moment(1).abs() < 0.008, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.012, "{}", moment(2));
        assert!(moment(3).abs() < 0.03, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.08, "{}", moment(4));
        let neighbours = values.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < 0.008, "{neighbours}");
    }

    #[test]
    fn no_deviation_is_a_constant() {
        let ones = Random::new(0, "a", Dtype::BF16, 1.0, 0.0).unwrap();
        assert_eq!(ones.bytes(0..4), [0x80, 0x3f, 0x80, 0x3f]);
        assert!(Random::new(0, "a", Dtype::I64, 1.0, 0.0).is_err());
    }
}
