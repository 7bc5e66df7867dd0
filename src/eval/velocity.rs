//! How far a model's velocity is from another's on the same noised latents, by noise level.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    calibrate::{
        noised::NoisedLatents,
        stats::{BUCKETS, bucket},
    },
    device::Runtime,
    model::Flux,
};

/// A model's velocity on noised latents.
#[derive(Clone, Debug)]
pub struct Velocities {
    /// (noised latents, image tokens · channels), f32 on the CPU.
    values: Tensor,
    /// Noise level of each state, in (0, 1).
    times: Vec<f32>,
}

/// Relative mean squared error at noise levels between `from` and `to`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtTime {
    /// Lower end.
    pub from: f64,
    /// Upper end.
    pub to: f64,
    /// Noised latents between them.
    pub noised_latents: usize,
    /// Σ ‖v − v₀‖² / Σ ‖v₀‖²; 0 if there is no state.
    pub error: f64,
}

/// How far a velocity is from another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VelocityError {
    /// Number of noised latents.
    pub noised_latents: usize,
    /// Σ ‖v − v₀‖² / Σ ‖v₀‖² over all noised latents.
    pub error: f64,
    /// The same by noise level.
    pub by_time: Vec<AtTime>,
}

impl Velocities {
    /// Runs `flux` on `noised`, `batch` at a time.
    ///
    /// # Errors
    /// When a forward fails or its result is not finite.
    pub fn new(
        flux: &Flux,
        noised: &NoisedLatents,
        batch: usize,
        runtime: &Runtime,
        progress: &ProgressBar,
    ) -> Result<Self> {
        let mut values = Vec::new();
        for range in noised.batches(batch) {
            let batch = noised.batch(range, &runtime.device, runtime.dtype)?;
            let velocity = flux.forward(&batch.inputs(), &mut ())?;
            let velocity = velocity.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            values.push(velocity.flatten_from(1)?);
            progress.inc(1);
        }
        let values = Tensor::cat(&values, 0)?;
        let sum = values.sqr()?.sum_all()?.to_scalar::<f32>()?;
        ensure!(sum.is_finite(), "the velocity is NaN or infinite");
        Ok(Self {
            values,
            times: noised.times(0..noised.len()),
        })
    }

    /// How far `other` is from this velocity on the same noised latents.
    ///
    /// # Errors
    /// When they are of different noised latents, or this velocity is zero.
    pub fn error_of(&self, other: &Self) -> Result<VelocityError> {
        ensure!(
            self.times == other.times,
            "velocities on different noised latents cannot be compared"
        );
        let sums = |t: Tensor| -> Result<Vec<f32>> { Ok(t.sqr()?.sum(1)?.to_vec1()?) };
        let errors = sums((&other.values - &self.values)?)?;
        let norms = sums(self.values.clone())?;
        let relative = |of: &dyn Fn(f32) -> bool| {
            let (mut count, mut error, mut norm) = (0, 0.0, 0.0);
            for ((t, e), n) in self.times.iter().zip(&errors).zip(&norms) {
                if of(*t) {
                    count += 1;
                    error += f64::from(*e);
                    norm += f64::from(*n);
                }
            }
            (count, if norm > 0.0 { error / norm } else { 0.0 })
        };
        ensure!(
            norms.iter().any(|n| *n > 0.0),
            "the velocity compared with is zero"
        );
        let (noised_latents, error) = relative(&|_| true);
        let by_time = (0..BUCKETS).map(|i| {
            let (noised_latents, error) = relative(&|t| bucket(t) == i);
            AtTime {
                from: i as f64 / BUCKETS as f64,
                to: (i + 1) as f64 / BUCKETS as f64,
                noised_latents,
                error,
            }
        });
        Ok(VelocityError {
            noised_latents,
            error,
            by_time: by_time.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_and_fall_into_their_intervals() {
        let of = |rows: &[[f32; 2]], times: &[f32]| Velocities {
            values: Tensor::from_slice(rows.as_flattened(), (rows.len(), 2), &Device::Cpu).unwrap(),
            times: times.to_vec(),
        };
        let times = [0.05, 0.55, 0.58, 0.999];
        let a = of(&[[3.0, 4.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], &times);
        let b = of(&[[3.0, 4.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], &times);
        let error = a.error_of(&b).unwrap();
        assert_eq!(error.noised_latents, 4);
        assert!((error.error - 5.0 / 31.0).abs() < 1e-9);
        let at = |i: usize| (error.by_time[i].noised_latents, error.by_time[i].error);
        assert_eq!(at(0), (1, 0.0));
        assert_eq!(at(5), (2, 0.5));
        assert_eq!(at(9), (1, 1.0));
        assert_eq!(at(3), (0, 0.0));
        let other = of(&[[3.0, 4.0]], &[0.5]);
        assert!(a.error_of(&other).is_err());
    }
}
