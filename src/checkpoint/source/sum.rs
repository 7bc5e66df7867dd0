//! Sums of tensors of one shape that lie in files: added up a part at a time while they are written or read, so that
//! gigabytes of them are never in memory.

use std::{io::Write, ops::Range};

use anyhow::{Result, bail, ensure};
use candle::DType;
use safetensors::Dtype;

use super::rows::cut;
use super::{Data, STEP, Source};
use crate::checkpoint::dtype::StorageDType;

impl Source {
    /// This tensor and another one, f64 both, added up when they are read: numbers as if both were in memory.
    ///
    /// # Errors
    /// When they differ in shape or are not of f64.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        let format = StorageDType::Plain(Dtype::F64);
        ensure!(
            self.shape == other.shape && self.format == format && other.format == format,
            "cannot add {} {:?} to {} {:?}",
            other.format,
            other.shape,
            self.format,
            self.shape
        );
        let mut parts = match &self.data {
            Data::Sum(parts) => parts.clone(),
            _ => vec![self.clone()],
        };
        parts.push(other.clone());
        Ok(Self {
            data: Data::Sum(parts),
            ..self.clone()
        })
    }

    /// The numbers `range` in row-major order, of f64.
    pub(super) fn doubles(&self, range: Range<usize>) -> Result<Vec<f64>> {
        match &self.data {
            Data::Dense(tensor) => {
                let flat = tensor.flatten_all()?.narrow(0, range.start, range.len())?;
                Ok(flat.to_dtype(DType::F64)?.to_vec1()?)
            }
            Data::Pieces(pieces) => {
                let mut out = Vec::with_capacity(range.len());
                let pieces = cut(pieces, 8 * range.start..8 * range.end);
                let all = match pieces.as_slice() {
                    [one] => one.bytes(),
                    many => many.iter().flat_map(|p| p.bytes().into_owned()).collect(),
                };
                let (numbers, _) = all.as_chunks();
                out.extend(numbers.iter().map(|bytes| f64::from_le_bytes(*bytes)));
                Ok(out)
            }
            Data::Sum(parts) => {
                let mut sum = vec![0.0; range.len()];
                for (at, part) in parts.iter().enumerate() {
                    let numbers = part.doubles(range.clone())?;
                    if at == 0 {
                        sum = numbers;
                    } else {
                        sum.iter_mut().zip(numbers).for_each(|(s, x)| *s += x);
                    }
                }
                Ok(sum)
            }
            Data::Converted(_) | Data::Adapted(_) => bail!("a converted tensor is not of f64"),
        }
    }

    /// Writes what is added up.
    pub(super) fn write_sum(&self, out: &mut dyn Write) -> Result<()> {
        let step = STEP / 8;
        for start in (0..self.elements()).step_by(step) {
            let end = self.elements().min(start + step);
            let sum = self.doubles(start..end)?;
            let bytes: Vec<u8> = sum.into_iter().flat_map(f64::to_le_bytes).collect();
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle::{Device, Tensor};

    use super::*;
    use crate::{
        checkpoint::{Checkpoint, save},
        files::Blob,
    };

    #[test]
    fn tensors_in_files_are_added_up_as_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let part = |name: &str| {
            let tensor = Tensor::randn(0f64, 1.0, (300, 7000), &Device::Cpu).unwrap();
            let path = folder.path().join(name);
            let mut file = Checkpoint::default();
            file.insert("x", Source::dense(&tensor).unwrap());
            save::write(&file, &path).unwrap();
            let file = Checkpoint::from_blob(name, &Blob::map(&path).unwrap()).unwrap();
            (tensor, file.expect("x").unwrap().clone())
        };
        let [(a, first), (b, second), (c, third)] = ["a", "b", "c"].map(part);
        let want = ((a + b).unwrap() + c).unwrap();
        let sum = first.plus(&second).unwrap().plus(&third).unwrap();
        assert!(sum.elements() > STEP / 8, "of several parts");
        let bits = |t: &Tensor| -> Vec<u64> {
            let numbers = t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            numbers.into_iter().map(f64::to_bits).collect()
        };
        assert!(bits(&sum.tensor(&Device::Cpu).unwrap()) == bits(&want));
        let rows = sum.rows(100..103).unwrap().tensor(&Device::Cpu).unwrap();
        assert!(bits(&rows) == bits(&want.narrow(0, 100, 3).unwrap().contiguous().unwrap()));
        let other = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let error = sum.plus(&Source::dense(&other).unwrap()).unwrap_err();
        assert!(error.to_string().contains("[2, 3]"), "{error}");
    }
}
