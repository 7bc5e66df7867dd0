//! Rows of a tensor, tensors stacked by rows, other shapes: ranges of bytes change, no byte is read.

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use candle::{Device, Tensor};

use super::{Data, Piece, STEP, Source};

impl Source {
    /// The rows `rows` (of the outermost dimension).
    ///
    /// # Errors
    /// When the tensor has fewer rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let Some(&total) = self.shape.first() else {
            bail!("a scalar has no rows")
        };
        ensure!(
            rows.start <= rows.end && rows.end <= total,
            "rows {}..{} of a tensor of shape {:?}",
            rows.start,
            rows.end,
            self.shape
        );
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let width: usize = shape[1..].iter().product();
        ensure!(
            [rows.start, rows.end]
                .iter()
                .all(|row| (row * width).is_multiple_of(self.format.block())),
            "rows {rows:?} of shape {:?} are parts of blocks of {}",
            self.shape,
            self.format
        );
        let scale = self.scale.as_ref().map(|scale| match scale.len() {
            1 => scale.clone(),
            _ => scale[rows.clone()].into(),
        });
        let data = match &self.data {
            Data::Converted(from) => Data::Converted(Box::new(from.rows(rows)?)),
            Data::Adapted(adapted) => Data::Adapted(adapted.rows(&rows)?),
            Data::Sum(parts) => {
                let parts = parts.iter().map(|part| part.rows(rows.clone()));
                Data::Sum(parts.collect::<Result<_>>()?)
            }
            Data::Dense(t) => Data::Dense(t.narrow(0, rows.start, rows.len())?),
            Data::Pieces(pieces) => {
                let bytes = |row: usize| self.format.bytes(row * width);
                Data::Pieces(cut(pieces, bytes(rows.start)..bytes(rows.end)))
            }
        };
        Ok(Self {
            format: self.format,
            shape,
            data,
            scale,
        })
    }

    /// The tensors one below another; all but the outermost dimension and the number formats agree.
    ///
    /// # Errors
    /// When they do not, or when there are none.
    pub fn stack_rows(parts: &[Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            bail!("nothing to concatenate")
        };
        ensure!(
            parts.iter().all(|part| !part.shape.is_empty()),
            "is a single number, expected rows"
        );
        let mut shape = first.shape.clone();
        let mut pieces = Vec::new();
        shape[0] = 0;
        for part in parts {
            ensure!(
                part.format == first.format && part.shape[1..] == first.shape[1..],
                "cannot fuse {} {:?} with {} {:?}",
                first.format,
                first.shape,
                part.format,
                part.shape
            );
            shape[0] += part.shape[0];
            match &part.data {
                Data::Pieces(p) => pieces.extend(p.iter().cloned()),
                Data::Dense(_) | Data::Converted(_) | Data::Sum(_) | Data::Adapted(_) => {
                    let tensors = parts
                        .iter()
                        .map(|p| p.tensor(&Device::Cpu))
                        .collect::<Result<Vec<_>>>()?;
                    return Self::dense(&Tensor::cat(&tensors, 0)?);
                }
            }
        }
        let scaled = parts.iter().any(|part| part.scale.is_some());
        let scale = scaled.then(|| {
            let each = parts.iter().flat_map(|part| {
                let rows = part.shape[0];
                let one = |row| match part.scale() {
                    None => 1.0,
                    Some([one]) => *one,
                    Some(each) => each[row],
                };
                (0..rows).map(one).collect::<Vec<_>>()
            });
            each.collect()
        });
        Ok(Self {
            format: first.format,
            shape,
            data: Data::Pieces(pieces),
            scale,
        })
    }

    /// The same bytes under another shape of the same size.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        ensure!(
            shape.iter().product::<usize>() == self.elements(),
            "cannot read shape {:?} as {shape:?}",
            self.shape
        );
        let data = match &self.data {
            Data::Dense(t) => Data::Dense(t.reshape(shape)?),
            Data::Adapted(_) => bail!("a tensor with a LoRA keeps its shape"),
            same => same.clone(),
        };
        ensure!(
            self.scale().is_none_or(|scale| scale.len() == 1),
            "a tensor with a scale for each row keeps its shape"
        );
        Ok(Self {
            format: self.format,
            shape: shape.to_vec(),
            data,
            scale: self.scale.clone(),
        })
    }
}

impl Source {
    /// Whether the tensor has the format, shape, scales and bytes of another one.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn same_bytes(&self, other: &Self) -> Result<bool> {
        if self.format != other.format || self.shape != other.shape || self.scale != other.scale {
            return Ok(false);
        }
        let (Data::Pieces(ours), Data::Pieces(theirs)) = (&self.data, &other.data) else {
            return Ok(self.bytes()? == other.bytes()?);
        };
        let bytes = self.byte_len();
        let part = |pieces: &[Piece], range: Range<usize>| -> Vec<u8> {
            let pieces = cut(pieces, range);
            pieces.iter().flat_map(|p| p.bytes().into_owned()).collect()
        };
        Ok((0..bytes).step_by(STEP).all(|start| {
            let range = start..bytes.min(start + STEP);
            part(ours, range.clone()) == part(theirs, range)
        }))
    }
}

/// The part `range` of the concatenation of `pieces`.
pub(super) fn cut(pieces: &[Piece], range: Range<usize>) -> Vec<Piece> {
    let mut at = 0;
    let mut out = Vec::new();
    for piece in pieces {
        let (start, end) = (range.start.max(at), range.end.min(at + piece.range.len()));
        if start < end {
            out.push(Piece {
                of: piece.of.clone(),
                range: piece.range.start + start - at..piece.range.start + end - at,
            });
        }
        at += piece.range.len();
    }
    out
}
