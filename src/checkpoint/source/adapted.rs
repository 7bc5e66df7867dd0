//! A tensor with what LoRA files add to it: summed in f32 a few rows at a time while it is read, and rounded once. Neither
//! the sum nor the change of a whole tensor is ever in memory in addition to what is asked for.

use std::{
    io::Write,
    ops::Range,
    sync::{Arc, OnceLock},
};

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    Data, Source,
    delta::{Delta, DeltaForm, LoadedDelta},
};
use crate::{checkpoint::dtype::StorageDType, quant::QuantType};

/// Numbers that are summed at a time: 4 MiB.
const PART: usize = 1 << 20;
/// Parts that are summed at a time while a tensor is written.
const PARTS: usize = 8;

/// Rows of a tensor that rows of a change are added to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::checkpoint) struct RowMap {
    /// First row of the tensor.
    pub at: usize,
    /// The rows of the change.
    pub rows: Range<usize>,
}

impl RowMap {
    fn end(&self) -> usize {
        self.at + self.rows.len()
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Adapted {
    base: Box<Source>,
    additions: Vec<Addition>,
}

#[derive(Clone, Debug)]
struct Addition {
    delta: Arc<Delta>,
    map: Vec<RowMap>,
    /// The norms of all columns after the addition, once they were asked for.
    columns: Arc<ColumnNorms>,
}

/// Norms of columns are those of the module, whatever part of it is read.
#[derive(Debug)]
struct ColumnNorms {
    before: Source,
    map: Vec<RowMap>,
    found: OnceLock<Vec<f32>>,
}

/// Low-rank factors next to a packed weight, f32 on the CPU, the scale multiplied into `b`.
pub(in crate::checkpoint) struct LowRankFactors {
    /// (rank, in)
    pub a: Tensor,
    /// (out, rank)
    pub b: Tensor,
}

impl Source {
    /// This tensor with `delta` added to the rows that `map` names; summed when it is read.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub(in crate::checkpoint) fn adapted(
        &self,
        delta: &Arc<Delta>,
        map: Vec<RowMap>,
    ) -> Result<Self> {
        let [rows, columns] = delta.shape()?;
        let (height, width) = (self.shape.first().copied().unwrap_or(1), self.width());
        let within = |m: &RowMap| m.end() <= height && m.rows.end <= rows;
        ensure!(
            columns == width && map.iter().all(within),
            "is for a weight of shape {:?}, this model's is {:?}",
            [rows, columns],
            self.shape
        );
        if let Some(magnitude) = &delta.magnitude {
            let count = magnitude.values.elements();
            ensure!(
                count == rows || count == columns,
                "has {count} magnitudes for a weight of shape {:?}",
                [rows, columns]
            );
        }
        let mut all = match &self.data {
            Data::Adapted(before) => before.clone(),
            _ => Adapted {
                base: Box::new(self.clone()),
                additions: Vec::new(),
            },
        };
        all.additions.push(Addition {
            delta: delta.clone(),
            map: map.clone(),
            columns: Arc::new(ColumnNorms {
                before: self.clone(),
                map,
                found: OnceLock::new(),
            }),
        });
        Ok(Self {
            format: stored_as(&all.base)?,
            shape: self.shape.clone(),
            data: Data::Adapted(all),
            scale: None,
        })
    }

    /// The tensor as it was before anything was added.
    pub fn unadapted(&self) -> &Self {
        match &self.data {
            Data::Adapted(adapted) => &adapted.base,
            _ => self,
        }
    }

    /// What identifies each change, in the order in which they are made.
    pub fn adaptations(&self) -> impl Iterator<Item = &str> {
        let additions = match &self.data {
            Data::Adapted(adapted) => adapted.additions.as_slice(),
            _ => &[],
        };
        additions.iter().map(|addition| addition.delta.id.as_str())
    }

    /// The format of a matrix that is served as its packed bytes, with low-rank factors next to them if anything was added.
    pub fn packed(&self) -> Option<QuantType> {
        if self.shape.len() != 2 {
            return None;
        }
        let low_rank = |addition: &Addition| {
            addition.delta.magnitude.is_none()
                && matches!(addition.delta.form, DeltaForm::LowRank { .. })
        };
        match (&self.data, self.unadapted().format) {
            (Data::Adapted(adapted), StorageDType::Quantized(format))
                if adapted.additions.iter().all(low_rank) =>
            {
                Some(format)
            }
            (Data::Adapted(_), _) | (_, StorageDType::Plain(_)) => None,
            (_, StorageDType::Quantized(format)) => Some(format),
        }
    }

    /// Bytes that a packed matrix takes in memory with the factors next to it.
    pub(in crate::checkpoint) fn packed_bytes(&self) -> usize {
        let factors = match &self.data {
            Data::Adapted(adapted) => adapted.additions.iter().map(|a| a.delta.bytes()).sum(),
            _ => 0,
        };
        self.unadapted().byte_len() + factors
    }

    /// All changes of a packed matrix as one low-rank addition; `None` if nothing was added.
    ///
    /// # Errors
    /// When a factor cannot be read.
    pub(in crate::checkpoint) fn low_rank(&self) -> Result<Option<LowRankFactors>> {
        let Data::Adapted(adapted) = &self.data else {
            return Ok(None);
        };
        let cpu = &Device::Cpu;
        let height = self.shape.first().copied().unwrap_or(1);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for addition in &adapted.additions {
            let DeltaForm::LowRank { a: down, b: up } = &addition.delta.form else {
                anyhow::bail!("{} is not of low rank", addition.delta.name)
            };
            let up = up.tensor_as(DType::F32, cpu)?;
            let down = down.tensor_as(DType::F32, cpu)?;
            let rank = down.dim(0)?;
            let up = (up.reshape(((), rank))? * f64::from(addition.delta.scale))?;
            // rows that nothing is added to are zero
            let mut parts = addition.map.clone();
            parts.sort_by_key(|part| part.at);
            let (mut at, mut rows) = (0, Vec::new());
            for part in &parts {
                rows.push(Tensor::zeros((part.at - at, rank), DType::F32, cpu)?);
                rows.push(up.narrow(0, part.rows.start, part.rows.len())?);
                at = part.end();
            }
            rows.push(Tensor::zeros((height - at, rank), DType::F32, cpu)?);
            b.push(Tensor::cat(&rows, 0)?);
            a.push(down.reshape((rank, ()))?);
        }
        Ok(Some(LowRankFactors {
            a: Tensor::cat(&a, 0)?,
            b: Tensor::cat(&b, 1)?,
        }))
    }

    pub(super) fn width(&self) -> usize {
        self.shape.iter().skip(1).product::<usize>().max(1)
    }
}

/// Changed values are stored in the tensor's own format; those of packed formats in bf16.
fn stored_as(base: &Source) -> Result<StorageDType> {
    Ok(super::safetensors_dtype(base.format.of_changed())?.into())
}

impl Adapted {
    pub(super) fn base(&self) -> &Source {
        &self.base
    }

    /// The same of the rows `rows`.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        let additions = self.additions.iter().map(|addition| {
            let part = |m: &RowMap| {
                let (start, end) = (m.at.max(rows.start), m.end().min(rows.end));
                (start < end).then(|| RowMap {
                    at: start - rows.start,
                    rows: m.rows.start + start - m.at..m.rows.start + end - m.at,
                })
            };
            Addition {
                map: addition.map.iter().filter_map(part).collect(),
                ..addition.clone()
            }
        });
        Ok(Self {
            base: Box::new(self.base.rows(rows.clone())?),
            additions: additions.filter(|a| !a.map.is_empty()).collect(),
        })
    }

    /// All factors on `device`, and norms of columns where they are needed.
    fn load(&self, device: &Device) -> Result<Vec<(LoadedDelta, Option<Tensor>)>> {
        let each = self.additions.iter().map(|addition| {
            let delta = &addition.delta;
            let loaded = delta.context(delta.load(device))?;
            let columns = loaded
                .scales_columns()
                .then(|| {
                    let norms = addition.columns.find(delta)?;
                    Ok::<_, anyhow::Error>(Tensor::from_slice(norms, (1, norms.len()), device)?)
                })
                .transpose()?;
            Ok((loaded, columns))
        });
        each.collect()
    }

    /// The rows `rows` summed: `base` (n, width) are those before, f32.
    fn sum(
        &self,
        loaded: &[(LoadedDelta, Option<Tensor>)],
        rows: &Range<usize>,
        base: Tensor,
    ) -> Result<Tensor> {
        let mut sum = base;
        for (addition, (delta, columns)) in self.additions.iter().zip(loaded) {
            for m in &addition.map {
                let (start, end) = (m.at.max(rows.start), m.end().min(rows.end));
                if start >= end {
                    continue;
                }
                let (local, count) = (start - rows.start, end - start);
                let of_delta = m.rows.start + start - m.at..m.rows.start + end - m.at;
                let part = sum.narrow(0, local, count)?;
                let part = delta.added(&part, &of_delta, columns.as_ref());
                let part = addition.delta.context(part)?;
                let behind = rows.len() - local - count;
                sum = Tensor::cat(
                    &[
                        &sum.narrow(0, 0, local)?,
                        &part,
                        &sum.narrow(0, local + count, behind)?,
                    ],
                    0,
                )?;
            }
        }
        Ok(sum)
    }

    /// The numbers `range` in row-major order, summed and not rounded.
    pub(super) fn values(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let (width, cpu) = (self.base.width(), Device::Cpu);
        let rows = range.start / width..range.end.div_ceil(width);
        let loaded = self.load(&cpu)?;
        let step = (PART / width).max(1);
        let starts: Vec<usize> = rows.clone().step_by(step).collect();
        let part = |start: usize| -> Result<Vec<f32>> {
            let rows = start..rows.end.min(start + step);
            let before = self.base.values(rows.start * width..rows.end * width)?;
            let before = Tensor::from_vec(before, (rows.len(), width), &cpu)?;
            let sum = self.sum(&loaded, &rows, before)?;
            Ok(sum.flatten_all()?.to_vec1()?)
        };
        let mut parts: Vec<Vec<f32>> = starts.into_par_iter().map(part).collect::<Result<_>>()?;
        if let Some(last) = parts.last_mut() {
            last.truncate(last.len() - (rows.end * width - range.end));
        }
        if let Some(first) = parts.first_mut() {
            first.drain(..range.start - rows.start * width);
        }
        Ok(parts.concat())
    }

    /// Loads the sum in `dtype`; on a GPU the base is copied as it is and summed there.
    pub(super) fn tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = self.base.shape.as_slice();
        if device.is_cpu() {
            let values = self.values(0..self.base.elements())?;
            return Ok(Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?);
        }
        let width = self.base.width();
        let whole = self.base.tensor(device)?.reshape(((), width))?;
        let loaded = self.load(device)?;
        let (height, step) = (whole.dim(0)?, (16 * PART / width).max(1));
        let parts = (0..height).step_by(step).map(|start| {
            let rows = start..height.min(start + step);
            let before = whole.narrow(0, start, rows.len())?.to_dtype(DType::F32)?;
            Ok(self.sum(&loaded, &rows, before)?.to_dtype(dtype)?)
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?.reshape(shape)?)
    }

    /// Writes the sum in `format`.
    pub(super) fn write_to(&self, format: StorageDType, out: &mut dyn Write) -> Result<()> {
        let (all, step) = (self.base.elements(), PART * PARTS);
        for start in (0..all).step_by(step) {
            let values = self.values(start..all.min(start + step))?;
            let parts: Vec<Vec<u8>> = values
                .par_chunks(PART)
                .map(|part| format.encode(part))
                .collect::<Result<_>>()?;
            parts.iter().try_for_each(|part| out.write_all(part))?;
        }
        Ok(())
    }
}

impl ColumnNorms {
    fn find(&self, delta: &Delta) -> Result<&[f32]> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let width = self.before.width();
        let loaded = delta.load(&Device::Cpu)?;
        let mut squares = vec![0f64; width];
        let step = (PART / width).max(1);
        for m in &self.map {
            for start in m.rows.clone().step_by(step) {
                let rows = start..m.rows.end.min(start + step);
                let at = m.at + start - m.rows.start;
                let before = self.before.values(at * width..(at + rows.len()) * width)?;
                let before = Tensor::from_vec(before, (rows.len(), width), &Device::Cpu)?;
                let part = loaded.column_squares(&before, &rows)?;
                let part = part.flatten_all()?.to_vec1::<f32>()?;
                squares
                    .iter_mut()
                    .zip(part)
                    .for_each(|(sum, x)| *sum += f64::from(x));
            }
        }
        let norms = squares.into_iter().map(|sum| sum.sqrt() as f32).collect();
        Ok(self.found.get_or_init(|| norms))
    }
}
