//! Group norm with SiLU as the autoencoder needs it: composed of candle's operations, and fused for float32 on the CPU, where the
//! composed one walks over the image a dozen times. No weights' names here.

use std::sync::Arc;

use candle::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::conv::{floats, fused};

/// Group norm, optionally followed by SiLU.
#[derive(Clone, Debug)]
pub(super) struct GroupNorm {
    pub groups: usize,
    pub eps: f64,
    pub silu: bool,
    /// Those to norm with; `None`: the input's own.
    pub known: Option<Arc<Statistics>>,
}

/// Mean and variance of every group of every sample, to be added up over the parts of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Statistics {
    /// Values of a group.
    count: f64,
    /// Their mean, and the sum of squared deviations from it.
    of: Vec<(f64, f64)>,
}

impl Statistics {
    /// Those of both parts.
    pub(super) fn join(self, other: Self) -> Self {
        if self.count == 0.0 {
            return other;
        }
        let count = self.count + other.count;
        let both = self.of.into_iter().zip(other.of);
        let of = both.map(|((mean, squares), (other_mean, other_squares))| {
            let gap = other_mean - mean;
            (
                mean + gap * other.count / count,
                squares + other_squares + gap * gap * self.count * other.count / count,
            )
        });
        Self {
            of: of.collect(),
            count,
        }
    }

    fn mean(&self, group: usize) -> f64 {
        self.of[group].0
    }

    fn variance(&self, group: usize) -> f64 {
        self.of[group].1 / self.count
    }
}

impl GroupNorm {
    /// Mean and variance of the groups of x (b, c, …).
    pub(super) fn statistics(&self, x: &Tensor) -> Result<Statistics> {
        let x = x.contiguous()?;
        let groups = x.dim(0)? * self.groups;
        let count = x.elem_count() / groups.max(1);
        let of = if fused(&x) {
            let (storage, layout) = x.storage_and_layout();
            let candle::Storage::Cpu(storage) = &*storage else {
                bail!("fused group norms are for the CPU")
            };
            let values = floats(storage, layout)?.par_chunks(count.max(1));
            values.map(deviations).collect()
        } else {
            let mut x = x.reshape((groups, count))?.to_dtype(DType::F32)?;
            let mean = x.mean_keepdim(D::Minus1)?;
            x = x.broadcast_sub(&mean)?;
            let squares = x.sqr()?.sum(D::Minus1)?;
            let host = |t: Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
            host(mean)?.into_iter().zip(host(squares)?).collect()
        };
        Ok(Statistics {
            count: count as f64,
            of,
        })
    }

    /// x (b, c, …), weight and bias (c).
    pub(super) fn forward(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        if fused(x) {
            x.contiguous()?
                .apply_op3_no_bwd(&weight.contiguous()?, &bias.contiguous()?, self)
        } else {
            self.composed(x, weight, bias)
        }
    }

    fn composed(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (shape, dtype, device) = (x.shape().clone(), x.dtype(), x.device().clone());
        let (b, c) = (x.dim(0)?, x.dim(1)?);
        // assigned, not shadowed: each is as large as the image in f32, and the former goes
        let mut x = x.to_dtype(DType::F32)?.reshape((b, self.groups, ()))?;
        let variance = if let Some(known) = &self.known {
            let all = |f: &dyn Fn(usize) -> f64| -> Result<Tensor> {
                let values: Vec<f32> = (0..known.of.len()).map(|i| f(i) as f32).collect();
                Tensor::from_vec(values, (b, self.groups, 1), &Device::Cpu)?.to_device(&device)
            };
            x = x.broadcast_sub(&all(&|i| known.mean(i))?)?;
            all(&|i| known.variance(i))?
        } else {
            x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            x.sqr()?.mean_keepdim(D::Minus1)?
        };
        x = x
            .broadcast_div(&(variance + self.eps)?.sqrt()?)?
            .reshape((b, c, ()))?;
        x = x.broadcast_mul(&weight.to_dtype(DType::F32)?.reshape((1, c, 1))?)?;
        x = x.broadcast_add(&bias.to_dtype(DType::F32)?.reshape((1, c, 1))?)?;
        if self.silu {
            x = x.silu()?;
        }
        x.to_dtype(dtype)?.reshape(shape)
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "vae-group-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        weight: &CpuStorage,
        wl: &Layout,
        bias: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (floats(x, xl)?, floats(weight, wl)?, floats(bias, bl)?);
        let (b, c) = (xl.dims()[0], xl.dims()[1]);
        let known = self.known.as_ref().map(|known| known.of.len());
        if c % self.groups != 0
            || weight.len() != c
            || bias.len() != c
            || known.is_some_and(|n| n != b * self.groups)
        {
            bail!(
                "group norm of {} groups and {} weights does not fit {:?}",
                self.groups,
                weight.len(),
                xl.shape()
            )
        }
        let (channels, pixels) = (c / self.groups, x.len() / (b * c).max(1));
        let mut out = vec![0f32; x.len()];
        let size = (channels * pixels).max(1);
        out.par_chunks_mut(size)
            .zip(x.par_chunks(size))
            .enumerate()
            .for_each(|(i, (out, x))| {
                let (mean, variance) = match &self.known {
                    Some(known) => (known.mean(i), known.variance(i)),
                    None => {
                        let (mean, squares) = deviations(x);
                        (mean, squares / x.len() as f64)
                    }
                };
                let centre = mean as f32;
                let scale = 1.0 / (variance + self.eps).sqrt();
                let first = i % self.groups * channels;
                for (j, (out, x)) in out.chunks_mut(pixels).zip(x.chunks(pixels)).enumerate() {
                    let gain = (scale * f64::from(weight[first + j])) as f32;
                    let offset = bias[first + j];
                    if self.silu {
                        for (out, x) in out.iter_mut().zip(x) {
                            let y = (x - centre) * gain + offset;
                            *out = y / (1.0 + (-y).exp());
                        }
                    } else {
                        for (out, x) in out.iter_mut().zip(x) {
                            *out = (x - centre) * gain + offset;
                        }
                    }
                }
            });
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }
}

/// The mean of values, and the sum of their squared deviations from it.
fn deviations(values: &[f32]) -> (f64, f64) {
    let mean = sum(values, |v| v) / values.len() as f64;
    let centre = mean as f32;
    (mean, sum(values, |v| (v - centre) * (v - centre)))
}

/// Sum of `f` over many values: 16 running sums for the vector units, added up in float64 before they grow large.
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let part = |values: &[f32]| {
        let (blocks, rest) = values.as_chunks::<16>();
        let mut lanes = [0f32; 16];
        for block in blocks {
            for (lane, value) in lanes.iter_mut().zip(block) {
                *lane += f(*value);
            }
        }
        let lanes: f64 = lanes.iter().map(|v| f64::from(*v)).sum();
        lanes + rest.iter().map(|v| f64::from(f(*v))).sum::<f64>()
    };
    values.chunks(4096).map(part).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{noise::Generator, vae::conv::tests::far};
    use candle::Device;

    #[test]
    fn fused_group_norm_equals_the_composed_one() -> Result<()> {
        let mut random = Generator::new(2);
        for silu in [false, true] {
            let norm = GroupNorm {
                groups: 3,
                eps: 1e-6,
                silu,
                known: None,
            };
            let x = (random.randn((2, 6, 33, 70), &Device::Cpu)? * 3.0)?;
            let x = (x + 5.0)?;
            let (weight, bias) = (
                random.randn(6, &Device::Cpu)?,
                random.randn(6, &Device::Cpu)?,
            );
            assert!(
                far(
                    &norm.forward(&x, &weight, &bias)?,
                    &norm.composed(&x, &weight, &bias)?
                )? <= 1e-5
            );
        }
        Ok(())
    }

    #[test]
    fn statistics_of_the_parts_add_up_to_those_of_the_whole() -> Result<()> {
        let mut random = Generator::new(7);
        let norm = GroupNorm {
            groups: 2,
            eps: 1e-6,
            silu: true,
            known: None,
        };
        let x = (random.randn((2, 6, 9, 7), &Device::Cpu)? + 30.0)?;
        let (weight, bias) = (
            random.randn(6, &Device::Cpu)?,
            random.randn(6, &Device::Cpu)?,
        );
        let want = norm.forward(&x, &weight, &bias)?;
        let mut known = Statistics::default();
        for (first, rows) in [(0, 4), (4, 1), (5, 4)] {
            known = known.join(norm.statistics(&x.narrow(2, first, rows)?)?);
        }
        let norm = GroupNorm {
            known: Some(Arc::new(known)),
            ..norm
        };
        for (first, rows) in [(0, 5), (5, 4)] {
            let part = x.narrow(2, first, rows)?;
            let want = want.narrow(2, first, rows)?;
            assert!(far(&norm.forward(&part, &weight, &bias)?, &want)? <= 2e-5);
            assert!(far(&norm.composed(&part, &weight, &bias)?, &want)? <= 2e-5);
        }
        Ok(())
    }

    #[test]
    fn groups_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let norm = GroupNorm {
            groups: 3,
            eps: 1e-6,
            silu: false,
            known: None,
        };
        assert!(
            norm.forward(&zeros(&[1, 4, 5, 5])?, &zeros(&[4])?, &zeros(&[4])?)
                .is_err()
        );
        Ok(())
    }
}
