//! Puts what was trained into a checkpoint: the layers in place of blocks, and the LoRA added to the weights it belongs to.

use anyhow::Result;
use candle::{DType, Device, Tensor};

use super::pair::Pair;
use crate::{
    checkpoint::{Checkpoint, Source, convert},
    model::{Linear, Lora, Trunk},
};

/// The pruned checkpoint with the trained layers in it and, if `merge`, the LoRA added to the weights next to them.
///
/// Tensors keep their number format; sums are made in f32 and rounded once.
///
/// # Errors
/// When a trained tensor has no place in the checkpoint.
pub(super) fn healed(pair: &Pair, student: &Trunk, merge: bool) -> Result<Checkpoint> {
    let mut out = pair.pruned.transformer.clone();
    let slots = pair.pruned.config.slots();
    for ((_, prefix), (_, block)) in slots.into_iter().zip(student.entries()) {
        let Some(prefix) = prefix else {
            continue;
        };
        let mut block = block.resident()?;
        for (projection, linear) in block.linears_mut() {
            let name = format!("{prefix}.{projection}");
            let weight = linear.weight()?;
            for (part, value) in [("weight", Some(&weight)), ("bias", linear.bias())] {
                if let Some(value) = value.filter(|v| v.is_variable()) {
                    insert(&mut out, &format!("{name}.{part}"), value)?;
                }
            }
            if let Some(lora) = linear.lora().filter(|_| merge)
                && moved(&lora.b)?
            {
                let name = format!("{name}.weight");
                let base = out.expect(&name)?.tensor_as(DType::F32, &Device::Cpu)?;
                let mut sum = Linear::new(base, None)?;
                sum.set_lora(Some(Lora {
                    a: host(&lora.a)?,
                    b: host(&lora.b)?,
                    scale: lora.scale,
                }))?;
                insert(&mut out, &name, &sum.merge()?.weight()?)?;
            }
        }
    }
    Ok(convert::for_safetensors(&out).0)
}

fn host(t: &Tensor) -> Result<Tensor> {
    Ok(t.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// Whether a B is no longer zero; a weight whose LoRA was not trained keeps its bytes.
fn moved(b: &Tensor) -> Result<bool> {
    Ok(host(b)?.abs()?.max_all()?.to_scalar::<f32>()? > 0.0)
}

/// Puts a value in the place of a tensor, in its number format if that is a float of 16 bits or more.
fn insert(out: &mut Checkpoint, name: &str, value: &Tensor) -> Result<()> {
    let dtype = out.expect(name)?.format().of_changed();
    let value = host(value)?.to_dtype(dtype)?;
    out.insert(name, Source::dense(&value)?);
    Ok(())
}
