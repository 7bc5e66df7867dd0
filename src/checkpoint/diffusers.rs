//! diffusers' tensor names ⇄ the original ones, both ways, without touching a byte.
//!
//! diffusers splits the fused projections by rows (`qkv` → `to_q`, `to_k`, `to_v`) and swaps shift and scale of the
//! final modulation; both are row ranges, so a converted checkpoint is still only ranges of the mapped files.
//! Source: diffusers `scripts/convert_flux_to_diffusers.py`.

use anyhow::{Context, Result, bail, ensure};

use super::{Checkpoint, Source, diffusers_names as names, keys, part::transformer_name};
use crate::layout::{BlockKind, Family, FluxConfig};
pub(super) use names::FINAL_MODULATION;

/// What stands for a replaced block keeps its name in both namings.
const REPLACEMENT: &str = "linear.";

/// Modules outside of the blocks but the final modulation: original and diffusers' names.
pub(super) fn global_modules(
    config: &FluxConfig,
) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
    names::of(&config.family).global.iter().copied()
}

/// Modules of a block: original names, and the diffusers modules whose rows make them up.
pub(super) fn block_modules(config: &FluxConfig, kind: BlockKind) -> names::Modules {
    names::of(&config.family).block(kind).0
}

/// A block's norms, which have a scale for each channel and nothing else: modules, original and diffusers'.
pub(super) fn block_norms(
    config: &FluxConfig,
    kind: BlockKind,
) -> impl Iterator<Item = (&'static str, &'static str)> {
    let norms = names::of(&config.family).block(kind).1.iter();
    norms.filter_map(|(ours, theirs)| {
        Some((
            ours.strip_suffix(".scale")?,
            theirs.strip_suffix(".weight")?,
        ))
    })
}

/// diffusers' prefix of all blocks of a kind.
pub(super) fn block_prefix(kind: BlockKind) -> &'static str {
    match kind {
        BlockKind::Double => "transformer_blocks",
        BlockKind::Single => "single_transformer_blocks",
    }
}

/// The diffusers modules whose rows make up a block's projection, and diffusers' name for blocks of that kind.
pub fn modules(
    family: &Family,
    kind: BlockKind,
    projection: &str,
) -> Option<(&'static str, &'static [&'static str])> {
    let (_, modules) = names::of(family)
        .block(kind)
        .0
        .iter()
        .find(|(name, _)| *name == projection)?;
    Some((block_prefix(kind), modules))
}

/// Whether the tensor names are those of diffusers' `FluxTransformer2DModel` or `Flux2Transformer2DModel`.
pub fn is_diffusers(checkpoint: &Checkpoint) -> bool {
    let kinds = [BlockKind::Double, BlockKind::Single].map(block_prefix);
    let mut names = checkpoint.names().filter_map(transformer_name);
    names.any(|name| kinds.contains(&name.split('.').next().unwrap_or_default()))
}

/// The same tensors under the original names.
///
/// # Errors
/// When a part of a fused projection is missing, or a tensor is none of FLUX's.
pub fn to_original(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    let mut out = Checkpoint {
        name: checkpoint.name.clone(),
        metadata: checkpoint.metadata.clone(),
        ..Checkpoint::default()
    };
    let tables = names::of(&keys::family(checkpoint.names()));
    for (name, source) in checkpoint.iter() {
        let context = || format!("`{}`: tensor `{name}`", checkpoint.name);
        let kinds = [BlockKind::Double, BlockKind::Single];
        let block = kinds.into_iter().find_map(|kind| {
            let rest = name.strip_prefix(block_prefix(kind))?.strip_prefix('.')?;
            let (slot, tail) = rest.split_once('.')?;
            Some((kind, slot.parse::<usize>().ok()?, tail))
        });
        match block {
            Some((kind, slot, tail)) => {
                let theirs = format!("{}.{slot}", block_prefix(kind));
                let ours = format!("{}.{slot}", kind.prefix());
                if let Some((new, source)) =
                    block_tensor(checkpoint, (tables, kind), &theirs, tail, source)
                        .with_context(context)?
                {
                    out.insert(format!("{ours}.{new}"), source);
                }
            }
            None => {
                let (new, source) = global_tensor(tables, name, source).with_context(context)?;
                out.insert(new, source);
            }
        }
    }
    Ok(out)
}

/// The original tail and tensor of one tensor of a block; `None` for the later parts of a fused projection.
fn block_tensor(
    checkpoint: &Checkpoint,
    (tables, kind): (names::Tables, BlockKind),
    prefix: &str,
    tail: &str,
    source: &Source,
) -> Result<Option<(String, Source)>> {
    let (modules, norms) = tables.block(kind);
    if tail.starts_with(REPLACEMENT) {
        return Ok(Some((tail.to_owned(), source.clone())));
    }
    if let Some((ours, _)) = norms.iter().find(|(_, theirs)| *theirs == tail) {
        return Ok(Some(((*ours).to_owned(), source.clone())));
    }
    let (module, leaf) = tail.rsplit_once('.').unwrap_or((tail, ""));
    let Some((ours, parts)) = modules.iter().find(|(_, parts)| parts.contains(&module)) else {
        bail!("is not part of a FLUX {} block", kind.as_str());
    };
    if parts[0] != module {
        // fused with the first part; only check that there is one
        ensure!(
            checkpoint.contains(&format!("{prefix}.{}.{leaf}", parts[0])),
            "`{}` is missing",
            parts[0]
        );
        return Ok(None);
    }
    let sources = parts
        .iter()
        .map(|part| {
            let name = format!("{prefix}.{part}.{leaf}");
            let source = checkpoint.expect(&name)?;
            ensure!(
                parts.len() == 1 || !source.shape().is_empty(),
                "`{name}` is a single number, expected rows"
            );
            Ok(source.clone())
        })
        .collect::<Result<Vec<_>>>()?;
    let fused = if let [one] = sources.as_slice() {
        one.clone()
    } else {
        Source::stack_rows(&sources)?
    };
    Ok(Some((format!("{ours}.{leaf}"), fused)))
}

fn global_tensor(tables: names::Tables, name: &str, source: &Source) -> Result<(String, Source)> {
    let (module, leaf) = name.rsplit_once('.').unwrap_or((name, ""));
    if module == FINAL_MODULATION.1 {
        return Ok((
            format!("{}.{leaf}", FINAL_MODULATION.0),
            swap_halves(source)?,
        ));
    }
    let Some((ours, _)) = tables.global.iter().find(|(_, theirs)| *theirs == module) else {
        bail!("is not part of a FLUX transformer");
    };
    Ok((format!("{ours}.{leaf}"), source.clone()))
}

/// The same tensors under diffusers' names.
///
/// # Errors
/// When a tensor has no counterpart there or a fused projection has the wrong number of rows.
pub fn from_original(checkpoint: &Checkpoint) -> Result<Checkpoint> {
    let mut out = Checkpoint {
        name: checkpoint.name.clone(),
        metadata: checkpoint.metadata.clone(),
        ..Checkpoint::default()
    };
    let tables = names::of(&keys::family(checkpoint.names()));
    for (name, source) in checkpoint.iter() {
        let context = || format!("`{}`: tensor `{name}`", checkpoint.name);
        for (new, source) in
            split_original(checkpoint, tables, name, source).with_context(context)?
        {
            out.insert(new, source);
        }
    }
    Ok(out)
}

fn split_original(
    checkpoint: &Checkpoint,
    tables: names::Tables,
    name: &str,
    source: &Source,
) -> Result<Vec<(String, Source)>> {
    let (module, leaf) = name.rsplit_once('.').unwrap_or((name, ""));
    let Some(key) = keys::parse(name) else {
        if module == FINAL_MODULATION.0 {
            return Ok(vec![(
                format!("{}.{leaf}", FINAL_MODULATION.1),
                swap_halves(source)?,
            )]);
        }
        let Some((_, theirs)) = tables.global.iter().find(|(ours, _)| *ours == module) else {
            bail!("has no counterpart in diffusers");
        };
        return Ok(vec![(format!("{theirs}.{leaf}"), source.clone())]);
    };
    let prefix = format!("{}.{}", block_prefix(key.kind), key.slot);
    let (modules, norms) = tables.block(key.kind);
    if key.tail.starts_with(REPLACEMENT) {
        return Ok(vec![(format!("{prefix}.{}", key.tail), source.clone())]);
    }
    if let Some((_, theirs)) = norms.iter().find(|(ours, _)| *ours == key.tail) {
        return Ok(vec![(format!("{prefix}.{theirs}"), source.clone())]);
    }
    let module_tail = key.tail.rsplit_once('.').map_or(key.tail, |(m, _)| m);
    let Some((_, parts)) = modules.iter().find(|(ours, _)| *ours == module_tail) else {
        bail!("has no counterpart in diffusers");
    };
    if let [one] = parts {
        return Ok(vec![(format!("{prefix}.{one}.{leaf}"), source.clone())]);
    }
    // every part has as many rows as the stream is wide, the last one takes what is left (the MLP of a single block)
    let [rows, width] = checkpoint.dims::<2>(&format!("{module}.weight"))?;
    ensure!(
        rows > width * (parts.len() - 1),
        "has {rows} rows, too few for {} parts of {width}",
        parts.len()
    );
    let part = |i: usize| {
        let end = if i + 1 == parts.len() {
            rows
        } else {
            (i + 1) * width
        };
        Ok((
            format!("{prefix}.{}.{leaf}", parts[i]),
            source.rows(i * width..end)?,
        ))
    };
    (0..parts.len()).map(part).collect()
}

fn swap_halves(source: &Source) -> Result<Source> {
    let rows = source.shape().first().copied().unwrap_or(0);
    ensure!(rows % 2 == 0, "has {rows} rows, expected an even number");
    Source::stack_rows(&[source.rows(rows / 2..rows)?, source.rows(0..rows / 2)?])
}

#[cfg(test)]
mod tests {
    use candle::{Device, Tensor};

    use super::*;

    fn dense(rows: usize, columns: usize, start: f32) -> Source {
        let n = (rows * columns) as f32;
        let values = Tensor::arange(start, start + n, &Device::Cpu).unwrap();
        Source::dense(&values.reshape((rows, columns)).unwrap()).unwrap()
    }

    #[test]
    fn names_convert_there_and_back_without_changing_a_byte() {
        let mut original = Checkpoint::default();
        for (name, rows, columns) in [
            ("img_in.weight", 4, 2),
            ("single_blocks.0.linear1.weight", 4 * 3 + 7, 4),
            ("single_blocks.0.norm.query_norm.scale", 1, 2),
            ("double_blocks.1.img_attn.qkv.weight", 12, 4),
            ("double_blocks.1.linear.txt.weight", 4, 4),
            ("final_layer.adaLN_modulation.1.weight", 8, 4),
        ] {
            original.insert(name, dense(rows, columns, rows as f32));
        }
        let theirs = from_original(&original).unwrap();
        assert_eq!(
            theirs
                .get("single_transformer_blocks.0.proj_mlp.weight")
                .unwrap()
                .shape(),
            [7, 4]
        );
        assert!(theirs.contains("transformer_blocks.1.linear.txt.weight"));
        let halves = theirs
            .get("norm_out.linear.weight")
            .unwrap()
            .bytes()
            .unwrap()
            .into_owned();
        assert_ne!(
            halves,
            *original
                .get("final_layer.adaLN_modulation.1.weight")
                .unwrap()
                .bytes()
                .unwrap()
        );
        let back = to_original(&theirs).unwrap();
        assert_eq!(
            back.names().collect::<Vec<_>>(),
            original.names().collect::<Vec<_>>()
        );
        for (name, source) in original.iter() {
            assert_eq!(
                back.get(name).unwrap().bytes().unwrap(),
                source.bytes().unwrap(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_missing_part_of_a_fused_projection_is_named() {
        let mut theirs = Checkpoint {
            name: "x".into(),
            ..Checkpoint::default()
        };
        theirs.insert(
            "single_transformer_blocks.0.attn.to_q.weight",
            dense(4, 4, 0.),
        );
        theirs.insert(
            "single_transformer_blocks.0.attn.to_k.weight",
            dense(4, 4, 0.),
        );
        let error = format!("{:#}", to_original(&theirs).unwrap_err());
        assert!(
            error.contains("single_transformer_blocks.0.attn.to_v.weight"),
            "{error}"
        );
    }
}
