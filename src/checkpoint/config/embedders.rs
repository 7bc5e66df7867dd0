//! The tensors outside of the blocks: all are there, with the shapes that their biases say.

use anyhow::{Result, ensure};

use super::super::{Checkpoint, Source, keys};
use crate::layout::Family;

/// Every FLUX has these outside of its blocks.
const EMBEDDERS: [&str; 6] = [
    "vector_in.in_layer.weight",
    "img_in.weight",
    "txt_in.weight",
    "time_in.in_layer.weight",
    "final_layer.linear.weight",
    "final_layer.adaLN_modulation.1.weight",
];

/// Fails where tensors outside of the blocks are missing, or do not fit their biases.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<()> {
    let family = keys::family(checkpoint.names());
    // FLUX.2 takes no pooled text
    let embedders = &EMBEDDERS[usize::from(family != Family::FLUX1)..];
    let missing: Vec<String> = embedders
        .iter()
        .filter(|name| !checkpoint.contains(name))
        .map(|name| format!("`{name}`"))
        .collect();
    ensure!(
        missing.is_empty(),
        "`{}` holds blocks of a {} transformer but lacks {}: the file is incomplete\nhint: use a file of the whole transformer",
        checkpoint.name,
        family.name(),
        missing.join(", ")
    );
    for name in embedders.iter().copied() {
        let [rows, columns] = checkpoint.dims(name)?;
        let bias = checkpoint.get(&name.replace(".weight", ".bias"));
        if rows * columns > 0
            && let Some(&[said]) = bias.map(Source::shape)
        {
            ensure!(
                said == rows || said == 0 || !(rows * columns).is_multiple_of(said),
                "`{}`: the values of tensor `{name}` are rearranged: its shape is [{rows}, {columns}], and its bias says [{said}, {}]\nhint: a GGUF file of such a tensor names its shape in `comfy.gguf.orig_shape.{name}`; use a file that does, or convert it again",
                checkpoint.name,
                rows * columns / said
            );
        }
    }
    Ok(())
}
