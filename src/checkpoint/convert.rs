//! What becomes of each tensor when a model is written in another number format. Nothing is read or written here.

use anyhow::{Context, Result};
use candle::quantized::GgmlDType;
use safetensors::Dtype;

use super::{Checkpoint, Source, dtype::StorageDType, keys};
use crate::quant::{F8_MAX, QuantType};

/// What a model is converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// All tensors as floats of one width, in safetensors.
    Plain(Dtype),
    /// The kept blocks' matrices as float8 in safetensors, replacement layers in 16 bits, the rest as it is; with a scale for each matrix or without.
    Float8 {
        /// Whether each matrix is scaled to the range of float8.
        scaled: bool,
    },
    /// The kept blocks' matrices as GGML blocks of this format in GGUF, replacement layers as `Q8_0`, the rest as floats.
    Gguf(QuantType),
}

impl Target {
    /// The format that a tensor gets.
    ///
    /// Layers that stand for replaced blocks act on the stream itself, which nothing has normalised: few as their
    /// weights are, in 4 or 8-bit floats they would cost as much error as all kept blocks together.
    pub fn format(self, name: &str, source: &Source) -> StorageDType {
        let matrix = source.shape().len() == 2;
        let key = keys::parse(name).filter(|_| matrix);
        let (of_block, of_replacement) = (key.is_some(), key.is_some_and(|k| k.of_replacement()));
        // what is not in the blocks stays in floats, as wide as it was
        let float = match source.format() {
            StorageDType::Quantized(_) => StorageDType::Plain(Dtype::BF16),
            plain @ StorageDType::Plain(_) => plain,
        };
        match self {
            Self::Plain(dtype) => StorageDType::Plain(dtype),
            // what was packed before gains nothing by dequantizing
            Self::Float8 { .. }
                if of_replacement && source.format().dtype() != Some(Dtype::F8_E4M3) =>
            {
                match float {
                    StorageDType::Plain(Dtype::F16) => float,
                    _ => StorageDType::Plain(Dtype::BF16),
                }
            }
            Self::Float8 { .. } if of_block => StorageDType::Quantized(QuantType::F8E4M3),
            // ComfyUI-GGUF and llama.cpp keep vectors in f32
            Self::Gguf(_) if !matrix => StorageDType::Plain(Dtype::F32),
            Self::Gguf(packed) if of_block => {
                let width = source.shape().last().copied().unwrap_or(0);
                let fits = |packed: &QuantType| width.is_multiple_of(packed.block());
                let q8_0 = QuantType::Blocks(GgmlDType::Q8_0);
                [if of_replacement { q8_0 } else { packed }, q8_0]
                    .into_iter()
                    .find(fits)
                    .map_or(StorageDType::Plain(Dtype::F16), StorageDType::Quantized)
            }
            Self::Float8 { .. } | Self::Gguf(_) => float,
        }
    }

    /// Whether a tensor is to be scaled: its largest magnitude is needed before it is written.
    pub fn scales(self, name: &str, source: &Source) -> bool {
        let packed = StorageDType::Quantized(QuantType::F8E4M3);
        self == (Self::Float8 { scaled: true })
            && self.format(name, source) == packed
            && source.format() != packed
    }
}

/// The checkpoint in another format, each tensor converted while it is written.
///
/// `largest` is asked for the largest magnitude of each matrix that is scaled.
///
/// # Errors
/// Those of `largest`, with the tensor's name.
pub fn converted(
    checkpoint: &Checkpoint,
    target: Target,
    largest: &mut dyn FnMut(&Source) -> Result<f32>,
) -> Result<Checkpoint> {
    let mut out = Checkpoint {
        name: checkpoint.name.clone(),
        metadata: checkpoint.metadata.clone(),
        ..Checkpoint::default()
    };
    for (name, source) in checkpoint.iter() {
        let format = target.format(name, source);
        let scale = if target.scales(name, source) {
            let most = largest(source)
                .with_context(|| format!("`{}`: tensor `{name}`", checkpoint.name))?;
            // zeros stay zeros whatever the scale
            Some(if most > 0.0 { most / F8_MAX } else { 1.0 })
        } else {
            None
        };
        let keeps = format == source.format() && target == (Target::Float8 { scaled: true });
        let converted = if keeps {
            source.clone()
        } else {
            source.converted(format, scale)
        };
        out.insert(name, converted);
    }
    Ok(out)
}

/// The checkpoint with GGML's blocks, which safetensors cannot hold, as bf16, and how many tensors that are.
pub fn for_safetensors(checkpoint: &Checkpoint) -> (Checkpoint, usize) {
    let (mut out, mut count) = (checkpoint.clone(), 0);
    for (name, source) in checkpoint.iter() {
        if source.format().dtype().is_none() {
            out.insert(
                name,
                source.converted(StorageDType::Plain(Dtype::BF16), None),
            );
            count += 1;
        }
    }
    (out, count)
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn replacement_layers_keep_enough_bits() -> Result<()> {
        let source = |dtype| -> Result<Source> {
            Source::dense(&Tensor::ones((4, 256), dtype, &Device::Cpu)?)
        };
        let (plain, q8_0) = (
            StorageDType::Plain,
            StorageDType::Quantized(QuantType::Blocks(GgmlDType::Q8_0)),
        );
        let f8 = StorageDType::Quantized(QuantType::F8E4M3);
        let q4_k = QuantType::Blocks(GgmlDType::Q4K);
        let float8 = Target::Float8 { scaled: true };
        let [layer, kept] =
            ["linear.img.weight", "linear1.weight"].map(|tail| format!("single_blocks.0.{tail}"));
        let packed = source(DType::F32)?.converted(f8, None);
        for (target, source, of_layer, of_kept) in [
            (float8, source(DType::F32)?, plain(Dtype::BF16), f8),
            (float8, source(DType::BF16)?, plain(Dtype::BF16), f8),
            (float8, source(DType::F16)?, plain(Dtype::F16), f8),
            (float8, packed, f8, f8),
            (
                Target::Gguf(q4_k),
                source(DType::BF16)?,
                q8_0,
                StorageDType::Quantized(q4_k),
            ),
        ] {
            let found = [&layer, &kept].map(|name| target.format(name, &source));
            assert_eq!(
                found,
                [of_layer, of_kept],
                "{target:?} of {}",
                source.format()
            );
            assert!(!target.scales(&layer, &source), "{target:?}");
        }
        Ok(())
    }
}
