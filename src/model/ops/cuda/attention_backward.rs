//! The backward pass of attention on tensor cores (`attention_backward.cu`). It is compiled and compared with its slow
//! reference when a device first asks for it: inference has no use for it.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle::cuda_backend::DeviceId;
use candle::{CudaDevice, D, DType, Device, Result, Tensor};

use super::super::plain;
use super::super::types::Heads;
use super::launch::{ATTENTION_BACKWARD, Module, address_of};
use super::parameters::{AttentionBackward, RowView};

/// The size of a head that the kernels are made for.
const HEAD: usize = 128;
/// Queries or keys of a block of threads, rows of a tile, threads: `KEPT`, `TILE` and `THREADS`.
const KEPT: usize = 128;
const TILE: usize = 64;
const THREADS: usize = 256;
/// Finds the sums of the rows, and the gradient of the queries; has to be first.
const QUERIES: &str = "attention_backward_queries";
/// Finds the gradients of keys and values.
const KEYS: &str = "attention_backward_keys";
/// Two tiles of each of two operands, and of both sums.
const SHARED: usize = 4 * TILE * (HEAD * 2 + 4);
/// The largest second and third size of a grid.
const MAX_BLOCKS: usize = 65_535;
/// How far results may be from those of the reference: weights and gradients of scores are rounded before they are
/// multiplied, the results once more.
const TOLERANCES: [(DType, f64); 2] = [(DType::F16, 7e-4), (DType::BF16, 5e-3)];

type Loaded = std::result::Result<Module, String>;

static DEVICES: LazyLock<Mutex<HashMap<DeviceId, Arc<Loaded>>>> = LazyLock::new(Mutex::default);

/// The kernels of a device, or why there are none.
fn loaded(device: &CudaDevice) -> Arc<Loaded> {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = devices.entry(device.id());
    kernels.or_insert_with(|| Arc::new(load(device))).clone()
}

fn load(device: &CudaDevice) -> Loaded {
    let module = Module::from_program(&ATTENTION_BACKWARD, device, &[QUERIES, KEYS])?;
    match check(&module) {
        Ok(()) => Ok(module),
        Err(why) => {
            let why = why.to_string();
            // candle appends its backtrace
            let why = why.lines().next().unwrap_or_default();
            Err(format!("`attention_backward`: {why}"))
        }
    }
}

fn fits(dtype: DType, head: usize) -> bool {
    matches!(dtype, DType::F16 | DType::BF16) && head == HEAD
}

/// Why the kernels are not used, if they were asked for.
pub(super) fn trouble(device: &CudaDevice) -> Option<String> {
    let devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = devices.get(&device.id())?;
    loaded.as_ref().as_ref().err().cloned()
}

/// Whether [`attention_backward`] computes with heads of this size in this format.
pub(in super::super) fn has_attention_backward(device: &Device, dtype: DType, head: usize) -> bool {
    match device {
        Device::Cuda(device) => fits(dtype, head) && loaded(device).is_ok(),
        _ => false,
    }
}

/// Gradients of queries, keys and values (each (batch, heads, tokens, head size), contiguous), stacked, from the
/// attended values and their gradient, (batch, tokens, heads · head size). Nothing if the reference has to do it.
pub(in super::super) fn attention_backward(
    heads: &Heads,
    attended: &Tensor,
    grad: &Tensor,
) -> Result<Option<Tensor>> {
    let Heads { q, k, v } = heads;
    let alike =
        |x: &Tensor| !x.track_op() && x.dtype() == q.dtype() && x.device().same_device(q.device());
    if ![q, k, v, attended, grad].into_iter().all(alike)
        || !has_attention_backward(q.device(), q.dtype(), q.dim(3)?)
    {
        return Ok(None);
    }
    match loaded(q.device().as_cuda_device()?).as_ref() {
        Ok(module) => call(module, heads, [attended, grad]),
        Err(_) => Ok(None),
    }
}

fn call(module: &Module, Heads { q, k, v }: &Heads, outer: [&Tensor; 2]) -> Result<Option<Tensor>> {
    let (dtype, (batch, heads, tokens, size)) = (q.dtype(), q.dims4()?);
    let padded = tokens.next_multiple_of(KEPT);
    let [attended, grad] = outer.map(RowView::new);
    let (Some(attended), Some(grad)) = (attended?, grad?) else {
        return Ok(None);
    };
    let operands = [q, k, v];
    let addresses = [address_of(q)?, address_of(k)?, address_of(v)?];
    // 16 bytes are copied at a time
    let aligned = addresses
        .iter()
        .chain(&[attended.data, grad.data])
        .all(|address| address.is_multiple_of(16))
        && [attended, grad]
            .iter()
            .all(|rows| rows.batch % 8 == 0 && rows.token % 8 == 0);
    if size != HEAD
        || operands
            .iter()
            .any(|x| x.dims() != q.dims() || !x.is_contiguous())
        || outer
            .iter()
            .any(|x| x.dims() != [batch, tokens, heads * size])
        || !aligned
        || heads.max(batch) > MAX_BLOCKS
        || i32::try_from(padded).is_err()
    {
        return Ok(None);
    }
    let out = module.blank(dtype, 3 * batch * heads * tokens * size)?;
    let sums = module.blank(DType::F32, 2 * batch * heads * padded)?;
    let [q, k, v] = addresses;
    let parameters = AttentionBackward {
        q,
        k,
        v,
        attended,
        grad,
        out: out.address()?,
        sums: sums.address()?,
        tokens: tokens as i32,
        padded: padded as i32,
        scale: 1.0 / (size as f32).sqrt(),
    };
    let grid = [padded / KEPT, heads, batch];
    for kernel in [QUERIES, KEYS] {
        module.start(kernel, dtype, grid, [THREADS, 1], SHARED, &parameters)?;
    }
    Ok(Some(out.tensor((3, batch, heads, tokens, size))))
}

/// Whether the kernels agree with their reference: in one token, in tokens that fill no tile, in more than one tile; with a
/// gradient among other columns.
fn check(module: &Module) -> Result<()> {
    for (dtype, tolerance) in TOLERANCES {
        for (batch, heads, tokens) in [(1, 1, 1), (2, 3, 77), (1, 2, 333)] {
            let numbers = |seed: usize, shape: &[usize]| -> Result<Tensor> {
                let numbers: Vec<f32> = (seed..seed + shape.iter().product::<usize>())
                    .map(|i| 4.0 * ((i * i % 65_521) as f32 / 65_521.0 - 0.5))
                    .collect();
                Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
            };
            let all = numbers(3, &[3, batch, heads, tokens, HEAD])?;
            let grad = numbers(5, &[batch, tokens, heads * HEAD + 8])?;
            let split = |all: &Tensor| -> Result<Heads> {
                let (q, k, v) = (all.get(0)?, all.get(1)?, all.get(2)?);
                Ok(Heads { q, k, v })
            };
            let columns = |grad: &Tensor| grad.narrow(2, 8, heads * HEAD);
            let device = module.device();
            let attended = attended(&split(&all.to_dtype(DType::F32)?)?)?;
            // among other columns, as the gradient is
            let attended = attended.pad_with_zeros(2, 8, 0)?.to_dtype(dtype)?;
            let got = call(
                module,
                &split(&all.to_device(&device)?)?,
                [
                    &columns(&attended.to_device(&device)?)?,
                    &columns(&grad.to_device(&device)?)?,
                ],
            )?;
            let Some(got) = got else {
                candle::bail!("the kernels take no such operands")
            };
            let grad = columns(&grad.to_dtype(DType::F32)?)?
                .reshape((batch, tokens, heads, HEAD))?
                .transpose(1, 2)?
                .contiguous()?;
            let heads = split(&all.to_dtype(DType::F32)?)?;
            let want = plain::attention_backward(&heads, &grad, usize::MAX)?;
            // of one token alone the queries and keys have no gradient
            for i in usize::from(tokens == 1) * 2..3 {
                let error = distance(&got.get(i)?, &want.get(i)?)?;
                if error.is_nan() || error > tolerance {
                    candle::bail!("{dtype:?}, {tokens} tokens: result {i} is off by {error:.1e}");
                }
            }
        }
    }
    Ok(())
}

/// What attention makes of the heads, (batch, tokens, heads · head size).
fn attended(Heads { q, k, v }: &Heads) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let weights = candle_nn::ops::softmax(&(q.matmul(&k.t()?)? * scale)?, D::Minus1)?;
    weights.matmul(v)?.transpose(1, 2)?.flatten_from(2)
}

/// How far `got` is from `want`, relative, over all their numbers.
fn distance(got: &Tensor, want: &Tensor) -> Result<f64> {
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let want = want.to_dtype(DType::F64)?;
    let squares = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((squares(&(got - &want)?)? / squares(&want)?).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::gpu;

    /// Needs NVRTC, but neither GPU nor driver.
    #[test]
    fn both_kernels_compile() {
        let ptx = ATTENTION_BACKWARD.compiled().unwrap();
        for kernel in [QUERIES, KEYS] {
            for (dtype, _) in TOLERANCES {
                let entry = format!(".entry {kernel}_{}(", dtype.as_str());
                assert!(ptx.contains(&entry), "no {entry}");
            }
        }
    }

    #[test]
    fn both_kernels_agree_with_their_twin() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let device = gpu.as_cuda_device()?;
        assert!(has_attention_backward(&gpu, DType::BF16, HEAD));
        assert_eq!(trouble(device), None);
        Ok(())
    }
}
