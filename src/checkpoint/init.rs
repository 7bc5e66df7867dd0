//! A randomly initialised FLUX transformer of any layout, made while it is written: for tests and benchmarks.

use std::path::Path;

use anyhow::Result;
use safetensors::Dtype;
use serde::Serialize;

use super::{Checkpoint, Source, output::Naming, random::Random, shapes};
use crate::{layout::FluxConfig, ui};

/// Deviation of biases.
const BIAS: f32 = 0.02;
/// Weights are N(0, (gain/√inputs)²): what goes in comes out at `gain` times its size.
const GAIN: f32 = 1.0;
/// Gates of this size let the residual stream grow by a few per cent a block: 57 blocks stay far inside 16-bit floats.
const MODULATION_GAIN: f32 = 0.3;
/// A replacement's y = x + Wx multiplies the stream; a block adds to it.
const REPLACEMENT_GAIN: f32 = 0.1;

/// The checkpoint, under canonical names. Every tensor depends on the seed and its own name alone.
///
/// # Errors
/// When `dtype` is not f32, f16 or bf16.
pub fn random(config: &FluxConfig, seed: u64, dtype: Dtype) -> Result<Checkpoint> {
    let mut out = Checkpoint {
        name: format!("random, seed {seed}"),
        ..Checkpoint::default()
    };
    for (name, shape) in shapes::tensors(config) {
        let (mean, std) = distribution(&name, &shape);
        let random = Random::new(seed, &name, dtype, mean, std)?;
        out.insert(name, Source::random(shape, random));
    }
    Ok(out)
}

/// Mean and deviation of a tensor's values.
fn distribution(name: &str, shape: &[usize]) -> (f32, f32) {
    if name.ends_with("_norm.scale") {
        return (1.0, 0.0);
    }
    let [_, inputs] = shape else {
        return (0.0, BIAS);
    };
    let has = |part: &str| name.contains(part);
    let gain = if has("modulation") || has("_mod.") || has(".vec.") {
        MODULATION_GAIN
    } else if has(".linear.") && !name.starts_with("final_layer") {
        REPLACEMENT_GAIN
    } else {
        GAIN
    };
    (0.0, gain / (*inputs as f32).sqrt())
}

/// What `init` made, or would make.
#[derive(Clone, Debug, Serialize)]
pub struct InitReport {
    /// The file.
    pub output: Option<String>,
    /// Whether it was written.
    pub written: bool,
    /// Seed of the weights.
    pub seed: u64,
    /// Number format of the weights.
    pub dtype: String,
    /// Whose names the tensors have.
    pub layout: Naming,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of the largest tensor.
    pub largest_tensor_bytes: Option<usize>,
    /// Numbers in all tensors.
    pub parameters: usize,
    /// Bytes of all tensors.
    pub bytes: usize,
}

impl InitReport {
    /// About `checkpoint`, for `output`, written or not.
    pub fn new(
        checkpoint: &Checkpoint,
        output: Option<&Path>,
        written: bool,
        seed: u64,
        layout: Naming,
    ) -> Self {
        let dtypes = checkpoint
            .iter()
            .map(|(_, source)| source.format().to_string());
        Self {
            output: output.map(|path| path.display().to_string()),
            written,
            seed,
            dtype: dtypes.last().unwrap_or_default(),
            layout,
            tensors: checkpoint.len(),
            largest_tensor_bytes: checkpoint.iter().map(|(_, s)| Source::byte_len(s)).max(),
            parameters: checkpoint.parameters(),
            bytes: checkpoint.bytes(),
        }
    }

    /// One line for people.
    pub fn text(&self) -> String {
        let place = match &self.output {
            Some(path) if self.written => format!(", in {path}"),
            _ => " (nothing written)".to_owned(),
        };
        format!(
            "{} parameters in {} tensors of {}, {}{place}",
            ui::count(self.parameters as f64),
            self.tensors,
            self.dtype,
            ui::bytes(self.bytes as f64),
        )
    }
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device, Tensor};

    use super::*;
    use crate::{
        layout::{BlockId, BlockSpec, Form, Replacement, unpruned},
        model::{Flux, Inputs},
    };

    /// FLUX.1's depth, narrow.
    fn deep() -> FluxConfig {
        let mut layout = unpruned(19, 38);
        for (k, form) in [
            (3, Form::Linear),
            (30, Form::Conditioned),
            (31, Form::Modulated),
            (40, Form::Remove),
        ] {
            let BlockSpec::Original(id) = layout[k] else {
                unreachable!()
            };
            layout[k] = BlockSpec::Replaced(Replacement {
                replaces: vec![id],
                form,
                joint: false,
            });
        }
        FluxConfig {
            in_channels: 8,
            out_channels: 8,
            hidden_size: 64,
            num_heads: 2,
            mlp_size: 256,
            context_in_dim: 16,
            vec_in_dim: 12,
            guidance_embed: true,
            axes_dims: vec![8, 12, 12],
            theta: 1e4,
            family: crate::layout::Family::FLUX1,
            layout,
        }
    }

    #[test]
    fn the_model_computes_and_its_stream_stays_small_through_57_blocks() {
        let config = deep();
        let checkpoint = random(&config, 1, Dtype::BF16).unwrap();
        let cpu = Device::Cpu;
        let flux = Flux::new(&config, checkpoint.var_builder(DType::F32, &cpu)).unwrap();
        let normal = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &cpu).unwrap();
        let (img, txt, vec) = (normal(&[1, 6, 8]), normal(&[1, 4, 16]), normal(&[1, 12]));
        let ids = |n: usize| Tensor::zeros((n, 3), DType::F32, &cpu).unwrap();
        let (img_ids, txt_ids) = (ids(6), ids(4));
        let one = |v: f32| Tensor::new(&[v], &cpu).unwrap();
        let (timestep, guidance) = (one(0.7), one(3.5));
        let inputs = Inputs {
            img: &img,
            img_ids: &img_ids,
            txt: &txt,
            txt_ids: &txt_ids,
            timestep: &timestep,
            vec: &vec,
            guidance: Some(&guidance),
        };
        struct Largest(f32, usize);
        impl crate::model::Observer for Largest {
            fn block(
                &mut self,
                _: usize,
                _: &BlockSpec,
                _: &crate::model::Conditioning,
                _: &crate::model::Stream,
                output: &crate::model::Stream,
            ) -> candle::Result<()> {
                let max = output.tokens.abs()?.max_all()?.to_scalar::<f32>()?;
                // `max` would pass over a NaN
                self.0 = if max.is_nan() { max } else { self.0.max(max) };
                self.1 += 1;
                Ok(())
            }
        }
        let mut seen = Largest(0.0, 0);
        let velocity = flux.forward(&inputs, &mut seen).unwrap();
        assert_eq!(seen.1, config.layout.len());
        assert!((0.1..1000.0).contains(&seen.0), "{}", seen.0);
        let size = velocity.sqr().unwrap().mean_all().unwrap();
        assert!((0.01..100.0).contains(&size.to_scalar::<f32>().unwrap()));
    }

    #[test]
    fn a_tensor_depends_on_seed_and_name_not_on_the_other_tensors() {
        let config = deep();
        let mut shorter = config.clone();
        shorter.layout = vec![BlockSpec::Original(BlockId::double(0))];
        let bytes = |config: &FluxConfig, seed, name: &str| {
            let checkpoint = random(config, seed, Dtype::F16).unwrap();
            checkpoint.get(name).unwrap().bytes().unwrap().into_owned()
        };
        let name = "double_blocks.0.img_attn.qkv.weight";
        assert_eq!(bytes(&config, 5, name), bytes(&shorter, 5, name));
        assert_ne!(bytes(&config, 5, name), bytes(&config, 6, name));
        let scale = bytes(&config, 5, "double_blocks.0.img_attn.norm.key_norm.scale");
        assert!(
            scale
                .as_chunks()
                .0
                .iter()
                .all(|b| half::f16::from_le_bytes(*b) == half::f16::ONE)
        );
    }
}
