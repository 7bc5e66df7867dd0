//! Sums of a weighted problem on a GPU: the products of each sample are added to them where they lie, in f32, of bfloat16
//! numbers where the model computes in these. Of a matrix as wide as the inputs there is one, and none in f64.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use super::gram::Gram;
use crate::model::ops;

/// The sums of rows √a \[z, 1\] against a target, a number a for each sample.
#[derive(Debug)]
pub struct DeviceSums {
    /// Σ a z zᵀ, (k, k), f32.
    gram: Tensor,
    /// Σ √a z tᵀ, (k, d), f32.
    cross: Tensor,
    /// Σ a z, (k, 1), f32.
    inputs: Tensor,
    /// Σ √a t, (d, 1), f32.
    targets: Tensor,
    /// Σ a over rows.
    weight: f64,
    target_sq: f64,
}

impl DeviceSums {
    /// None, for z of width `k` and targets of width `d`.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new((k, d): (usize, usize), device: &Device) -> Result<Self> {
        let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, device);
        Ok(Self {
            gram: zeros(k, k)?,
            cross: zeros(k, d)?,
            inputs: zeros(k, 1)?,
            targets: zeros(d, 1)?,
            weight: 0.0,
            target_sq: 0.0,
        })
    }

    /// Adds samples: `z` (b, n, k), √a as `root` (b, 1) and the target `t` (b, n, d), whose Σ ‖t‖² is `target_sq`. False
    /// where products are not added in place, and nothing was added.
    ///
    /// # Errors
    /// When shapes disagree or a product fails.
    pub fn add(&mut self, z: &Tensor, root: &Tensor, t: &Tensor, target_sq: f64) -> Result<bool> {
        let (samples, tokens, _) = z.dims3()?;
        // targets may be larger than f16 goes
        let dtype = match z.dtype() {
            DType::BF16 => DType::BF16,
            _ => DType::F32,
        };
        let z = z.to_dtype(dtype)?;
        let roots = root.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let ones = Tensor::ones((tokens, 1), dtype, z.device())?;
        // √a goes with the target before that is rounded
        let t = ops::gated(t, root)?.to_dtype(dtype)?;
        for (sample, root) in (0..samples).zip(roots) {
            let of = |x: &Tensor| x.get(sample)?.contiguous();
            let (z, t, a) = (of(&z)?, of(&t)?, root * root);
            let products = [
                (&self.gram, [&z, &z], a),
                (&self.cross, [&z, &t], 1.0),
                (&self.inputs, [&z, &ones], a),
                (&self.targets, [&t, &ones], 1.0),
            ];
            for (place, (sum, factors, by)) in products.into_iter().enumerate() {
                let added = ops::add_transposed_product(sum, factors, by)?;
                if !added && place == 0 && self.weight == 0.0 {
                    return Ok(false);
                }
                ensure!(added, "a product could not be added to sums");
            }
            self.weight += a * tokens as f64;
        }
        self.target_sq += target_sq;
        Ok(true)
    }

    /// The sums of \[√a z, √a\] against the target, f64 on the CPU.
    ///
    /// # Errors
    /// When memory is short.
    pub fn finish(self) -> Result<Gram> {
        let host = |t: Tensor| -> Result<Vec<f32>> {
            Ok(t.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
        };
        let ((k, _), (_, d)) = (self.gram.dims2()?, self.cross.dims2()?);
        let (inputs, targets) = (host(self.inputs)?, host(self.targets)?);
        let (gram, cross) = (host(self.gram)?, host(self.cross)?);
        let wide = |v: &f32| f64::from(*v);
        let rows = gram.chunks_exact(k).zip(&inputs);
        let rows = rows.flat_map(|(row, input)| row.iter().chain([input]));
        let mut with_ones = Vec::with_capacity((k + 1) * (k + 1));
        with_ones.extend(rows.chain(&inputs).map(wide));
        with_ones.push(self.weight);
        let cross: Vec<f64> = cross.iter().chain(&targets).map(wide).collect();
        Ok(Gram {
            gram: Tensor::from_vec(with_ones, (k + 1, k + 1), &Device::Cpu)?,
            cross: Tensor::from_vec(cross, (k + 1, d), &Device::Cpu)?,
            target_sq: self.target_sq,
        })
    }
}
