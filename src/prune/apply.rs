//! A plan and its fitted layers × a checkpoint → the pruned checkpoint: renames and inserts only.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle::DType;

use super::{plan::PruningPlan, projections::OutputProjections};
use crate::{
    checkpoint::{Checkpoint, Source, keys},
    fit::layers::LayerMap,
    layout::{BlockId, BlockSpec, FluxConfig},
};

/// The pruned checkpoint: kept blocks as they are, replaced ones as `linear.*` in their slot.
///
/// No kept tensor is read. The new layers are stored in the number format of the block that they replace.
///
/// # Errors
/// When the plan does not fit the model or a layer is missing.
pub fn apply(
    checkpoint: &Checkpoint,
    config: &FluxConfig,
    plan: &PruningPlan,
    layers: &LayerMap,
) -> Result<(Checkpoint, FluxConfig)> {
    plan.validate(config)?;
    let pruned = FluxConfig {
        layout: plan.layout(config),
        ..config.clone()
    };
    // where the blocks stood, and where what stays of them goes
    let old: BTreeMap<String, BlockSpec> = config
        .slots()
        .into_iter()
        .filter_map(|(spec, prefix)| Some((prefix?, spec.clone())))
        .collect();
    let new: Vec<(BlockSpec, String)> = pruned
        .slots()
        .into_iter()
        .filter_map(|(spec, prefix)| Some((spec.clone(), prefix?)))
        .collect();
    let target = |spec: &BlockSpec| {
        new.iter()
            .find(|(s, _)| s == spec)
            .map(|(_, prefix)| prefix.as_str())
    };
    let mut out = checkpoint.rename(|name| {
        let Some(key) = keys::parse(name) else {
            return Some(name.to_owned());
        };
        let spec = old.get(&format!("{}.{}", key.kind.prefix(), key.slot))?;
        Some(format!("{}.{}", target(spec)?, key.tail))
    })?;
    for replacement in plan
        .replace
        .iter()
        .filter(|r| r.form != crate::layout::Form::Remove)
    {
        let id = *replacement
            .replaces
            .first()
            .context("the plan has a replacement of no block")?;
        let layers = layers
            .get(&id)
            .with_context(|| format!("no layer was fitted for {id}"))?;
        let prefix = target(&BlockSpec::Replaced(replacement.clone()))
            .context("a replacement has no slot")?;
        let dtype = block_dtype(checkpoint, &old, id);
        for (name, tensor) in layers.tensors()? {
            out.insert(
                format!("{prefix}.{name}"),
                Source::dense_as(&tensor, dtype)?,
            );
        }
    }
    Ok((out, pruned))
}

/// Puts new output projections of what is kept into a pruned checkpoint, in the number format of those they replace.
///
/// # Errors
/// When the checkpoint lacks one.
pub fn put_output_projections(
    checkpoint: &mut Checkpoint,
    pruned: &FluxConfig,
    projections: &OutputProjections,
) -> Result<()> {
    for ((block, name), projection) in projections {
        let prefix = match block {
            None => (*name).to_owned(),
            Some(id) => {
                let mut slots = pruned.slots().into_iter();
                let slot = slots.find(|(spec, _)| **spec == BlockSpec::Original(*id));
                let prefix = slot.and_then(|(_, prefix)| prefix);
                format!(
                    "{}.{name}",
                    prefix.with_context(|| format!("{id} is not kept"))?
                )
            }
        };
        let parts = [
            ("weight", Some(&projection.weight)),
            ("bias", projection.bias.as_ref()),
        ];
        for (part, tensor) in parts {
            let Some(tensor) = tensor else { continue };
            let name = format!("{prefix}.{part}");
            let before = checkpoint
                .get(&name)
                .with_context(|| format!("the checkpoint has no `{name}`"))?;
            let dtype = before.format().of_changed();
            checkpoint.insert(name, Source::dense_as(tensor, dtype)?);
        }
    }
    Ok(())
}

/// The number format of what replaces a block, by its first weight.
fn block_dtype(checkpoint: &Checkpoint, slots: &BTreeMap<String, BlockSpec>, id: BlockId) -> DType {
    let prefix = slots
        .iter()
        .find(|(_, spec)| **spec == BlockSpec::Original(id))
        .map(|(prefix, _)| format!("{prefix}."));
    let weight = checkpoint.iter().find(|(name, source)| {
        source.shape().len() == 2
            && prefix
                .as_ref()
                .is_some_and(|prefix| name.starts_with(prefix))
    });
    weight.map_or(DType::F32, |(_, source)| source.format().of_changed())
}
