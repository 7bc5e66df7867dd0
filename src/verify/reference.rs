//! Tensors recorded from another implementation, and how far others are from them.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};

use crate::{
    checkpoint::{Checkpoint, with_hint},
    files::Blob,
    layout::Family,
    pipeline::defaults::{MAX_GUIDANCE, MAX_STEPS, MAX_TEXT_TOKENS},
    sample::{
        denoise::LatentSize,
        is_finite,
        size::{ImageSize, MAX_SIDE},
    },
};

/// A reference file and what it says about how it was recorded.
#[derive(Clone, Debug)]
pub struct Reference {
    pub(super) tensors: Checkpoint,
    /// Names of the tensors that were read: compared, or inputs of what was compared.
    read: RefCell<BTreeSet<String>>,
}

impl Reference {
    /// Opens a file that scripts/make_reference.py recorded.
    ///
    /// # Errors
    /// When the file cannot be read or is no safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let blob = Blob::map(path).context("--reference")?;
        let tensors = with_hint(
            Checkpoint::from_blob(&path.display().to_string(), &blob),
            "record it again with scripts/make_reference.py, or name another with --reference",
        )?;
        Ok(Self::from_tensors(tensors))
    }

    fn from_tensors(tensors: Checkpoint) -> Self {
        let read = RefCell::default();
        Self { tensors, read }
    }

    /// Names of the tensors that were not read, in order.
    pub(super) fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        let names = self.tensors.names().map(str::to_owned);
        let mut names: Vec<String> = names.filter(|name| !read.contains(name)).collect();
        names.sort();
        names
    }

    /// Where a file next to it would be.
    pub(super) fn next_to(&self, name: &str) -> PathBuf {
        Path::new(&self.tensors.name).with_file_name(name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    /// A recorded tensor, floats in f32, on the CPU. A number that is none is the recording's fault, not the model's.
    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.expect(name)?.tensor(&Device::Cpu)?;
        self.read.borrow_mut().insert(name.to_owned());
        if !tensor.dtype().is_float() {
            return Ok(tensor);
        }
        let tensor = tensor.to_dtype(DType::F32)?;
        ensure!(
            is_finite(&tensor)?,
            "`{}`: tensor `{name}` holds NaN or infinite numbers, so the reference is damaged\nhint: record it again with scripts/make_reference.py, or name another with --reference",
            self.tensors.name
        );
        Ok(tensor)
    }

    /// The same if it has this shape; dimensions that are `None` are as long as they are, but not empty.
    pub(super) fn shaped(&self, name: &str, shape: &[Option<usize>]) -> Result<Tensor> {
        let found = self.tensors.expect(name)?.shape();
        let fits = found.len() == shape.len()
            && found
                .iter()
                .zip(shape)
                .all(|(found, want)| want.map_or(*found > 0, |want| want == *found));
        let any = |want: &Option<usize>| want.map_or_else(|| "any".to_owned(), |n| n.to_string());
        ensure!(
            fits,
            "`{}`: tensor `{name}` has shape {found:?}, expected [{}]: the reference is damaged or not of this model",
            self.tensors.name,
            shape.iter().map(any).collect::<Vec<_>>().join(", ")
        );
        self.get(name)
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

    fn within(&self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize> {
        let number = self.number(key)?;
        ensure!(
            range.contains(&number),
            "`{}`: its metadata says `{key}` = `{number}`, expected {} to {}",
            self.tensors.name,
            range.start(),
            range.end()
        );
        Ok(number)
    }

    /// Steps of the whole pipeline.
    pub(super) fn steps(&self) -> Result<usize> {
        self.within("steps", 1..=MAX_STEPS)
    }

    /// Its guidance.
    pub(super) fn guidance(&self) -> Result<f64> {
        let guidance: f64 = self.number("guidance")?;
        ensure!(
            guidance.is_finite() && guidance >= 0.0,
            "`{}`: its metadata says `guidance` = `{guidance}`, expected a number of at least 0",
            self.tensors.name
        );
        Ok(guidance)
    }

    /// Scale and text of the negative prompt, where one was drawn with.
    pub(super) fn negative_prompt(&self) -> Result<Option<(f64, &str)>> {
        if !self.tensors.metadata.contains_key("true_cfg") {
            return Ok(None);
        }
        let scale: f64 = self.number("true_cfg")?;
        ensure!(
            (1.0..=MAX_GUIDANCE).contains(&scale),
            "`{}`: its metadata says `true_cfg` = `{scale}`, expected 1 to {MAX_GUIDANCE}",
            self.tensors.name
        );
        Ok(Some((scale, self.text("negative_prompt")?)))
    }

    /// Text tokens: those of the recorded ids, or what the metadata says.
    pub(super) fn text_length(&self) -> Result<usize> {
        let ids = ["t5.input_ids", "qwen.input_ids"];
        let Some(ids) = ids.into_iter().find(|name| self.has(name)) else {
            let says = |key: &&str| self.tensors.metadata.contains_key(*key);
            let key = ["t5_len", "text_len"].into_iter().find(says);
            return self.within(key.unwrap_or("text_len"), 1..=MAX_TEXT_TOKENS);
        };
        let [_, length] = self.tensors.dims::<2>(ids)?;
        ensure!(
            (1..=MAX_TEXT_TOKENS).contains(&length),
            "`{}`: tensor `{ids}` has {length} tokens, expected 1 to {MAX_TEXT_TOKENS}",
            self.tensors.name
        );
        Ok(length)
    }

    pub(super) fn text(&self, key: &str) -> Result<&str> {
        let value = self.tensors.metadata.get(key);
        value
            .map(String::as_str)
            .with_context(|| format!("`{}`: its metadata lacks `{key}`", self.tensors.name))
    }

    /// Of the images that the whole pipeline draws.
    pub(super) fn size(&self, family: Family) -> Result<LatentSize> {
        let side = |key| self.within(key, ImageSize::STEP..=MAX_SIDE);
        let size = ImageSize {
            height: side("height")? / ImageSize::STEP * ImageSize::STEP,
            width: side("width")? / ImageSize::STEP * ImageSize::STEP,
        };
        Ok(size.latent(family))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Source;

    #[test]
    fn numbers_and_shapes_are_refused_with_the_file_and_their_names() {
        let huge = usize::MAX.to_string();
        let metadata = [
            ("steps", huge.as_str()),
            ("width", huge.as_str()),
            ("height", "64"),
            ("guidance", "nan"),
            ("t5_len", "0"),
        ];
        let mut tensors = Checkpoint::default();
        tensors.name = "r.safetensors".to_owned();
        for (key, value) in metadata {
            tensors.metadata.insert(key.to_owned(), value.to_owned());
        }
        let ones = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("x", Source::dense(&ones).unwrap());
        let reference = Reference::from_tensors(tensors);
        let refused = |error: anyhow::Error, word: &str| {
            let text = format!("{error:#}");
            assert!(
                text.contains("r.safetensors") && text.contains(word),
                "{text}"
            );
        };
        refused(reference.steps().unwrap_err(), "`steps`");
        refused(reference.size(Family::FLUX1).unwrap_err(), "`width`");
        refused(reference.guidance().unwrap_err(), "`guidance`");
        refused(reference.text_length().unwrap_err(), "`t5_len`");
        reference.shaped("x", &[Some(2), None]).unwrap();
        for shape in [&[Some(2), Some(4)][..], &[None], &[]] {
            refused(reference.shaped("x", shape).unwrap_err(), "`x`");
        }
    }
}
