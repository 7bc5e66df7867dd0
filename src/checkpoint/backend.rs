//! A checkpoint as candle's source of weights.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use super::{Checkpoint, Source, StorageDType};
use crate::quant::{QuantType, name_of_scale};

/// The format of a matrix that is served as its bytes too.
pub(super) fn packed(source: &Source) -> Option<QuantType> {
    match source.format() {
        StorageDType::Quantized(packed) if source.shape().len() == 2 => Some(packed),
        _ => None,
    }
}

/// [`Checkpoint`] as candle's source of weights. Quantized matrices are served in full under their own names, and as bytes
/// and scales under those that `formats` gives them.
pub(super) struct Backend(pub(super) Arc<Checkpoint>);

impl Backend {
    /// The packed matrix whose bytes or scales go by `name`.
    fn packed<'a>(&self, name: &'a str) -> Option<(&'a str, &Source, QuantType)> {
        let (tensor, _) = name.rsplit_once('@')?;
        let source = self.0.get(tensor)?;
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
                let [rows, columns] = self.0.dims(tensor)?;
                let shape = [rows, packed.bytes(columns)];
                Tensor::from_raw_buffer(&source.bytes()?, DType::U8, &shape, device)
            };
            return loaded.with_context(|| format!("`{}`: tensor `{tensor}`", self.0.name));
        }
        let source = self.0.expect(name)?;
        if let Some(shape) = shape {
            ensure!(
                shape.dims() == source.shape(),
                "`{}`: tensor `{name}` has shape {:?}, expected {:?}",
                self.0.name,
                source.shape(),
                shape.dims()
            );
        }
        let tensor = source.tensor_as(dtype, device);
        tensor.with_context(|| format!("`{}`: tensor `{name}`", self.0.name))
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
        self.packed(name).is_some() || self.0.contains(name)
    }
}

fn to_candle(error: anyhow::Error) -> candle::Error {
    // the whole chain in one line: candle's errors carry no source
    candle::Error::Msg(format!("{error:#}"))
}
