//! LoRA factors under the names that PEFT and diffusers give them. Names and rows only; nothing is computed but the scale.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};

use crate::{
    checkpoint::{Checkpoint, Source, diffusers, lora},
    layout::{BlockId, BlockSpec, FluxConfig},
    model::Trunk,
};

/// Every LoRA of `trunk` as `transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight` (rank, in) and `lora_B`
/// (out, rank), f32, with the scale multiplied into B, so that loaders that know no alpha are right.
///
/// Blocks are numbered as in the unpruned model; the layout of the pruned one is in the metadata. A fused projection's parts share A and split the rows of B.
///
/// # Errors
/// When a projection has no counterpart in diffusers.
pub fn factors(config: &FluxConfig, trunk: &Trunk) -> Result<Checkpoint> {
    let mut out = Checkpoint::default();
    for (spec, block) in trunk.entries() {
        let BlockSpec::Original(BlockId { index, .. }) = spec else {
            continue;
        };
        let mut block = block.resident()?;
        for (projection, linear) in block.linears_mut() {
            let Some(lora) = linear.lora() else {
                continue;
            };
            let (blocks, modules) = diffusers::modules(&config.family, spec.kind(), projection)
                .with_context(|| format!("diffusers has no `{projection}`"))?;
            let host = |t: &Tensor| t.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu);
            let (a, b) = (host(&lora.a)?, (host(&lora.b)? * lora.scale)?);
            let rows = b.dim(0)?;
            let mut start = 0;
            for (i, module) in modules.iter().enumerate() {
                let len = match modules.len() {
                    1 => rows,
                    _ if i + 1 == modules.len() => rows - start,
                    _ => config.hidden_size,
                };
                ensure!(
                    start + len <= rows,
                    "`{projection}` has {rows} rows, too few for {modules:?}"
                );
                let name = format!("transformer.{blocks}.{index}.{module}");
                out.insert(format!("{name}.lora_A.weight"), Source::dense(&a)?);
                let part = b.narrow(0, start, len)?.contiguous()?;
                out.insert(format!("{name}.lora_B.weight"), Source::dense(&part)?);
                start += len;
            }
        }
    }
    out.metadata.insert("format".to_owned(), "pt".to_owned());
    let layout = serde_json::to_string(&config.layout)?;
    out.metadata.insert(lora::LAYOUT.to_owned(), layout);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pipeline::{ModelChoice, Pipeline},
        train::{recipe::LoraRecipe, trainables},
    };

    /// The parts, put together as diffusers would add them to its own projections, are what the fused one gets.
    #[test]
    fn the_parts_of_a_fused_projection_add_up_to_the_whole() {
        let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
        let (config, device) = (&pipeline.config, Device::Cpu);
        let vb = pipeline.transformer.var_builder(DType::F32, &device);
        let mut trunk = Trunk::load(config, &vb).unwrap();
        let recipe = LoraRecipe {
            rank: Some(3),
            alpha: Some(6.0),
            ..LoraRecipe::default()
        };
        let list = trainables::attach(
            &mut trunk,
            4..6,
            &recipe,
            1,
            &trainables::Values::new(),
            &device,
            false,
        )
        .unwrap();
        for trainable in list.iter().filter(|t| t.name.ends_with("lora-b")) {
            let noise = Tensor::randn(0f32, 1.0, trainable.var.dims(), &device).unwrap();
            trainable.var.set(&noise).unwrap();
        }
        let written = factors(config, &trunk).unwrap();
        // 10 projections of double.04, of which 2 are split in three; 3 of single.00, of which one is split in four
        assert_eq!(written.len(), 2 * ((8 + 2 * 3) + (2 + 4)));
        let get = |name: &str| written.get(name).unwrap().tensor(&device).unwrap();
        let (_, block) = &mut trunk.entries_mut()[5];
        let (_, linear1) = block
            .linears_mut()
            .into_iter()
            .find(|(name, _)| *name == "linear1")
            .unwrap();
        let merged = linear1.merge().unwrap();
        let delta = (merged.weight().unwrap() - linear1.weight().unwrap()).unwrap();
        let parts: Vec<Tensor> = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
            .iter()
            .map(|module| {
                let name = format!("transformer.single_transformer_blocks.0.{module}");
                let b = get(&format!("{name}.lora_B.weight"));
                b.matmul(&get(&format!("{name}.lora_A.weight"))).unwrap()
            })
            .collect();
        let whole = Tensor::cat(&parts, 0).unwrap();
        let difference = (whole - delta).unwrap().abs().unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
    }
}
