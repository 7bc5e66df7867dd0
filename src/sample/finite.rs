//! Looks for NaN and infinity after every block, so that a damaged model is named by its block.

use candle::{DType, Result};

use super::is_finite;
use crate::{
    layout::BlockSpec,
    model::{Conditioning, Observer, Stream},
};

/// Fails after the first block whose output is not finite; the message names it.
#[derive(Clone, Copy, Debug)]
pub struct FiniteCheck;

impl Observer for FiniteCheck {
    fn block(
        &mut self,
        _: usize,
        spec: &BlockSpec,
        conditioning: &Conditioning,
        _: &Stream,
        output: &Stream,
    ) -> Result<()> {
        if is_finite(&output.tokens)? {
            return Ok(());
        }
        let times = conditioning.timestep.to_dtype(DType::F32)?;
        let t = times.flatten_all()?.to_vec1::<f32>()?;
        let hint = match output.tokens.dtype() {
            DType::F32 => "",
            _ => "try --dtype f32; if that does not help, ",
        };
        candle::bail!(
            "block {}: activations are NaN or infinite at timestep {:.3}\nhint: {hint}the weights of that block are damaged: use another copy of the transformer's files",
            spec.id(),
            t.first().copied().unwrap_or_default()
        )
    }
}
