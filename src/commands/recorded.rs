//! Tensors recorded from another implementation, and how far others are from them. What is compared is `verify`'s.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};

use crate::{checkpoint::Checkpoint, sample::denoise::LatentSize};

/// A reference file and what it says about how it was recorded.
pub(super) struct Reference {
    pub(super) tensors: Checkpoint,
}

impl Reference {
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    /// A recorded tensor, floats in f32, on the CPU.
    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.expect(name)?.tensor(&Device::Cpu)?;
        Ok(if tensor.dtype().is_float() {
            tensor.to_dtype(DType::F32)?
        } else {
            tensor
        })
    }

    /// A number of the metadata.
    pub(super) fn number<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.text(key)?;
        text.parse().ok().with_context(|| {
            format!(
                "`{}`: its metadata says `{key}` = `{text}`, which is not a number",
                self.tensors.name
            )
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<&str> {
        let value = self.tensors.metadata.get(key);
        value
            .map(String::as_str)
            .with_context(|| format!("`{}`: its metadata lacks `{key}`", self.tensors.name))
    }

    /// Of the pictures that the whole pipeline draws.
    pub(super) fn size(&self) -> Result<LatentSize> {
        Ok(LatentSize {
            height: self.number::<usize>("height")? / 8,
            width: self.number::<usize>("width")? / 8,
        })
    }
}

/// Largest absolute difference and ‖a − b‖ / ‖b‖.
pub(super) fn distance(name: &str, got: &Tensor, want: &Tensor) -> Result<(f64, f64)> {
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let want = want.to_dtype(DType::F64)?;
    ensure!(
        got.dims() == want.dims(),
        "`{name}`: computed shape {:?}, recorded shape {:?}: the reference is not of this model",
        got.dims(),
        want.dims()
    );
    let difference = (got - &want)?;
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let max_abs = difference.abs()?.max_all()?.to_scalar::<f64>()?;
    Ok((
        max_abs,
        norm(&difference)? / norm(&want)?.max(f64::MIN_POSITIVE),
    ))
}
