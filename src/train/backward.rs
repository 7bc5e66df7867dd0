//! Gradients of a range of blocks, whole or one block at a time. `model` decides what the blocks compute, the caller how the
//! error is judged.

use std::ops::Range;

use anyhow::Result;
use candle::{Tensor, Var};

use super::trainables::frozen;
use crate::model::{Conditioning, Stream, Trunk, ops};

/// The loss of a stream, and its gradient with respect to the stream's tokens (same shape and dtype).
pub type Judge<'a> = &'a dyn Fn(&Stream) -> Result<(f64, Tensor)>;

/// Loss and gradients.
#[derive(Debug)]
pub struct Gradients {
    /// The loss.
    pub loss: f64,
    /// One for each trainable, in their order.
    pub of: Vec<Tensor>,
}

/// Runs the entries `range` of `trunk` on `input`, lets `judge` look at what comes out, and returns the gradients of
/// `vars`.
///
/// With `gradient_checkpointing`, only the input of every block is kept and each is run once more on the way back: a third more
/// arithmetic, and the memory of one block instead of all.
///
/// # Errors
/// When a forward or backward pass fails.
pub fn gradients(
    trunk: &Trunk,
    range: Range<usize>,
    input: &Stream,
    conditioning: &Conditioning,
    vars: &[Var],
    gradient_checkpointing: bool,
    judge: Judge,
) -> Result<Gradients> {
    let mut out: Vec<Option<Tensor>> = vec![None; vars.len()];
    let loss = if gradient_checkpointing {
        let mut inputs = Vec::with_capacity(range.len());
        let mut stream = input.clone();
        frozen(trunk).visit(range.clone(), &mut |_, _, block| {
            let output = block.forward(&stream, conditioning)?;
            inputs.push(std::mem::replace(&mut stream, output));
            Ok(())
        })?;
        let (loss, grad) = judge(&stream)?;
        drop(stream);
        let mut grad = Some(grad);
        trunk.visit_back(range.clone(), &mut |_, _, block| {
            let (Some(stream), Some(after)) = (inputs.pop(), grad.take()) else {
                return Ok(()); // nothing of what follows has a gradient
            };
            let (var, tracked) = tracked(&stream)?;
            let output = block.forward(&tracked, conditioning)?;
            let mut grads = ops::backward(&output.tokens, &after)?;
            for (sum, var) in out.iter_mut().zip(vars) {
                add(sum, grads.remove(var))?;
            }
            grad = grads.remove(&var);
            Ok(())
        })?;
        loss
    } else {
        let output = trunk.forward_range(range, input, conditioning, &mut ())?;
        let (loss, grad) = judge(&output.with_tokens(output.tokens.detach()))?;
        let mut grads = ops::backward(&output.tokens, &grad)?;
        for (sum, var) in out.iter_mut().zip(vars) {
            add(sum, grads.remove(var))?;
        }
        loss
    };
    let of = out.into_iter().zip(vars).map(|(grad, var)| match grad {
        Some(grad) => Ok(grad),
        None => Ok(var.as_tensor().detach().zeros_like()?),
    });
    Ok(Gradients {
        loss,
        of: of.collect::<Result<_>>()?,
    })
}

/// The gradient of what `judge` sees with respect to `input`, through the entries `range`; nothing is trained.
///
/// # Errors
/// When a forward or backward pass fails.
pub fn input_gradient(
    trunk: &Trunk,
    range: Range<usize>,
    input: &Stream,
    conditioning: &Conditioning,
    gradient_checkpointing: bool,
    judge: Judge,
) -> Result<Stream> {
    let plain = frozen(trunk);
    if !gradient_checkpointing {
        let (var, tracked) = tracked(input)?;
        let output = plain.forward_range(range, &tracked, conditioning, &mut ())?;
        let (_, grad) = judge(&output.with_tokens(output.tokens.detach()))?;
        return Ok(towards(&var, &output, &grad)?);
    }
    let mut inputs = Vec::with_capacity(range.len());
    let mut stream = input.clone();
    plain.visit(range.clone(), &mut |_, _, block| {
        let output = block.forward(&stream, conditioning)?;
        inputs.push(std::mem::replace(&mut stream, output));
        Ok(())
    })?;
    let (_, grad) = judge(&stream)?;
    let mut grad = stream.with_tokens(grad);
    plain.visit_back(range, &mut |_, _, block| {
        let Some(stream) = inputs.pop() else {
            candle::bail!("more blocks on the way back than on the way there")
        };
        let (var, tracked) = tracked(&stream)?;
        let output = block.forward(&tracked, conditioning)?;
        grad = towards(&var, &output, &grad.tokens)?;
        Ok(())
    })?;
    Ok(grad)
}

/// A variable with the tokens of `stream`, and the stream of it.
fn tracked(stream: &Stream) -> candle::Result<(Var, Stream)> {
    let var = Var::from_tensor(&stream.tokens)?;
    let tracked = stream.with_tokens(var.as_tensor().clone());
    Ok((var, tracked))
}

/// The gradient with respect to `var`, given that of the tokens of `output`; 0 if it has no part in them.
fn towards(var: &Var, output: &Stream, grad: &Tensor) -> candle::Result<Stream> {
    let mut grads = ops::backward(&output.tokens, grad)?;
    let grad = match grads.remove(var) {
        Some(grad) => grad,
        None => var.zeros_like()?,
    };
    Ok(output.with_tokens(grad))
}

fn add(sum: &mut Option<Tensor>, grad: Option<Tensor>) -> candle::Result<()> {
    if let Some(grad) = grad {
        *sum = Some(match sum.take() {
            None => grad,
            Some(sum) => (sum + grad)?,
        });
    }
    Ok(())
}
