//! bfloat16 and float16 bytes as they lie in a file → float32, on all cores in one pass: reading a model on the CPU, and
//! blocks that are read whenever they are run, would otherwise wait for one core that goes over every value twice.

use half::f16;
use rayon::prelude::*;
use safetensors::Dtype;

/// Values that one task converts.
const TASK: usize = 1 << 16;

/// The values of little-endian `bytes` in `dtype`; `None` for formats that are not converted here.
pub(super) fn to_f32(bytes: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    if !matches!(dtype, Dtype::BF16 | Dtype::F16) {
        return None;
    }
    let (pairs, _) = bytes.as_chunks::<2>();
    let mut out = vec![0f32; pairs.len()];
    let tasks = out.par_chunks_mut(TASK).zip(pairs.par_chunks(TASK));
    match dtype {
        Dtype::BF16 => tasks.for_each(|(out, pairs)| {
            for (out, pair) in out.iter_mut().zip(pairs) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
            }
        }),
        _ => tasks.for_each(|(out, pairs)| {
            for (out, pair) in out.iter_mut().zip(pairs) {
                *out = f16::from_le_bytes(*pair).to_f32();
            }
        }),
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_value_is_what_the_conversion_of_half_gives() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::BF16, Dtype::F16] {
            let got = to_f32(&all, dtype).unwrap();
            assert_eq!(got.len(), 1 << 16);
            for (bits, got) in (0..=u16::MAX).zip(got) {
                let want = match dtype {
                    Dtype::BF16 => bf16::from_bits(bits).to_f32(),
                    _ => f16::from_bits(bits).to_f32(),
                };
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(same, "{dtype:?} {bits:04x}: {got} instead of {want}");
            }
        }
        assert_eq!(to_f32(&all, Dtype::F32), None);
    }
}
