//! A tensor's numbers, whatever it is stored in, a part at a time and on all cores; conversions are made of these.

use std::{io::Write, ops::Range};

use anyhow::{Result, ensure};
use candle::DType;
use rayon::prelude::*;

use super::rows::cut;
use super::{Data, Source};

/// Values that one thread converts at a time, and how many such parts are converted at once.
const PART: usize = 1 << 18;
const PARTS: usize = 16;

impl Source {
    /// The numbers before this format rounds them and divided by its scale: what [`StorageDType::encode`] is to be given.
    pub(super) fn stored(&self, range: Range<usize>) -> Result<Vec<f32>> {
        match &self.data {
            Data::Converted(from) => {
                let mut values = from.values(range)?;
                if let Some([scale]) = self.scale() {
                    for value in &mut values {
                        *value /= scale;
                    }
                }
                ensure!(
                    values.iter().all(|v| v.is_finite()),
                    "the weights are NaN or infinite"
                );
                Ok(values)
            }
            Data::Dense(tensor) => {
                let flat = tensor.flatten_all()?.narrow(0, range.start, range.len())?;
                Ok(flat.to_dtype(DType::F32)?.to_vec1()?)
            }
            Data::Adapted(adapted) => adapted.values(range),
            Data::Sum(_) => {
                let sums = self.doubles(range)?.into_iter();
                Ok(sums.map(|x| x as f32).collect())
            }
            Data::Pieces(pieces) => {
                let bytes = |at: usize| self.format.bytes(at);
                let pieces = cut(pieces, bytes(range.start)..bytes(range.end));
                match pieces.as_slice() {
                    [one] => self.format.decode(&one.bytes()),
                    many => {
                        let all: Vec<u8> =
                            many.iter().flat_map(|p| p.bytes().into_owned()).collect();
                        self.format.decode(&all)
                    }
                }
            }
        }
    }

    /// The numbers `range` in row-major order; bounds are whole blocks.
    ///
    /// # Errors
    /// When they are no floats, or cannot be read.
    pub fn values(&self, range: Range<usize>) -> Result<Vec<f32>> {
        if let Data::Adapted(adapted) = &self.data {
            return adapted.values(range);
        }
        let part = |range: Range<usize>| -> Result<Vec<f32>> {
            let mut values = self.stored(range.clone())?;
            if matches!(self.data, Data::Converted(_)) {
                values = self.format.decode(&self.format.encode(&values)?)?;
            }
            let width: usize = self.shape.iter().skip(1).product::<usize>().max(1);
            match self.scale() {
                None => {}
                Some([scale]) => values.iter_mut().for_each(|v| *v *= scale),
                Some(scale) => {
                    for (i, value) in values.iter_mut().enumerate() {
                        *value *= scale[(range.start + i) / width];
                    }
                }
            }
            Ok(values)
        };
        if range.len() <= PART {
            return part(range);
        }
        let end = range.end;
        let parts: Vec<Vec<f32>> = range
            .into_par_iter()
            .step_by(PART)
            .map(|at| part(at..end.min(at + PART)))
            .collect::<Result<_>>()?;
        Ok(parts.concat())
    }

    /// The largest magnitude.
    ///
    /// # Errors
    /// When a value is NaN or infinite, or cannot be read.
    pub fn largest(&self) -> Result<f32> {
        // factors of a LoRA are loaded for every part
        let step = match self.data {
            Data::Adapted(_) => PART * PARTS,
            _ => PART,
        };
        let parts = (0..self.elements()).into_par_iter().step_by(step);
        let of = |at: usize| {
            let values = self.values(at..self.elements().min(at + step))?;
            ensure!(
                values.iter().all(|v| v.is_finite()),
                "the weights are NaN or infinite"
            );
            Ok(values.iter().fold(0f32, |most, v| most.max(v.abs())))
        };
        let all: Vec<f32> = parts.map(of).collect::<Result<_>>()?;
        Ok(all.into_iter().fold(0.0, f32::max))
    }

    /// Writes what is converted; only a few parts are in memory at a time.
    pub(super) fn write_converted(&self, out: &mut dyn Write) -> Result<()> {
        let step = PART * PARTS;
        let whole =
            matches!(&self.data, Data::Converted(from) if matches!(from.data, Data::Adapted(_)));
        for start in (0..self.elements()).step_by(step) {
            let end = self.elements().min(start + step);
            if whole {
                let values = self.stored(start..end)?;
                let parts = values.par_chunks(PART).map(|part| self.format.encode(part));
                let parts: Vec<Vec<u8>> = parts.collect::<Result<_>>()?;
                parts.iter().try_for_each(|part| out.write_all(part))?;
                continue;
            }
            let parts: Vec<Vec<u8>> = (start..end)
                .into_par_iter()
                .step_by(PART)
                .map(|at| self.format.encode(&self.stored(at..end.min(at + PART))?))
                .collect::<Result<_>>()?;
            parts.iter().try_for_each(|part| out.write_all(part))?;
        }
        Ok(())
    }
}
