//! Muon and AdamW on an ordered list of trainables, with moments that can be saved and loaded; loss and gradients come
//! from elsewhere.
//!
//! `candle_nn::AdamW` computes the same for vectors but keeps its moments to itself, so a run could not resume with it.

use anyhow::{Result, ensure};
use candle::{DType, Tensor, Var};

use super::{
    muon,
    recipe::{Method, OptimiserRecipe},
};
use crate::model::ops;

/// Values of matrices that are moved in one go: small ones would keep a GPU waiting for the host.
const TOGETHER: usize = 1 << 24;

/// Moments of one phase's trainables, all f32 on the device.
#[derive(Clone, Debug)]
pub struct Optimiser {
    mean: Vec<Tensor>,
    /// None of what Muon moves.
    square: Vec<Option<Tensor>>,
    /// Updates made so far.
    updates: usize,
}

impl Optimiser {
    /// Moments of zero.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(vars: &[Var], method: Method) -> Result<Self> {
        let zeros = |var: &Var| -> candle::Result<Tensor> { Ok(var.zeros_like()?.detach()) };
        let squares = vars
            .iter()
            .map(|v| squared(method, v).then(|| zeros(v)).transpose());
        Ok(Self {
            mean: vars.iter().map(zeros).collect::<candle::Result<_>>()?,
            square: squares.collect::<candle::Result<_>>()?,
            updates: 0,
        })
    }

    /// Moments as they were saved after `updates` updates, in the order of the trainables.
    pub fn resumed(mean: Vec<Tensor>, square: Vec<Option<Tensor>>, updates: usize) -> Self {
        Self {
            mean,
            square,
            updates,
        }
    }

    /// The mean gradients and, where there are any, mean squared gradients, in the order of the trainables.
    pub fn moments(&self) -> (&[Tensor], &[Option<Tensor>]) {
        (&self.mean, &self.square)
    }

    /// Moves `vars` against `grads` (f32, one each) times `scale`, each at its learning rate.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn step(
        &mut self,
        vars: &[Var],
        (grads, scale): (&[Tensor], f64),
        rates: &[f64],
        recipe: &OptimiserRecipe,
    ) -> Result<()> {
        ensure!(
            [vars.len(), grads.len(), rates.len()] == [self.mean.len(); 3],
            "{} trainables, {} gradients, {} moments",
            vars.len(),
            grads.len(),
            self.mean.len()
        );
        self.updates += 1;
        let (b1, b2) = (recipe.beta1, recipe.beta2);
        let power = self.updates.min(i32::MAX as usize) as i32;
        let (unbias1, unbias2) = (1.0 / (1.0 - b1.powi(power)), 1.0 / (1.0 - b2.powi(power)));
        let advance = |i: usize, update: &Tensor, rate: f64| -> Result<()> {
            let (value, kept) = (
                vars[i].as_tensor().detach(),
                1.0 - rates[i] * recipe.weight_decay,
            );
            Ok(vars[i].set(&ops::weighted_sum(&value, kept, update, -rate)?)?)
        };
        let mut matrices = Vec::new();
        for (i, grad) in grads.iter().enumerate() {
            let Some(square) = &mut self.square[i] else {
                matrices.push(i);
                continue;
            };
            let grad = (grad * scale)?;
            let mean = ops::weighted_sum(&self.mean[i], b1, &grad, 1.0 - b1)?;
            *square = ops::weighted_sum(square, b2, &grad.sqr()?, 1.0 - b2)?;
            let root = ((&*square * unbias2)?.sqrt()? + recipe.epsilon)?;
            advance(i, &((&mean * (rates[i] * unbias1))? / root)?, 1.0)?;
            self.mean[i] = mean;
        }
        matrices.sort_by_key(|i| grads[*i].dims());
        for some in together(&matrices, grads) {
            let mut ahead = Vec::with_capacity(some.len());
            for &i in some {
                let mean = ops::weighted_sum(&self.mean[i], recipe.momentum, &grads[i], scale)?;
                ahead.push(ops::weighted_sum(&mean, recipe.momentum, &grads[i], scale)?);
                self.mean[i] = mean;
            }
            for (&i, update) in some.iter().zip(muon::updates(&ahead)?) {
                advance(i, &update, rates[i])?;
            }
        }
        Ok(())
    }
}

/// `matrices` in parts of [`TOGETHER`] values at most, or of one.
fn together<'a>(matrices: &'a [usize], grads: &[Tensor]) -> Vec<&'a [usize]> {
    let (mut parts, mut rest) = (Vec::new(), matrices);
    while !rest.is_empty() {
        let mut values = 0;
        let fit = rest.iter().take_while(|i| {
            values += grads[**i].elem_count();
            values <= TOGETHER
        });
        let (part, others) = rest.split_at(fit.count().max(1));
        parts.push(part);
        rest = others;
    }
    parts
}

/// Whether a trainable needs its mean squared gradient: vectors always do, matrices with AdamW.
pub fn squared(method: Method, var: &Var) -> bool {
    method == Method::Adamw || var.rank() != 2
}

/// ‖grads‖ over all together.
///
/// # Errors
/// When memory is short.
pub fn norm(grads: &[Tensor]) -> Result<f64> {
    let squares = grads
        .iter()
        .map(|grad| ops::total(&grad.sqr()?)?.to_dtype(DType::F32)?.reshape(1));
    let squares = squares.collect::<candle::Result<Vec<_>>>()?;
    if squares.is_empty() {
        return Ok(0.0);
    }
    // read together: a GPU would be waited for each time
    let squares = Tensor::cat(&squares, 0)?.to_vec1::<f32>()?;
    let sum: f64 = squares.into_iter().map(f64::from).sum();
    Ok(sum.sqrt())
}

#[cfg(test)]
mod tests {
    use candle::Device;
    use candle_nn::{Optimizer, ParamsAdamW};

    use super::*;

    #[test]
    fn it_moves_as_candles_own_does() {
        let start = Tensor::randn(0f32, 1.0, (3, 5), &Device::Cpu).unwrap();
        let target = Tensor::randn(0f32, 1.0, (3, 5), &Device::Cpu).unwrap();
        let (ours, theirs) = (
            Var::from_tensor(&start).unwrap(),
            Var::from_tensor(&start).unwrap(),
        );
        let recipe = OptimiserRecipe {
            weight_decay: 0.1,
            ..OptimiserRecipe::default()
        };
        let params = ParamsAdamW {
            lr: 0.05,
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            eps: recipe.epsilon,
            weight_decay: 0.1,
        };
        let mut candles = candle_nn::AdamW::new(vec![theirs.clone()], params).unwrap();
        let mut adam = Optimiser::new(std::slice::from_ref(&ours), Method::Adamw).unwrap();
        let loss = |v: &Var| {
            (v.as_tensor() - &target)
                .unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
        };
        for _ in 0..20 {
            let grad = loss(&ours).backward().unwrap().remove(&ours).unwrap();
            adam.step(
                std::slice::from_ref(&ours),
                (&[grad], 1.0),
                &[0.05],
                &recipe,
            )
            .unwrap();
            candles.backward_step(&loss(&theirs)).unwrap();
        }
        let difference = (ours.as_tensor() - theirs.as_tensor())
            .unwrap()
            .abs()
            .unwrap();
        let difference = difference.max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-5, "{difference}");
    }
}
