//! Prompt → latent → image: everything around the transformer, each part equal to diffusers. Calibration and pruning run on top of it.

pub mod denoise;
pub mod encoded;
pub mod grid;
pub mod image;
pub mod latents;
pub mod noise;
pub mod png;
pub mod reference;
pub mod schedule;
mod shift;
pub mod size;
pub mod text;
pub mod tokenize;
pub mod vae;

/// Whether no value is NaN or infinite.
///
/// # Errors
/// When the device is out of memory.
pub fn is_finite(x: &candle::Tensor) -> candle::Result<bool> {
    // 0 · x is NaN if x is not finite, and no sum of zeros overflows
    let zeros = x.to_dtype(candle::DType::F32)?.affine(0.0, 0.0)?;
    Ok(zeros.sum_all()?.to_scalar::<f32>()?.is_finite())
}

#[cfg(test)]
mod tests {
    use candle::{Device, Tensor};

    use super::is_finite;

    #[test]
    fn a_single_nan_or_infinity_is_found_and_large_numbers_are_none() {
        let finite =
            |values: [f32; 3]| is_finite(&Tensor::new(&values, &Device::Cpu).unwrap()).unwrap();
        assert!(finite([f32::MAX, f32::MAX, -1.0]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!finite([0.0, bad, 1.0]), "{bad}");
        }
    }
}
