//! A checkpoint as candle's source of weights.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use super::{Checkpoint, Source, StorageDType};
use crate::{
    device::{PageLocked, free_host_memory},
    files::Blob,
    quant::{QuantType, name_of_scale},
};

/// The most of the host's free memory that is page-locked.
const LOCKABLE: f64 = 0.7;

/// The format of a matrix that is served as its bytes too.
pub(super) fn packed(source: &Source) -> Option<QuantType> {
    match source.format() {
        StorageDType::Quantized(packed) if source.shape().len() == 2 => Some(packed),
        _ => None,
    }
}

/// [`Checkpoint`] as candle's source of weights. Quantized matrices are served in full under their own names, and as bytes
/// and scales under those that `quant` gives them.
pub(super) struct Backend {
    checkpoint: Checkpoint,
    /// Files that a GPU reads directly.
    _locked: Vec<PageLocked>,
}

/// The mapped files of a checkpoint, page-locked for `device`; none if there is no room for all of them.
pub(super) fn page_lock(checkpoint: &Checkpoint, device: &Device) -> Vec<PageLocked> {
    let mut files: Vec<&Blob> = Vec::new();
    for blob in checkpoint.tensors.values().flat_map(Source::blobs) {
        if files.iter().all(|other| other.as_ptr() != blob.as_ptr()) {
            files.push(blob);
        }
    }
    let bytes: usize = files.iter().map(|blob| blob.len()).sum();
    let free = free_host_memory().unwrap_or(0);
    if bytes as f64 > LOCKABLE * free as f64 {
        return Vec::new();
    }
    let each = files.into_iter();
    each.filter_map(|blob| PageLocked::new(blob, Box::new(blob.clone()), device))
        .collect()
}

impl Backend {
    pub(super) fn new(checkpoint: Checkpoint, locked: Vec<PageLocked>) -> Self {
        Self {
            checkpoint,
            _locked: locked,
        }
    }

    /// The packed matrix whose bytes or scales go by `name`.
    fn packed<'a>(&self, name: &'a str) -> Option<(&'a str, &Source, QuantType)> {
        let (tensor, _) = name.rsplit_once('@')?;
        let source = self.checkpoint.get(tensor)?;
        let packed = packed(source)?;
        let known = name == packed.name_of_bytes(tensor) || name == name_of_scale(tensor);
        known.then_some((tensor, source, packed))
    }

    fn load(
        &self,
        name: &str,
        shape: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some((tensor, source, packed)) = self.packed(name) {
            let loaded = if name == name_of_scale(tensor) {
                let scale = source.scale().unwrap_or(&[1.0]);
                Tensor::from_slice(scale, scale.len(), device)
            } else {
                let [rows, columns] = self.checkpoint.dims(tensor)?;
                let shape = [rows, packed.bytes(columns)];
                match device {
                    #[cfg(feature = "cuda")]
                    Device::Cuda(gpu) if source.mapped_parts().is_some() => {
                        let parts = source.mapped_parts().unwrap_or_default();
                        crate::device::upload(&parts, DType::U8, &shape, gpu)
                    }
                    _ => Tensor::from_raw_buffer(&source.bytes()?, DType::U8, &shape, device),
                }
            };
            return loaded
                .with_context(|| format!("`{}`: tensor `{tensor}`", self.checkpoint.name));
        }
        let source = self.checkpoint.expect(name)?;
        if let Some(shape) = shape {
            ensure!(
                shape.dims() == source.shape(),
                "`{}`: tensor `{name}` has shape {:?}, expected {:?}",
                self.checkpoint.name,
                source.shape(),
                shape.dims()
            );
        }
        let tensor = source.tensor_as(dtype, device);
        tensor.with_context(|| format!("`{}`: tensor `{name}`", self.checkpoint.name))
    }
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        s: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle::Result<Tensor> {
        self.load(name, Some(&s), dtype, dev).map_err(to_candle)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle::Result<Tensor> {
        self.load(name, None, dtype, dev).map_err(to_candle)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.packed(name).is_some() || self.checkpoint.contains(name)
    }
}

fn to_candle(error: anyhow::Error) -> candle::Error {
    // the whole chain in one line: candle's errors carry no source
    candle::Error::Msg(format!("{error:#}"))
}
