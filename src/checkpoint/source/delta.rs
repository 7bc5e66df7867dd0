//! What a LoRA adds to one weight: factors as they lie in a file, and their algebra in f32. Where it is added is `adapted`'s.
//!
//! Sources: PEFT `tuners/lora/layer.py` and `tuners/lora/dora.py`, `LyCORIS` `functional/{loha,lokr,general}.py`, ComfyUI
//! `comfy/weight_adapter`.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use candle::{D, DType, Device, Tensor};

use super::Source;

/// The change of one weight (out, in), or of one bias (out, 1).
#[derive(Clone, Debug)]
pub(in crate::checkpoint) struct Delta {
    /// File and module, for messages.
    pub name: String,
    /// Tells it from any other change, for fingerprints: the file's own fingerprint, the module, the weight.
    pub id: String,
    /// The factors.
    pub form: DeltaForm,
    /// What their product is multiplied by: alpha / rank times the weight that the user gave.
    pub scale: f32,
    /// `DoRA`'s magnitudes, if it has them.
    pub magnitude: Option<Magnitude>,
}

/// How the change is stored.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) enum DeltaForm {
    /// `LoRA`: B·A of A (rank, in) and B (out, rank).
    LowRank {
        /// (rank, in)
        a: Source,
        /// (out, rank)
        b: Source,
    },
    /// `LoKr`: the Kronecker product of (o, i) and (out / o, in / i).
    Kronecker(Factor, Factor),
    /// `LoHa`: the product, number by number, of two of (out, in).
    Hadamard(Factor, Factor),
    /// The change itself, (out, in); of a bias (out).
    Difference(Source),
}

/// A matrix, or the product of two.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) enum Factor {
    /// As it is.
    Whole(Source),
    /// Of (rows, rank) and (rank, columns).
    Product(Source, Source),
}

/// What `DoRA` scales rows or columns to, after the factors are added.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) struct Magnitude {
    /// One for each row (out, 1), or for each column (1, in).
    pub values: Source,
    /// How much of the result is taken in place of the weight as it was: 1 where the user's weight is in `scale`.
    pub share: f32,
}

impl Factor {
    fn shape(&self) -> Result<[usize; 2]> {
        match self {
            Self::Whole(one) => matrix(one),
            Self::Product(left, right) => {
                let ([rows, rank], [other, columns]) = (matrix(left)?, matrix(right)?);
                ensure!(
                    rank == other,
                    "factors of shapes {:?} and {:?} do not fit each other",
                    left.shape(),
                    right.shape()
                );
                Ok([rows, columns])
            }
        }
    }

    fn load(&self, device: &Device) -> Result<Loaded> {
        Ok(match self {
            Self::Whole(one) => Loaded::Whole(load(one, device)?),
            Self::Product(left, right) => {
                Loaded::Product(load(left, device)?, load(right, device)?)
            }
        })
    }

    fn sources(&self) -> Vec<&Source> {
        match self {
            Self::Whole(one) => vec![one],
            Self::Product(left, right) => vec![left, right],
        }
    }
}

/// The two dimensions of a factor; further ones, of convolutions of one pixel, are 1.
fn matrix(source: &Source) -> Result<[usize; 2]> {
    let shape = source.shape();
    match shape {
        [rows, columns, rest @ ..] if rest.iter().all(|n| *n == 1) => Ok([*rows, *columns]),
        [rows] => Ok([*rows, 1]),
        _ => anyhow::bail!("has shape {shape:?}, expected a matrix"),
    }
}

/// f32, in two dimensions, every number finite.
fn load(source: &Source, device: &Device) -> Result<Tensor> {
    let values = source.tensor_as(DType::F32, &Device::Cpu)?;
    let values = values.reshape(matrix(source)?.as_slice())?;
    let sum = values.abs()?.sum_all()?.to_scalar::<f32>()?;
    ensure!(sum.is_finite(), "holds NaN or infinite values");
    Ok(values.to_device(device)?)
}

impl Delta {
    /// (out, in) of the weight that it is added to.
    ///
    /// # Errors
    /// When the factors do not fit each other.
    pub(in crate::checkpoint) fn shape(&self) -> Result<[usize; 2]> {
        match &self.form {
            DeltaForm::LowRank { a, b } => Factor::Product(b.clone(), a.clone()).shape(),
            DeltaForm::Kronecker(left, right) => {
                let ([o, i], [p, j]) = (left.shape()?, right.shape()?);
                Ok([o * p, i * j])
            }
            DeltaForm::Hadamard(left, right) => {
                let (one, other) = (left.shape()?, right.shape()?);
                ensure!(
                    one == other,
                    "factors of {one:?} and {other:?} do not fit each other"
                );
                Ok(one)
            }
            DeltaForm::Difference(one) => matrix(one),
        }
    }

    /// Bytes of the factors in f32.
    pub(super) fn bytes(&self) -> usize {
        let sources = match &self.form {
            DeltaForm::LowRank { a, b } => vec![a, b],
            DeltaForm::Kronecker(left, right) | DeltaForm::Hadamard(left, right) => {
                [left.sources(), right.sources()].concat()
            }
            DeltaForm::Difference(one) => vec![one],
        };
        sources.into_iter().map(|s| 4 * s.elements()).sum()
    }

    /// The factors on `device`, f32.
    pub(super) fn load(&self, device: &Device) -> Result<LoadedDelta> {
        let form = match &self.form {
            DeltaForm::LowRank { a, b } => {
                LoadedForm::One(Loaded::Product(load(b, device)?, load(a, device)?))
            }
            DeltaForm::Kronecker(left, right) => {
                LoadedForm::Kronecker(left.load(device)?.whole()?, right.load(device)?.whole()?)
            }
            DeltaForm::Hadamard(left, right) => {
                LoadedForm::Hadamard(left.load(device)?, right.load(device)?)
            }
            DeltaForm::Difference(one) => LoadedForm::One(Loaded::Whole(load(one, device)?)),
        };
        let magnitude = self.magnitude.as_ref().map(|m| load(&m.values, device));
        Ok(LoadedDelta {
            form,
            scale: self.scale,
            magnitude: magnitude.transpose()?,
            share: self.magnitude.as_ref().map_or(1.0, |m| m.share),
        })
    }

    /// Adds the file's name and the module's to an error.
    pub(super) fn context<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| self.name.clone())
    }
}

enum Loaded {
    Whole(Tensor),
    Product(Tensor, Tensor),
}

impl Loaded {
    fn rows(&self, rows: &Range<usize>) -> Result<Tensor> {
        Ok(match self {
            Self::Whole(one) => one.narrow(0, rows.start, rows.len())?,
            Self::Product(left, right) => left.narrow(0, rows.start, rows.len())?.matmul(right)?,
        })
    }

    fn whole(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Whole(one) => one.clone(),
            Self::Product(left, right) => left.matmul(right)?,
        })
    }
}

enum LoadedForm {
    One(Loaded),
    Kronecker(Tensor, Tensor),
    Hadamard(Loaded, Loaded),
}

/// The factors of a [`Delta`] in f32.
pub(super) struct LoadedDelta {
    form: LoadedForm,
    scale: f32,
    magnitude: Option<Tensor>,
    share: f32,
}

impl LoadedDelta {
    /// The rows `rows` of what is added, (rows, in).
    fn rows(&self, rows: &Range<usize>) -> Result<Tensor> {
        let delta = match &self.form {
            LoadedForm::One(one) => one.rows(rows)?,
            LoadedForm::Hadamard(left, right) => (left.rows(rows)? * right.rows(rows)?)?,
            LoadedForm::Kronecker(left, right) => {
                let below = right.dim(0)?;
                let pick = |index: &dyn Fn(usize) -> usize| {
                    Tensor::from_iter(rows.clone().map(|row| index(row) as u32), left.device())
                };
                let left = left.index_select(&pick(&|row| row / below)?, 0)?;
                let right = right.index_select(&pick(&|row| row % below)?, 0)?;
                let product = left.unsqueeze(2)?.broadcast_mul(&right.unsqueeze(1)?)?;
                product.reshape((rows.len(), ()))?
            }
        };
        Ok((delta * f64::from(self.scale))?)
    }

    /// Whether magnitudes are of columns, which takes the norms of whole columns.
    pub(super) fn scales_columns(&self) -> bool {
        self.magnitude
            .as_ref()
            .is_some_and(|m| m.dims()[0] == 1 && m.dims()[1] != 1)
    }

    /// The weight's rows with this added: `base` (n, in) are its rows `rows`, f32. `columns`: the norms of all columns
    /// with this added, (1, in), where magnitudes are of columns.
    pub(super) fn added(
        &self,
        base: &Tensor,
        rows: &Range<usize>,
        columns: Option<&Tensor>,
    ) -> Result<Tensor> {
        let sum = (base + self.rows(rows)?)?;
        let Some(magnitude) = &self.magnitude else {
            return Ok(sum);
        };
        let scaled = match columns {
            Some(norms) => sum.broadcast_mul(&magnitude.div(norms)?)?,
            None => {
                let norms = sum.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
                let magnitude = magnitude.narrow(0, rows.start, rows.len())?;
                sum.broadcast_mul(&magnitude.div(&norms)?)?
            }
        };
        if (self.share - 1.0).abs() < f32::EPSILON {
            return Ok(scaled);
        }
        Ok((base + ((scaled - base)? * f64::from(self.share))?)?)
    }

    /// Sums over rows of the squares of the weight with this added, (1, in): parts of the columns' norms.
    pub(super) fn column_squares(&self, base: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
        let sum = (base + self.rows(rows)?)?;
        Ok(sum.sqr()?.sum_keepdim(0)?)
    }
}
