//! What calibration asks of the tokens x before a block and y behind it (`change.cu`), in the formats whose products are
//! exact in f32. Compiled and compared with its reference implementations when a device first asks for it: inference has no use for it.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle::cuda_backend::DeviceId;
use candle::{CudaDevice, D, DType, Device, Result, Tensor};

use super::check::{compare, first_line};
use super::launch::{CHANGE, Module, address_of};
use super::parameters::{AddProducts, ColumnSums, Parameters, RowView, TokenSums};

const KERNELS: [&str; 3] = [TokenSums::KERNEL, ColumnSums::KERNEL, AddProducts::KERNEL];
/// Bytes that a thread moves at a time.
const PIECE: usize = 16;
const THREADS: usize = 128;
/// Threads for a token in `token_sums`.
const WARP: usize = 32;
/// The most that tokens are divided by for sums of columns.
const PARTS: usize = 128;
/// The largest second and third size of a grid.
const MAX_BLOCKS: usize = 65_535;
/// How far sums may be from exact ones of the same numbers, and those that are differences of larger ones.
const TOLERANCE: f64 = 5e-6;
const TOLERANCE_OF_CHANGES: f64 = 1e-4;

type Loaded = std::result::Result<Module, String>;

static DEVICES: LazyLock<Mutex<HashMap<DeviceId, Arc<Loaded>>>> = LazyLock::new(Mutex::default);

/// The kernels of a device, or why there are none.
fn loaded(device: &CudaDevice) -> Arc<Loaded> {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = devices.entry(device.id());
    kernels.or_insert_with(|| Arc::new(load(device))).clone()
}

fn load(device: &CudaDevice) -> Loaded {
    let module = Module::from_program(&CHANGE, device, &KERNELS)?;
    match check(&module) {
        Ok(()) => Ok(module),
        Err(why) => Err(format!("sums of calibration: {}", first_line(&why))),
    }
}

/// Why the kernels are not used, if they were asked for.
pub(super) fn trouble(device: &CudaDevice) -> Option<String> {
    let devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = devices.get(&device.id())?;
    loaded.as_ref().as_ref().err().cloned()
}

/// The tokens around a block, both (batch, tokens, width).
struct Pair<'a> {
    rows: [RowView<'a>; 2],
    dtype: DType,
    sizes: [usize; 3],
    /// Whether everything begins and ends on whole pieces.
    whole: bool,
}

impl<'a> Pair<'a> {
    /// Nothing if the kernels do not take them.
    fn new(x: &'a Tensor, y: &'a Tensor) -> Result<Option<Self>> {
        let (dtype, (batch, tokens, width)) = (x.dtype(), x.dims3()?);
        let (Some(x_rows), Some(y_rows)) = (RowView::new(x)?, RowView::new(y)?) else {
            return Ok(None);
        };
        let rows = [x_rows, y_rows];
        let apart = |rows: &RowView| i32::try_from(rows.token).is_ok_and(|n| n as usize >= width);
        let fits = matches!(dtype, DType::F16 | DType::BF16)
            && x.elem_count() > 0
            && batch <= MAX_BLOCKS
            && width < MAX_BLOCKS
            && i32::try_from(tokens).is_ok()
            && rows.iter().all(apart);
        let aligned = |numbers: i64| {
            (numbers.unsigned_abs() as usize * dtype.size_in_bytes()).is_multiple_of(PIECE)
        };
        let whole = |rows: &RowView| {
            rows.data.is_multiple_of(PIECE as u64) && aligned(rows.batch) && aligned(rows.token)
        };
        let whole = rows.iter().all(whole) && aligned(width as i64);
        Ok(fits.then_some(Self {
            rows,
            dtype,
            sizes: [batch, tokens, width],
            whole,
        }))
    }

    fn token_sums(&self, module: &Module) -> Result<Tensor> {
        let ([x, y], [batch, tokens, width]) = (self.rows, self.sizes);
        let out = module.blank(DType::F32, batch * 3 * tokens)?;
        let parameters = TokenSums {
            x,
            y,
            out: out.address()?,
            tokens: tokens as i32,
            width: width as i32,
            whole: self.whole.into(),
        };
        let block = [WARP, THREADS / WARP];
        let grid = [tokens.div_ceil(block[1]), 1, batch];
        module.run(self.dtype, grid, block, &parameters)?;
        Ok(out.tensor((batch, 3, tokens)))
    }

    /// The sums of the columns of x and of y, (2, width), f32.
    fn column_sums(&self, module: &Module) -> Result<Tensor> {
        let ([x, y], [batch, tokens, width]) = (self.rows, self.sizes);
        let parts = tokens.min(PARTS);
        let out = module.blank(DType::F32, batch * parts * 2 * width)?;
        let parameters = ColumnSums {
            x,
            y,
            out: out.address()?,
            tokens: tokens as i32,
            width: width as i32,
            whole: self.whole.into(),
        };
        let pieces = width.div_ceil(PIECE / self.dtype.size_in_bytes());
        let grid = [pieces.div_ceil(THREADS), parts, batch];
        module.run(self.dtype, grid, [THREADS, 1], &parameters)?;
        out.tensor((batch * parts, 2, width)).sum(0)
    }

    /// See [`add_products`].
    fn add_products(
        &self,
        module: &Module,
        sums: Option<(&Tensor, &Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        let ([x, y], [batch, tokens, width]) = (self.rows, self.sizes);
        let products = module.blank(DType::F32, 2 * width * width)?;
        module.product_over_tokens(self.dtype, [x, x], self.sizes, &products, 0)?;
        module.product_over_tokens(self.dtype, [x, y], self.sizes, &products, 1)?;
        let products = products.tensor((2, width, width));
        let columns = self.column_sums(module)?;
        let long = width + 1;
        let gram = module.blank(DType::F64, long * long)?;
        let cross = module.blank(DType::F64, long * width)?;
        let before = |sum: Option<&Tensor>| sum.map_or(Ok(0), address_of);
        let rows = |t| -> Result<RowView> {
            RowView::new(t)?.ok_or_else(|| candle::Error::Msg("sums are not contiguous".to_owned()))
        };
        let parameters = AddProducts {
            products: rows(&products)?,
            columns: rows(&columns)?,
            gram: before(sums.map(|sums| sums.0))?,
            cross: before(sums.map(|sums| sums.1))?,
            gram_out: gram.address()?,
            cross_out: cross.address()?,
            tokens: (batch * tokens) as i32,
            width: width as i32,
        };
        let grid = [long.div_ceil(THREADS), long, 1];
        module.run(self.dtype, grid, [THREADS, 1], &parameters)?;
        Ok((gram.tensor((long, long)), cross.tensor((long, width))))
    }
}

/// What `call` makes of the tokens, if the kernels take them.
fn with<T>(
    x: &Tensor,
    y: &Tensor,
    call: impl FnOnce(&Module, &Pair) -> Result<T>,
) -> Result<Option<T>> {
    let Device::Cuda(device) = x.device() else {
        return Ok(None);
    };
    let alike = y.dtype() == x.dtype()
        && y.dims() == x.dims()
        && y.device().same_device(x.device())
        && !x.track_op()
        && !y.track_op();
    if !alike || x.rank() != 3 {
        return Ok(None);
    }
    let Some(pair) = Pair::new(x, y)? else {
        return Ok(None);
    };
    match loaded(device).as_ref() {
        Ok(module) => call(module, &pair).map(Some),
        Err(_) => Ok(None),
    }
}

/// ‖x‖², ‖y − x‖² and cos(x, y) of each token of `x`, `y` (batch, tokens, width): (batch, 3, tokens), f32. Nothing if
/// there is no kernel for it.
///
/// # Errors
/// When memory is short.
pub fn token_sums(x: &Tensor, y: &Tensor) -> Result<Option<Tensor>> {
    with(x, y, |module, pair| pair.token_sums(module))
}

/// `sums` (or nothing) and ZᵀZ, (width + 1, width + 1), and Zᵀ(y − x), (width + 1, width), for Z = \[x, 1\], over all
/// tokens of `x`, `y` (batch, tokens, width): f64. Products are exact and summed in f32. Nothing if there is no kernel
/// for it.
///
/// # Errors
/// When memory is short.
pub fn add_products(
    x: &Tensor,
    y: &Tensor,
    sums: Option<(&Tensor, &Tensor)>,
) -> Result<Option<(Tensor, Tensor)>> {
    let width = x.dim(D::Minus1)?;
    let shapes = [[width + 1, width + 1], [width + 1, width]];
    let fits = |(sum, shape): (&Tensor, [usize; 2])| {
        sum.dtype() == DType::F64
            && sum.dims() == shape
            && sum.is_contiguous()
            && sum.device().same_device(x.device())
    };
    if sums.is_some_and(|(a, b)| !([a, b].into_iter().zip(shapes).all(fits))) {
        return Ok(None);
    }
    with(x, y, |module, pair| pair.add_products(module, sums))
}

/// Whether the kernels agree with exact sums: odd widths, several samples, columns and rows among others.
fn check(module: &Module) -> Result<()> {
    let device = module.device();
    for dtype in [DType::F16, DType::BF16] {
        for (batch, tokens, width) in [(1, 1, 8), (2, 9, 37), (1, 131, 1032), (3, 70, 264)] {
            let numbers = |seed: f64| -> Result<Tensor> {
                let len = batch * (tokens + 3) * (width + 8);
                let at = |i: usize| ((i + 1) as f64 * 0.618_034 + seed).fract() as f32;
                let numbers: Vec<f32> = (0..len).map(|i| 4.0 * at(i) - 1.8).collect();
                let shape = (batch, tokens + 3, width + 8);
                Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
            };
            let x = numbers(0.0)?;
            // like most blocks, y is near to x
            let y = (&x + (numbers(0.4)? * 0.2)?)?;
            let part = |t: &Tensor| t.narrow(1, 2, tokens)?.narrow(2, 8, width);
            let on_device = |t: &Tensor| part(&t.to_device(&device)?);
            let (gpu_x, gpu_y) = (on_device(&x)?, on_device(&y)?);
            let Some(pair) = Pair::new(&gpu_x, &gpu_y)? else {
                candle::bail!("the kernels take no such operands")
            };
            let exact = |t: &Tensor| part(&t.to_dtype(DType::F64)?)?.contiguous();
            let (x, y) = (exact(&x)?, exact(&y)?);
            let (got, want) = (pair.token_sums(module)?, plain_token_sums(&x, &y)?);
            for i in 0..3 {
                compare(i, &got.narrow(1, i, 1)?, &want.narrow(1, i, 1)?, TOLERANCE)?;
            }
            // twice, for sums that are there already
            let (gram, cross) = pair.add_products(module, None)?;
            let got = pair.add_products(module, Some((&gram, &cross)))?;
            let want = plain_products(&x, &y)?;
            let twice = ((want.0 * 2.0)?, (want.1 * 2.0)?);
            for (i, (got, want)) in [(got.0, twice.0), (got.1, twice.1)].iter().enumerate() {
                for (from, lines) in [(0, width), (width, 1)] {
                    let lines = |t: &Tensor| t.narrow(0, from, lines);
                    let tolerance = [TOLERANCE, TOLERANCE_OF_CHANGES][i];
                    compare(3 + i, &lines(got)?, &lines(want)?, tolerance)?;
                }
            }
        }
    }
    Ok(())
}

/// The reference of [`token_sums`], in the format of the operands.
fn plain_token_sums(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let sum = |t: Tensor| t.sum(D::Minus1);
    let (xx, yy, xy) = (sum(x.sqr()?)?, sum(y.sqr()?)?, sum((x * y)?)?);
    let cosine = (xy / (&xx * yy)?.sqrt()?)?;
    Tensor::stack(&[xx, sum((y - x)?.sqr()?)?, cosine], 1)
}

/// The reference of [`add_products`] without sums, in the format of the operands.
fn plain_products(x: &Tensor, y: &Tensor) -> Result<(Tensor, Tensor)> {
    let (batch, tokens, width) = x.dims3()?;
    let ones = Tensor::ones((batch * tokens, 1), x.dtype(), x.device())?;
    let z = Tensor::cat(&[&x.reshape(((), width))?, &ones], 1)?;
    let change = (y - x)?.reshape(((), width))?;
    Ok((z.t()?.matmul(&z)?, z.t()?.matmul(&change)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::gpu;

    /// Needs NVRTC, but neither GPU nor driver.
    #[test]
    fn all_kernels_compile() {
        let ptx = CHANGE.compiled().unwrap();
        for kernel in KERNELS {
            for dtype in ["f16", "bf16"] {
                let entry = format!(".entry {kernel}_{dtype}(");
                assert!(ptx.contains(&entry), "no {entry}");
            }
        }
    }

    #[test]
    fn all_kernels_agree_with_their_twins() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let device = gpu.as_cuda_device()?;
        assert_eq!(loaded(device).as_ref().as_ref().err(), None);
        Ok(())
    }
}
