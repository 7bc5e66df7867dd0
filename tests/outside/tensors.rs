//! Golden files taken apart and put together otherwise.

use std::{collections::HashMap, fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::common::golden;

/// Tensors under their names: number format, shape, bytes.
pub(crate) type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a golden file.
pub(crate) fn read(path: &str) -> Tensors {
    of_file(Path::new(&golden(path)))
}

/// The tensors of a file, by name; not its metadata.
pub(crate) fn of_file(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = file
        .iter()
        .map(|(name, t)| {
            (
                name.to_owned(),
                t.dtype(),
                t.shape().to_vec(),
                t.data().to_vec(),
            )
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

/// Writes them as safetensors.
pub(crate) fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name.clone(), view)
    });
    let views: HashMap<String, TensorView> = views.collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The same below a prefix.
pub(crate) fn below(prefix: &str, tensors: Tensors) -> Tensors {
    let named = tensors.into_iter();
    named
        .map(|(name, dtype, shape, data)| (format!("{prefix}{name}"), dtype, shape, data))
        .collect()
}
