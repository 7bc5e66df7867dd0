//! How each kernel is called: what fits it, which thread does what, where the result lies.

use candle::{DType, Result, Tensor};

use super::super::types::{Branch, HEADS_EPS, Heads, NORM_EPS, Projected};
use super::launch::{Module, address_of};
use super::parameters::{self, GatedResidual, Gelu, NormModulate, RowView, Softmax, Swiglu};
use crate::model::rope::Rope;

/// Bytes that a thread moves at a time.
const PIECE: usize = 16;
/// Threads in a block, if a row does not ask for more.
pub(super) const THREADS: usize = 128;
/// Tokens for which a thread keeps bias and gate.
const TOKENS: usize = 4;
/// Pieces of a row that a thread of `norm_modulate` and `softmax` holds (`HELD`), and the most threads there are for a row.
pub(super) const HELD: usize = 4;
pub(super) const MAX_THREADS: usize = 512;
const MAX_THREADS_SOFTMAX: usize = 1024;
/// Threads that add up among themselves.
pub(super) const WARP: usize = 32;
/// The largest second and third size of a grid.
pub(super) const MAX_BLOCKS: usize = 65_535;

/// Collects the operands of a call; remembers what does not fit.
pub(super) struct Operands {
    size: usize,
    /// Whether everything begins and ends on whole pieces.
    pub(super) whole: bool,
    pub(super) fits: bool,
}

impl Operands {
    pub(super) fn new(dtype: DType) -> Self {
        Self {
            size: dtype.size_in_bytes(),
            whole: true,
            fits: true,
        }
    }

    /// Numbers in a piece.
    pub(super) fn piece(&self) -> usize {
        PIECE / self.size
    }

    pub(super) fn fits(&mut self, condition: bool) {
        self.fits &= condition;
    }

    /// A width, or a number of columns before others.
    pub(super) fn width(&mut self, width: usize) {
        self.whole &= width.is_multiple_of(self.piece());
    }

    /// Rows of `stride` numbers that begin at `address`.
    pub(super) fn place(&mut self, address: u64, stride: usize) {
        self.whole &= address.is_multiple_of(PIECE as u64);
        self.width(stride);
    }

    pub(super) fn rows<'a>(&mut self, x: &'a Tensor, shape: &[usize]) -> Result<RowView<'a>> {
        self.fits(x.dims() == shape);
        let rows = RowView::new(x)?;
        self.fits(rows.is_some());
        let rows = rows.unwrap_or_default();
        let aligned = |bytes: i64| bytes % PIECE as i64 == 0;
        let size = self.size as i64;
        self.whole &=
            aligned(rows.data as i64) && aligned(rows.batch * size) && aligned(rows.token * size);
        Ok(rows)
    }

    pub(super) fn some_rows<'a>(
        &mut self,
        x: Option<&'a Tensor>,
        shape: &[usize],
    ) -> Result<RowView<'a>> {
        x.map_or(Ok(RowView::default()), |x| self.rows(x, shape))
    }

    /// The address of a contiguous tensor of f32.
    pub(super) fn table(&mut self, x: &Tensor) -> Result<u64> {
        self.fits(x.dtype() == DType::F32 && x.is_contiguous());
        let address = address_of(x)?;
        self.whole &= address.is_multiple_of(PIECE as u64);
        Ok(address)
    }
}

/// Blocks for `columns` pieces of each token, of `tokens` tokens, [`TOKENS`] for a thread, and `batch` samples.
pub(super) fn grid(columns: usize, tokens: usize, batch: usize) -> [usize; 3] {
    let rows = tokens.div_ceil(TOKENS).min(MAX_BLOCKS);
    [columns.div_ceil(THREADS), rows, batch]
}

/// `norm::norm_modulate`: `x` (batch, tokens, width), `shift` and `scale` (batch, width).
pub(super) fn norm_modulate(
    module: &Module,
    x: &Tensor,
    shift: &Tensor,
    scale: &Tensor,
) -> Result<Option<Tensor>> {
    let (dtype, (batch, tokens, width)) = (x.dtype(), x.dims3()?);
    let mut operands = Operands::new(dtype);
    let rows = [
        operands.rows(x, &[batch, tokens, width])?,
        operands.rows(shift, &[batch, width])?,
        operands.rows(scale, &[batch, width])?,
    ];
    operands.width(width);
    let threads = width
        .div_ceil(operands.piece() * HELD)
        .next_multiple_of(WARP);
    operands.fits(threads <= MAX_THREADS && batch <= MAX_BLOCKS);
    if !operands.fits {
        return Ok(None);
    }
    let out = module.blank(dtype, batch * tokens * width)?;
    let [x, shift, scale] = rows;
    let parameters = NormModulate {
        x,
        shift,
        scale,
        out: out.address()?,
        width: width as i32,
        whole: operands.whole.into(),
        eps: NORM_EPS as f32,
    };
    module.run(dtype, [tokens, 1, batch], [threads, 1], &parameters)?;
    Ok(Some(out.tensor((batch, tokens, width))))
}

/// The weights of `attention`: softmax of each row of `scores` (batch, heads, rows, tokens), f32, rounded to `dtype`.
pub(super) fn softmax(module: &Module, scores: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let (shape, width) = (scores.shape().clone(), scores.dim(3)?);
    let rows = scores.elem_count() / width.max(1);
    let mut operands = Operands::new(dtype);
    operands.fits(scores.is_contiguous() && i32::try_from(rows).is_ok());
    operands.width(width);
    let flat = scores.reshape((rows, width))?;
    let x = operands.rows(&flat, &[rows, width])?;
    let threads = width
        .div_ceil(operands.piece() * HELD)
        .next_multiple_of(WARP);
    operands.fits(threads <= MAX_THREADS_SOFTMAX);
    if !operands.fits {
        return Ok(None);
    }
    let out = module.blank(dtype, rows * width)?;
    let parameters = Softmax {
        x,
        out: out.address()?,
        width: width as i32,
        whole: operands.whole.into(),
    };
    module.run(dtype, [rows, 1, 1], [threads, 1], &parameters)?;
    Ok(Some(out.tensor(shape)))
}

/// `residual::gated_residual`.
pub(super) fn gated_residual(module: &Module, branches: &[Branch]) -> Result<Option<Tensor>> {
    let Some(first) = branches.first() else {
        return Ok(None);
    };
    let (dtype, (batch, _, width)) = (first.x.dtype(), first.x.dims3()?);
    let tokens = branches.iter().map(|b| b.x.dim(1));
    let total = tokens.sum::<Result<usize>>()?;
    // (1, width) is a gate for all samples
    let gates = branches.iter().map(|branch| match branch.gate {
        Some(gate) if gate.dims() == [1, width] => gate.broadcast_as((batch, width)).map(Some),
        gate => Ok(gate.cloned()),
    });
    let gates = gates.collect::<Result<Vec<_>>>()?;
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.fits(batch <= MAX_BLOCKS);
    let mut parts = Vec::with_capacity(branches.len());
    for (branch, gate) in branches.iter().zip(&gates) {
        let tokens = branch.x.dim(1)?;
        parts.push((
            tokens,
            operands.rows(branch.x, &[batch, tokens, width])?,
            operands.rows(branch.y, &[batch, tokens, width])?,
            operands.some_rows(branch.bias, &[width])?,
            operands.some_rows(gate.as_ref(), &[batch, width])?,
        ));
    }
    if !operands.fits {
        return Ok(None);
    }
    let out = module.blank(dtype, batch * total * width)?;
    let mut start = 0;
    for (tokens, x, y, bias, gate) in parts {
        let parameters = GatedResidual {
            x,
            y,
            bias,
            gate,
            out: out.address()?,
            tokens: tokens as i32,
            width: width as i32,
            first: start as i32,
            total: total as i32,
            whole: operands.whole.into(),
        };
        let grid = grid(width.div_ceil(operands.piece()), tokens, batch);
        module.run(dtype, grid, [THREADS, 1], &parameters)?;
        start += tokens;
    }
    Ok(Some(out.tensor((batch, total, width))))
}

/// `heads::heads`.
pub(super) fn heads(
    module: &Module,
    streams: &[Projected],
    num_heads: usize,
    rope: &Rope,
) -> Result<Option<Heads>> {
    let Some(first) = streams.first() else {
        return Ok(None);
    };
    let (dtype, batch) = (first.qkv.dtype(), first.qkv.dim(0)?);
    let (total, size) = (rope.tokens(), rope.head_dim());
    let mut operands = Operands::new(dtype);
    operands.width(size);
    let table = [operands.table(rope.cos())?, operands.table(rope.sin())?];
    let lanes = size.div_ceil(operands.piece()).next_power_of_two();
    operands.fits(size.is_multiple_of(2) && lanes <= WARP && batch <= MAX_BLOCKS);
    let mut parts = Vec::with_capacity(streams.len());
    for Projected { qkv, bias, norms } in streams {
        let (_, tokens, width) = qkv.dims3()?;
        operands.fits(width >= 3 * num_heads * size);
        let bias_width = bias.map_or(Ok(width), |bias| bias.dim(0))?;
        operands.fits(bias_width >= 3 * num_heads * size);
        parts.push((
            tokens,
            operands.rows(qkv, &[batch, tokens, width])?,
            operands.some_rows(*bias, &[bias_width])?,
            operands.rows(&norms.query, &[size])?,
            operands.rows(&norms.key, &[size])?,
        ));
    }
    operands.fits(parts.iter().map(|part| part.0).sum::<usize>() == total);
    if !operands.fits {
        return Ok(None);
    }
    let shape = (3, batch, num_heads, total, size);
    let out = module.blank(dtype, 3 * batch * num_heads * total * size)?;
    let mut start = 0;
    for (tokens, qkv, bias, query, key) in parts {
        let parameters = parameters::Heads {
            qkv,
            bias,
            query,
            key,
            cos: table[0],
            sin: table[1],
            out: out.address()?,
            number: num_heads as i32,
            size: size as i32,
            first: start as i32,
            total: total as i32,
            whole: operands.whole.into(),
            eps: HEADS_EPS as f32,
        };
        let block = [lanes, THREADS / lanes];
        module.run(dtype, [tokens, 1, batch], block, &parameters)?;
        start += tokens;
    }
    let all = out.tensor(shape);
    Ok(Some(Heads {
        q: all.get(0)?,
        k: all.get(1)?,
        v: all.get(2)?,
    }))
}

/// The scores of `attention`: `scale · q·kᵀ`, `q` (batch, heads, rows, size) and `k` (batch, heads, tokens, size), in f32.
pub(super) fn scores(
    module: &Module,
    q: &Tensor,
    k: &Tensor,
    scale: f64,
) -> Result<Option<Tensor>> {
    let ((batch, heads, rows, size), tokens) = (q.dims4()?, k.dim(2)?);
    let sizes = [batch * heads, rows, tokens, size];
    let counted = |n: &usize| *n > 0 && i32::try_from(*n).is_ok();
    let fits = k.dims() == [batch, heads, tokens, size] && sizes.iter().all(counted);
    if !fits || !q.is_contiguous() || !k.is_contiguous() {
        return Ok(None);
    }
    let out = module.blank(DType::F32, batch * heads * rows * tokens)?;
    module.product(q, k, sizes, scale as f32, &out)?;
    Ok(Some(out.tensor((batch, heads, rows, tokens))))
}

/// `gelu::gelu`.
pub(super) fn gelu(
    module: &Module,
    x: &Tensor,
    bias: Option<&Tensor>,
    prefix: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (dtype, (batch, tokens, width)) = (x.dtype(), x.dims3()?);
    let front = prefix.map_or(Ok(0), |prefix| prefix.dim(2))?;
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.width(front);
    operands.fits(batch <= MAX_BLOCKS);
    let rows = [
        operands.rows(x, &[batch, tokens, width])?,
        operands.some_rows(bias, &[width])?,
        operands.some_rows(prefix, &[batch, tokens, front])?,
    ];
    if !operands.fits {
        return Ok(None);
    }
    let out = module.blank(dtype, batch * tokens * (front + width))?;
    let [x, bias, prefix] = rows;
    let parameters = Gelu {
        x,
        bias,
        prefix,
        out: out.address()?,
        tokens: tokens as i32,
        front: front as i32,
        width: width as i32,
        whole: operands.whole.into(),
    };
    let pieces = [front, width].map(|n| n.div_ceil(operands.piece()));
    let grid = grid(pieces[0] + pieces[1], tokens, batch);
    module.run(dtype, grid, [THREADS, 1], &parameters)?;
    Ok(Some(out.tensor((batch, tokens, front + width))))
}

/// `swiglu::swiglu`.
pub(super) fn swiglu(
    module: &Module,
    x: &Tensor,
    prefix: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (dtype, (batch, tokens, both)) = (x.dtype(), x.dims3()?);
    let (front, width) = (prefix.map_or(Ok(0), |prefix| prefix.dim(2))?, both / 2);
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.width(front);
    operands.fits(both.is_multiple_of(2) && batch <= MAX_BLOCKS);
    let x = operands.rows(x, &[batch, tokens, both])?;
    let prefix = operands.some_rows(prefix, &[batch, tokens, front])?;
    if !operands.fits {
        return Ok(None);
    }
    let out = module.blank(dtype, batch * tokens * (front + width))?;
    let parameters = Swiglu {
        x,
        prefix,
        out: out.address()?,
        tokens: tokens as i32,
        front: front as i32,
        width: width as i32,
        whole: operands.whole.into(),
    };
    let pieces = [front, width].map(|n| n.div_ceil(operands.piece()));
    let grid = grid(pieces[0] + pieces[1], tokens, batch);
    module.run(dtype, grid, [THREADS, 1], &parameters)?;
    Ok(Some(out.tensor((batch, tokens, front + width))))
}
