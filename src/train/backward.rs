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
        let plain = frozen(trunk);
        let mut inputs = Vec::with_capacity(range.len());
        let mut stream = input.clone();
        for index in range.clone() {
            inputs.push(stream.clone());
            stream = plain.forward_range(index..index + 1, &stream, conditioning, &mut ())?;
        }
        let (loss, mut grad) = judge(&stream)?;
        drop(stream);
        for (index, stream) in range.clone().zip(inputs).rev() {
            let var = Var::from_tensor(&stream.tokens)?;
            let tracked = Stream {
                tokens: var.as_tensor().clone(),
                txt_len: stream.txt_len,
            };
            let output = trunk.forward_range(index..index + 1, &tracked, conditioning, &mut ())?;
            let mut grads = ops::total(&(output.tokens * grad)?)?.backward()?;
            for (sum, var) in out.iter_mut().zip(vars) {
                add(sum, grads.remove(var))?;
            }
            match grads.remove(&var) {
                Some(next) if index > range.start => grad = next,
                _ => break,
            }
        }
        loss
    } else {
        let output = trunk.forward_range(range, input, conditioning, &mut ())?;
        let plain = Stream {
            tokens: output.tokens.detach(),
            txt_len: output.txt_len,
        };
        let (loss, grad) = judge(&plain)?;
        let mut grads = ops::total(&(output.tokens * grad)?)?.backward()?;
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
    let ranges: Vec<Range<usize>> = if gradient_checkpointing {
        range.map(|index| index..index + 1).collect()
    } else {
        vec![range]
    };
    let plain = frozen(trunk);
    let mut inputs = Vec::with_capacity(ranges.len());
    let mut stream = input.clone();
    for range in &ranges {
        inputs.push(stream.clone());
        stream = plain.forward_range(range.clone(), &stream, conditioning, &mut ())?;
    }
    let (_, mut grad) = judge(&stream)?;
    for (range, stream) in ranges.into_iter().zip(inputs).rev() {
        let var = Var::from_tensor(&stream.tokens)?;
        let tracked = Stream {
            tokens: var.as_tensor().clone(),
            txt_len: stream.txt_len,
        };
        let output = plain.forward_range(range, &tracked, conditioning, &mut ())?;
        let mut grads = ops::total(&(output.tokens * grad)?)?.backward()?;
        grad = match grads.remove(&var) {
            Some(grad) => grad,
            None => stream.tokens.zeros_like()?,
        };
    }
    Ok(Stream {
        tokens: grad,
        txt_len: input.txt_len,
    })
}

fn add(sum: &mut Option<Tensor>, grad: Option<Tensor>) -> Result<()> {
    if let Some(grad) = grad {
        *sum = Some(match sum.take() {
            None => grad,
            Some(sum) => (sum + grad)?,
        });
    }
    Ok(())
}
