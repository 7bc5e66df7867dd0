//! A checkpoint as candle's source of weights.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use super::{Checkpoint, Source};
use crate::{
    device::{PageLocked, free_host_memory},
    files::Blob,
    quant::{QuantType, name_of_scale, names_of_factors},
};

/// The most of the host's free memory that is page-locked.
const LOCKABLE: f64 = 0.7;

/// [`Checkpoint`] as candle's source of weights. Quantized matrices are served in full under their own names, and as bytes,
/// scales and the factors of a LoRA under those that `quant` gives them.
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

    /// The packed matrix whose bytes, scales or factors go by `name`.
    fn packed<'a>(&self, name: &'a str) -> Option<(&'a str, &Source, QuantType)> {
        let (tensor, _) = name.rsplit_once('@')?;
        let source = self.checkpoint.get(tensor)?;
        let packed = source.packed()?;
        let known = name == packed.name_of_bytes(tensor)
            || name == name_of_scale(tensor)
            || (names_of_factors(tensor).iter().any(|factor| name == factor)
                && source.adaptations().next().is_some());
        known.then_some((tensor, source, packed))
    }

    /// The bytes, scales or factors of a packed matrix.
    fn load_packed(
        &self,
        name: &str,
        (tensor, source, packed): (&str, &Source, QuantType),
        device: &Device,
    ) -> Result<Tensor> {
        let [a, b] = names_of_factors(tensor);
        if name == a || name == b {
            let factors = source.low_rank()?.context("has no LoRA")?;
            let factor = if name == a { factors.a } else { factors.b };
            return Ok(factor.to_device(device)?);
        }
        let source = source.unadapted();
        if name == name_of_scale(tensor) {
            let scale = source.scale().unwrap_or(&[1.0]);
            return Ok(Tensor::from_slice(scale, scale.len(), device)?);
        }
        let [rows, columns] = self.checkpoint.dims(tensor)?;
        let shape = [rows, packed.bytes(columns)];
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu) if source.mapped_parts().is_some() => {
                let parts = source.mapped_parts().unwrap_or_default();
                Ok(crate::device::upload(&parts, DType::U8, &shape, gpu)?)
            }
            _ => Ok(Tensor::from_raw_buffer(
                &source.bytes()?,
                DType::U8,
                &shape,
                device,
            )?),
        }
    }

    fn load(
        &self,
        name: &str,
        shape: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some(found) = self.packed(name) {
            let loaded = self.load_packed(name, found, device);
            return loaded
                .with_context(|| format!("`{}`: tensor `{}`", self.checkpoint.name, found.0));
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
