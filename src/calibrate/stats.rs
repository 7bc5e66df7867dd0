//! The sums that every score and every least-squares fit follows from, gathered in one pass without storing
//! activations. Solving with them is `prune::fit`'s business.

use anyhow::{Result, ensure};
use candle::{DType, Tensor};

use crate::{
    layout::{BlockId, BlockSpec},
    model::{Conditioning, Observer, Stream},
};

/// Scalar sums over tokens of one stream of one block; x is the block's input, y its output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Number of tokens.
    pub tokens: f64,
    /// Σ ‖x‖².
    pub input_sq: f64,
    /// Σ ‖y − x‖².
    pub change_sq: f64,
    /// Σ cos(x, y).
    pub cosine: f64,
}

impl Moments {
    /// Adds another share of the same sums.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.input_sq += other.input_sq;
        self.change_sq += other.change_sq;
        self.cosine += other.cosine;
    }
}

/// The sums of a least-squares problem R ≈ Z B over all tokens seen, in f64.
#[derive(Clone, Debug)]
pub struct Gram {
    /// ZᵀZ, (k, k).
    pub gram: Tensor,
    /// ZᵀR, (k, d).
    pub cross: Tensor,
    /// Σ ‖R‖².
    pub target_sq: f64,
}

impl Gram {
    /// The sums of one set of rows: `features` (n, k), `target` (n, d), both in the format to multiply in.
    ///
    /// # Errors
    /// When a product fails.
    pub fn of(features: &Tensor, target: &Tensor) -> Result<Self> {
        let transposed = features.t()?;
        Ok(Self {
            gram: transposed.matmul(features)?.to_dtype(DType::F64)?,
            cross: transposed.matmul(target)?.to_dtype(DType::F64)?,
            target_sq: target.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?,
        })
    }

    /// The sums over the rows of both.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            gram: (&self.gram + &other.gram)?,
            cross: (&self.cross + &other.cross)?,
            target_sq: self.target_sq + other.target_sq,
        })
    }

    /// Adds to a sum that may have no share yet.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn add_to(self, sum: &mut Option<Self>) -> Result<()> {
        *sum = Some(match sum.take() {
            None => self,
            Some(sum) => sum.plus(&self)?,
        });
        Ok(())
    }
}

/// The format for products of activations: on the CPU f64 costs little more than f32 and keeps the sums exact; f64
/// units of GPUs are scarce, so products are f32 there and only sums f64.
pub fn product_dtype(device: &candle::Device) -> DType {
    if device.is_cpu() {
        DType::F64
    } else {
        DType::F32
    }
}

/// Appends a column of ones, for the bias: (n, k) → (n, k + 1).
///
/// # Errors
/// When memory is short.
pub fn with_ones(features: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((features.dim(0)?, 1), features.dtype(), features.device())?;
    Ok(Tensor::cat(&[features, &ones], 1)?)
}

/// Everything gathered of one stream (text or image tokens) of one block.
#[derive(Clone, Debug, Default)]
pub struct StreamStats {
    /// Scalar sums over all tokens.
    pub moments: Moments,
    /// Sums for the fit; `None` until tokens were seen, or where only scalars were asked for.
    pub gram: Option<Gram>,
}

impl StreamStats {
    /// Adds the tokens `x` → `y`, both (…, d).
    ///
    /// # Errors
    /// When a value is NaN or infinite, or a product fails.
    pub fn add(&mut self, x: &Tensor, y: &Tensor, with_gram: bool) -> Result<()> {
        let width = x.dim(candle::D::Minus1)?;
        let product = product_dtype(x.device());
        let x = x.reshape(((), width))?.to_dtype(product)?;
        let y = y.reshape(((), width))?.to_dtype(product)?;
        let change = (&y - &x)?;
        let tokens = x.dim(0)?;
        let row_sums = |t: Tensor| -> Result<Tensor> { Ok(t.sum(1)?.to_dtype(DType::F64)?) };
        let (xx, yy, xy) = (
            row_sums(x.sqr()?)?,
            row_sums(y.sqr()?)?,
            row_sums((&x * &y)?)?,
        );
        let cosine = (xy / (&xx * yy)?.sqrt()?.maximum(f64::MIN_POSITIVE)?)?;
        let total = |t: &Tensor| -> Result<f64> { Ok(t.sum_all()?.to_scalar::<f64>()?) };
        let moments = Moments {
            tokens: tokens as f64,
            input_sq: total(&xx)?,
            change_sq: total(&row_sums(change.sqr()?)?)?,
            cosine: total(&cosine)?,
        };
        ensure!(
            moments.input_sq.is_finite() && moments.change_sq.is_finite(),
            "activations are NaN or infinite"
        );
        self.moments.add(&moments);
        if with_gram {
            Gram::of(&with_ones(&x)?, &change)?.add_to(&mut self.gram)?;
        }
        Ok(())
    }
}

/// What was gathered of one block.
#[derive(Clone, Debug)]
pub struct BlockStats {
    /// The block in the original model.
    pub id: BlockId,
    /// Its text tokens.
    pub txt: StreamStats,
    /// Its image tokens.
    pub img: StreamStats,
}

/// Gathers statistics of every original block: an [`Observer`] for calibration passes.
#[derive(Clone, Debug)]
pub struct CalibrationStats {
    /// One entry for each original block, in network order.
    pub blocks: Vec<BlockStats>,
    with_gram: bool,
}

impl CalibrationStats {
    /// Empty sums for the original blocks of `layout`; `with_gram` gathers what fits need, not only scalars.
    pub fn new(layout: &[BlockSpec], with_gram: bool) -> Self {
        let blocks = layout.iter().filter_map(|spec| match spec {
            BlockSpec::Original(id) => Some(BlockStats {
                id: *id,
                txt: StreamStats::default(),
                img: StreamStats::default(),
            }),
            BlockSpec::Replaced(_) => None,
        });
        Self {
            blocks: blocks.collect(),
            with_gram,
        }
    }

    /// The statistics of one block.
    pub fn get(&self, id: BlockId) -> Option<&BlockStats> {
        self.blocks.iter().find(|block| block.id == id)
    }
}

impl Observer for CalibrationStats {
    fn block(
        &mut self,
        _: usize,
        spec: &BlockSpec,
        _: &Conditioning,
        input: &Stream,
        output: &Stream,
    ) -> candle::Result<()> {
        let BlockSpec::Original(id) = spec else {
            return Ok(());
        };
        let Some(block) = self.blocks.iter_mut().find(|block| block.id == *id) else {
            return Ok(());
        };
        let with_gram = self.with_gram;
        let add = |stats: &mut StreamStats, x: Tensor, y: Tensor| {
            stats
                .add(&x, &y, with_gram)
                .map_err(|e| candle::Error::Msg(format!("block {id}: {e:#}")))
        };
        add(&mut block.txt, input.txt()?, output.txt()?)?;
        add(&mut block.img, input.img()?, output.img()?)
    }
}
