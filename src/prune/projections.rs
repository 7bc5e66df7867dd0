//! Output projections of what is kept, refitted in closed form, so that kept blocks and the head take back the
//! errors that replaced blocks before them leave.
//!
//! A kept block ends in x + g ⊙ (W z + b). Its change of W and b minimises the distance to the original's stream behind
//! the block, the head's that to the original's velocity; the ridge pulls towards no change. Each column of a gated
//! problem weights rows by its own gⱼ², which would need a matrix for each. The gate varies far more between samples
//! than between columns, so g² is taken as aₛ uⱼ (least squares in u, a the mean over columns): one matrix Σ a z zᵀ serves
//! all columns, whatever the width, and the right-hand side Σ gⱼ z rⱼ stays exact.

use std::{collections::BTreeMap, str::FromStr};

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    calibrate::memory::Refits,
    device::Runtime,
    fit::{
        gram::{self, Gram},
        ridge,
        running::RunningGram,
    },
    layout::{BlockId, BlockKind, FluxConfig},
    model::{Flux, Linear, ops},
};

/// Which output projections of what is kept are refitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefitProjections {
    /// None: kept weights stay as they are.
    None,
    /// The head's projection to the velocity.
    Head,
    /// Also the last projection of every kept block behind a replaced one, and of the one right ahead of the first.
    All,
}

impl FromStr for RefitProjections {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "head" => Ok(Self::Head),
            "all" => Ok(Self::All),
            _ => Err("expected none, head or all".to_owned()),
        }
    }
}

/// Width up to which refitting all outputs takes seconds: its matrices are five times as wide.
const NARROW: usize = 1024;

impl RefitProjections {
    /// What a model `hidden` wide is given if the recipe does not say.
    pub fn for_width(hidden: usize) -> Self {
        if hidden <= NARROW {
            Self::All
        } else {
            Self::Head
        }
    }

    /// What refitting takes, at most: as if every block were kept behind a replaced one.
    pub fn cost(self, config: &FluxConfig) -> Refits {
        let (d, out) = (config.hidden_size, config.out_channels);
        let mut refits = Refits::default();
        // (inputs, outputs, problems that share the tokens)
        let mut add = |inputs: usize, outputs: usize, problems: usize| {
            let (k, outputs) = (inputs as f64 + 1.0, outputs as f64);
            refits.widest = refits.widest.max(inputs);
            refits.flops_per_token += k * (k + 2.0 * outputs);
            refits.flops += problems as f64 * k * k * (k / 3.0 + 2.0 * outputs);
        };
        if self >= Self::Head {
            add(d, out, 1);
        }
        if self >= Self::All {
            for id in config.kept_ids() {
                match id.kind {
                    BlockKind::Double => add(config.mlp_size, d, 2),
                    BlockKind::Single => add(d + config.mlp_size, d, 1),
                }
            }
        }
        refits
    }
}

/// The ridge for changes, relative to the mean diagonal, where a token was seen for each input; it falls with their number.
/// Noised latents left out cannot tell it: the blocks before were fitted to them as well, and what is left there looks like
/// noise, which calls for far too much.
const RIDGE: f64 = 2.0;

/// A projection's new values, f32 on the CPU.
#[derive(Clone, Debug)]
pub struct Projection {
    /// (out, in).
    pub weight: Tensor,
    /// (out); `None` in a model without biases: what is kept of it must open elsewhere.
    pub bias: Option<Tensor>,
}

/// New projections by kept block (`None`: the head) and name below it.
pub type OutputProjections = BTreeMap<(Option<BlockId>, &'static str), Projection>;

/// The head's projection.
pub const HEAD: &str = "final_layer.linear";

/// Sums of one gated problem.
#[derive(Debug, Default)]
pub struct OutputProjectionSums {
    sums: RunningGram,
    rows: usize,
    /// Σ a g², (d), and Σ a² over samples.
    gate: Option<(Tensor, f64)>,
}

impl OutputProjectionSums {
    /// Adds samples: `z` (b, n, k), the `residual` (b, n, d) that the change is to make up for, the `gate` (b, d), 1
    /// if `None`; their squared errors count `weight` times. Products are f32.
    ///
    /// # Errors
    /// When a value is NaN or infinite, or a product fails.
    pub fn add(
        &mut self,
        z: &Tensor,
        residual: &Tensor,
        gate: Option<&Tensor>,
        weight: f64,
    ) -> Result<()> {
        if z.dim(0)? == 0 {
            return Ok(());
        }
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let residual = wide(residual)?;
        let (samples, tokens, width) = residual.dims3()?;
        let target_sq = weight * gram::square(&residual)?;
        ensure!(target_sq.is_finite(), "activations are NaN or infinite");
        // g (z Δ) ≈ r, weighted, is (√w g) (z Δ) ≈ √w r
        let root_weight = weight.sqrt();
        let all = || Tensor::ones((samples, 1), DType::F32, z.device());
        let (root, factor, u, a) = match gate {
            None => ((all()? * root_weight)?, (all()? * root_weight)?, None, 0.0),
            Some(gate) => {
                let gate = (wide(gate)? * root_weight)?;
                let square = gate.sqr()?;
                let a = (square.mean_keepdim(1)? + 1e-12)?; // (b, 1)
                let root = a.sqrt()?;
                // rows √a [z, 1] against g r / √a: Σ a z zᵀ and Σ z (g r)
                let factor = (gate.broadcast_div(&root)? * root_weight)?;
                let u = square.broadcast_mul(&a)?.sum(0)?.to_dtype(DType::F64)?;
                (root, factor, Some(u), gram::square(&a)?)
            }
        };
        let target = ops::gated(&residual, &factor)?;
        self.sums.add_weighted(z, &root, &target, target_sq)?;
        self.rows += samples * tokens;
        let u = match u {
            Some(u) => u.to_device(&Device::Cpu)?,
            None => Tensor::zeros(width, DType::F64, &Device::Cpu)?,
        };
        self.gate = Some(match self.gate.take() {
            None => (u, a),
            Some((sum, square)) => ((sum + u)?, square + a),
        });
        Ok(())
    }

    /// `before` with the change that the sums ask for; the ridge follows from the number of tokens unless given.
    ///
    /// # Errors
    /// When nothing was seen, or the sums are NaN or infinite.
    pub fn solve(self, before: &Linear, ridge: Option<f64>) -> Result<Projection> {
        let (gate, a) = self.gate.context("no tokens were seen")?;
        // g² ≈ a u: with coefficients times √u the problem of every column has the same matrix
        let root = if a > 0.0 {
            let u = (gate / a)?;
            let floor = 1e-6 * u.mean_all()?.to_scalar::<f64>()?.max(f64::MIN_POSITIVE);
            u.maximum(floor)?.sqrt()?
        } else {
            gate.ones_like()?
        };
        let has_bias = before.bias().is_some();
        let gram = self.sums.finish()?.context("no tokens were seen")?;
        let gram = Gram {
            cross: gram.cross.to_device(&Device::Cpu)?.broadcast_div(&root)?,
            ..gram
        };
        let gram = if has_bias { gram } else { gram.without_bias()? };
        let inputs_per_token = gram.gram.dim(0)? as f64 / self.rows.max(1) as f64;
        let ridge = ridge.unwrap_or(RIDGE * inputs_per_token);
        let solution = ridge::solve_split(Some(gram), None, Some(ridge), &[])?;
        let inputs = solution.coefficients.nrows() - usize::from(has_bias);
        let column = root.unsqueeze(1)?.to_dtype(DType::F32)?;
        let change = ridge::weight(&solution.coefficients, 0..inputs)?.broadcast_div(&column)?;
        let host = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let bias = before.bias().map(|bias| -> Result<Tensor> {
            let shift = (ridge::bias(&solution.coefficients)? / column.squeeze(1)?)?;
            Ok((host(bias)? + shift)?)
        });
        let bias = bias.transpose()?;
        Ok(Projection {
            weight: (host(&before.weight()?)? + change)?,
            bias,
        })
    }
}

impl Projection {
    /// As a layer of a model.
    ///
    /// # Errors
    /// When it does not fit on the device.
    pub fn linear(&self, runtime: &Runtime) -> Result<Linear> {
        let place = |t: &Tensor| t.to_dtype(runtime.dtype)?.to_device(&runtime.device);
        let bias = self.bias.as_ref().map(place).transpose()?;
        Ok(Linear::new(place(&self.weight)?, bias)?)
    }
}

/// Puts new projections into a model.
///
/// # Errors
/// When the model lacks one.
pub fn put(flux: &mut Flux, projections: &OutputProjections, runtime: &Runtime) -> Result<()> {
    for ((block, name), projection) in projections {
        let Some(id) = block else {
            *flux.head_linear_mut() = projection.linear(runtime)?;
            continue;
        };
        let mut entries = flux.trunk.entries_mut().iter_mut();
        let (_, block) = entries
            .find(|(spec, _)| spec.id() == *id)
            .with_context(|| format!("the model has no block {id}"))?;
        // waits on the host with the block's other weights
        let linear = if block.is_offloaded() {
            projection.linear(&Runtime {
                device: Device::Cpu,
                dtype: runtime.dtype,
            })?
        } else {
            projection.linear(runtime)?
        };
        block
            .exchange(name, linear)
            .with_context(|| format!("block {id}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    fn off(got: &Tensor, want: &Tensor) -> f64 {
        let rest = gram::square(&(got - want).unwrap()).unwrap();
        (rest / gram::square(want).unwrap()).sqrt()
    }

    fn before() -> Linear {
        Linear::new(random(&[4, 6]), Some(random(&[4]))).unwrap()
    }

    #[test]
    fn what_a_projection_lacks_is_found_behind_a_gate_and_without() {
        let (before, change, shift) = (before(), random(&[4, 6]), random(&[4]));
        for gated in [false, true] {
            let mut sums = OutputProjectionSums::default();
            for _ in 0..8 {
                let z = random(&[10, 5, 6]);
                let lack = z
                    .broadcast_matmul(&change.t().unwrap())
                    .unwrap()
                    .broadcast_add(&shift)
                    .unwrap();
                // of rank one, with either sign: then nothing is approximate
                let (samples, columns) = (
                    random(&[10, 1]),
                    Tensor::new(&[[3f32, -1., 0.1, 2.]], &Device::Cpu),
                );
                let gate = samples.broadcast_mul(&columns.unwrap()).unwrap();
                let gate = gated.then_some(gate);
                let rest = match &gate {
                    None => lack,
                    Some(gate) => lack.broadcast_mul(&gate.unsqueeze(1).unwrap()).unwrap(),
                };
                sums.add(&z, &rest, gate.as_ref(), 0.5).unwrap();
            }
            let got = sums.solve(&before, Some(0.0)).unwrap();
            let want = (before.weight().unwrap() + &change).unwrap();
            assert!(off(&got.weight, &want) < 1e-4, "{gated}");
            let want = (before.bias().unwrap() + &shift).unwrap();
            assert!(off(&got.bias.unwrap(), &want) < 1e-4, "{gated}");
        }
    }

    #[test]
    fn a_projection_that_lacks_nothing_stays() {
        let before = before();
        let mut sums = OutputProjectionSums::default();
        let zeros = Tensor::zeros((8, 3, 4), DType::F32, &Device::Cpu).unwrap();
        sums.add(&random(&[8, 3, 6]), &zeros, Some(&random(&[8, 4])), 1.0)
            .unwrap();
        let got = sums.solve(&before, None).unwrap();
        assert!(off(&got.weight, &before.weight().unwrap()) < 1e-12);
        assert!(off(&got.bias.unwrap(), before.bias().unwrap()) < 1e-12);
    }

    #[test]
    fn a_projection_without_bias_gets_none() {
        let (before, change) = (Linear::new(random(&[4, 6]), None).unwrap(), random(&[4, 6]));
        let mut sums = OutputProjectionSums::default();
        let z = random(&[20, 5, 6]);
        let lack = z.broadcast_matmul(&change.t().unwrap()).unwrap();
        sums.add(&z, &lack, None, 1.0).unwrap();
        let got = sums.solve(&before, Some(0.0)).unwrap();
        let want = (before.weight().unwrap() + &change).unwrap();
        assert!(off(&got.weight, &want) < 1e-4);
        assert!(got.bias.is_none());
    }

    #[test]
    fn few_noisy_tokens_move_a_projection_less_than_many() {
        let before = before();
        let (change, none) = (
            random(&[4, 6]),
            Tensor::zeros((4, 6), DType::F32, &Device::Cpu),
        );
        let none = none.unwrap();
        let fitted = |samples: usize, change: &Tensor, ridge: Option<f64>| {
            let z = random(&[samples, 1, 6]);
            let rest = z.broadcast_matmul(&change.t().unwrap()).unwrap();
            let rest = (rest + random(&[samples, 1, 4])).unwrap();
            let mut sums = OutputProjectionSums::default();
            sums.add(&z, &rest, None, 1.0).unwrap();
            let got = sums.solve(&before, ridge).unwrap();
            (got.weight - before.weight().unwrap()).unwrap()
        };
        // noise is not taken for a change, and a change that many tokens tell of is found
        let square = |t: &Tensor| gram::square(t).unwrap();
        let mean = |ridge| {
            (0..20)
                .map(|_| square(&fitted(8, &none, ridge)))
                .sum::<f64>()
                / 20.0
        };
        assert!(mean(None) < 0.2 * mean(Some(0.0)));
        assert!(off(&fitted(20_000, &change, None), &change) < 0.1);
    }
}
