//! The backward pass over a graph of our own nodes: what candle's does, without a tensor of zeros and a sum for every edge,
//! which on a GPU cost a tenth of a training step. And what is left between the nodes, as nodes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle::{D, DType, Result, Tensor, TensorId};

use super::custom_op::{by_candle, custom_op};
use super::rule::{Rule, rule};
use super::{cuda, plain, sum_of_tokens};

/// Gradients of variables.
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// That of `variable`, if it has a part in the output.
    pub fn remove(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.remove(&variable.id())
    }
}

/// The gradients of all variables that `output` depends on, given its own. By candle, if an operation of its own is among
/// those in between.
///
/// # Errors
/// When a backward pass fails.
pub fn backward(output: &Tensor, grad: &Tensor) -> Result<Gradients> {
    let nodes = output.sorted_nodes();
    let rules: Vec<_> = nodes.iter().map(|node| rule(node)).collect();
    let mut all = HashMap::new();
    if !all_known(&nodes, &rules) {
        let mut grads = by_candle(output, grad)?;
        for node in nodes.into_iter().filter(|node| node.is_variable()) {
            all.extend(grads.remove(node).map(|grad| (node.id(), grad)));
        }
        return Ok(Gradients(all));
    }
    if !nodes.is_empty() {
        all.insert(output.id(), grad.detach());
    }
    for (node, rule) in nodes.into_iter().zip(rules) {
        let (Some(rule), false) = (rule, node.is_variable()) else {
            continue;
        };
        let Some(grad) = all.remove(&node.id()) else {
            candle::bail!("an operation's result has no gradient")
        };
        let grads = rule.gradients(node, &grad)?;
        drop(grad);
        for ((_, input), grad) in rule.inputs.iter().zip(grads) {
            match all.entry(*input) {
                Entry::Vacant(entry) => {
                    entry.insert(grad);
                }
                Entry::Occupied(mut entry) => {
                    let sum = sum(entry.get(), &grad)?;
                    entry.insert(sum);
                }
            }
        }
    }
    Ok(Gradients(all))
}

fn all_known(nodes: &[&Tensor], rules: &[Option<Arc<Rule>>]) -> bool {
    let mut each = nodes.iter().zip(rules);
    each.all(|(node, rule)| node.is_variable() || rule.is_some())
}

/// Whether [`backward`] leaves nothing to candle.
#[cfg(test)]
pub fn is_known(output: &Tensor) -> bool {
    let nodes = output.sorted_nodes();
    let rules: Vec<_> = nodes.iter().map(|node| rule(node)).collect();
    all_known(&nodes, &rules)
}

fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match cuda::weighted_sum(a, 1.0, b, 1.0)? {
        Some(sum) => Ok(sum),
        None => a + b,
    }
}

/// `x.narrow(…)`; differentiable.
pub fn narrow(x: &Tensor, dim: usize, start: usize, len: usize) -> Result<Tensor> {
    let behind = x.dim(dim)?.saturating_sub(start + len);
    let part = x.detach().narrow(dim, start, len)?;
    custom_op(&[x], part, move |grad| {
        Ok(vec![Some(grad.pad_with_zeros(dim, start, behind)?)])
    })
}

/// `first` and `second` one behind the other; differentiable.
pub(super) fn concatenated(first: &Tensor, second: &Tensor, dim: usize) -> Result<Tensor> {
    let [a, b] = [first.dim(dim)?, second.dim(dim)?];
    let both = Tensor::cat(&[first.detach(), second.detach()], dim)?;
    custom_op(&[first, second], both, move |grad| {
        let part = |start, len| grad.narrow(dim, start, len)?.contiguous();
        Ok(vec![Some(part(0, a)?), Some(part(a, b)?)])
    })
}

/// `x + y` of one shape; differentiable.
pub(super) fn plus(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    custom_op(&[x, y], sum(&x.detach(), &y.detach())?, |grad| {
        Ok(vec![Some(grad.clone()), Some(grad.clone())])
    })
}

/// `x + bias` over the last dimension; differentiable.
pub fn biased(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Some(bias) = bias else {
        return Ok(x.clone());
    };
    let (width, stored) = (bias.dim(D::Minus1)?, bias.dtype());
    let y = plain::biased(&x.detach(), Some(&bias.detach()))?;
    let tracked = bias.track_op();
    custom_op(&[x, bias], y, move |grad| {
        let of_bias = tracked.then(|| of_bias(grad, width, stored));
        Ok(vec![Some(grad.clone()), of_bias.transpose()?])
    })
}

/// The gradient of a bias (width,), of a number format, from that of what it was added to, (…, width).
pub(super) fn of_bias(grad: &Tensor, width: usize, dtype: DType) -> Result<Tensor> {
    let rows = grad.reshape((1, (), width))?;
    sum_of_tokens(&rows)?.squeeze(0)?.to_dtype(dtype)
}

/// `x` (batch, tokens, width) plus `y` (batch, width) for every token; differentiable.
pub fn plus_for_all(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let sum = x.detach().broadcast_add(&y.detach().unsqueeze(1)?)?;
    custom_op(&[x, y], sum, move |grad| {
        Ok(vec![Some(grad.clone()), Some(sum_of_tokens(grad)?)])
    })
}

#[cfg(test)]
mod tests {
    use candle::Var;

    use super::super::{Branch, gated_residual, norm_modulate, product};
    use super::*;
    use crate::model::testing::{close, random};

    fn var(name: &str, shape: &[usize]) -> Result<Var> {
        Var::from_tensor(&random(name, shape)?)
    }

    /// A residual branch in which every variable has a part twice.
    fn branch(x: &Tensor, weight: &Tensor, bias: &Tensor, vec: &Tensor) -> Result<Tensor> {
        let part = |n: usize| narrow(vec, 1, 8 * n, 8);
        let normed = norm_modulate(x, &part(0)?, &part(1)?)?;
        let y = biased(&product(&normed, weight, None)?, Some(bias))?;
        let y = plus_for_all(&product(&y, weight, None)?, &part(2)?)?;
        let (front, back) = (narrow(&y, 1, 0, 2)?, narrow(&y, 1, 2, 3)?);
        let y = concatenated(&back, &plus(&front, &front)?, 1)?;
        gated_residual(&[Branch {
            x,
            y: &y,
            bias: Some(bias),
            gate: Some(&part(0)?),
        }])
    }

    #[test]
    fn gradients_are_those_of_candle() -> Result<()> {
        let (x, vec) = (var("x", &[2, 5, 8])?, var("vec", &[2, 24])?);
        let (weight, bias) = (var("weight", &[8, 8])?, var("bias", &[8])?);
        let output = branch(&x, &weight, &bias, &vec)?;
        assert!(is_known(&output));
        let grad = random("grad", (2, 5, 8))?;
        let mut ours = backward(&output, &grad)?;
        let mut theirs = by_candle(&output, &grad)?;
        // with an operation that is not known here
        let mut mixed = backward(&(&output * 1.0)?.affine(1.0, 0.0)?, &grad)?;
        for var in [&x, &vec, &weight, &bias] {
            let missing = || candle::Error::Msg("no gradient".to_owned());
            let ours = ours.remove(var).ok_or_else(missing)?;
            let want = theirs.remove(var).ok_or_else(missing)?;
            close(&ours, &want, 1e-6)?;
            close(&mixed.remove(var).ok_or_else(missing)?, &want, 1e-6)?;
            assert!(want.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3);
        }
        assert!(
            backward(&random("y", 3)?, &random("grad", 3)?)?
                .0
                .is_empty()
        );
        Ok(())
    }
}
