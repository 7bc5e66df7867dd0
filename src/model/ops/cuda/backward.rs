//! The backward passes of what lies between the products (`backward.cu`). Compiled and compared with the gradients of the
//! compositions when a device first asks for them: inference has no use for them.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle::cuda_backend::DeviceId;
use candle::{CudaDevice, Result, Tensor};

use super::super::types::{HEADS_EPS, NORM_EPS, Projected};
use super::calls::{HELD, MAX_BLOCKS, MAX_THREADS, Operands, THREADS, WARP, grid};
use super::check::first_line;
use super::device_of;
use super::launch::{BACKWARD, Module};
use super::parameters::{
    GeluBackward, HeadsBackward, NormBackward, Parameters, ResidualBackward, SwigluBackward,
    WeightedSum,
};
use crate::model::rope::Rope;

mod check;
mod sums;

pub(in super::super) use sums::{residual_backward, weighted_sum};

const ALL: [&str; 6] = [
    GeluBackward::KERNEL,
    SwigluBackward::KERNEL,
    NormBackward::KERNEL,
    HeadsBackward::KERNEL,
    ResidualBackward::KERNEL,
    WeightedSum::KERNEL,
];

type Loaded = std::result::Result<Module, String>;

static DEVICES: LazyLock<Mutex<HashMap<DeviceId, Arc<Loaded>>>> = LazyLock::new(Mutex::default);

/// The kernels of a device, or why there are none.
fn loaded(device: &CudaDevice) -> Arc<Loaded> {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = devices.entry(device.id());
    kernels
        .or_insert_with(|| {
            Arc::new(
                Module::from_program(&BACKWARD, device, &ALL).and_then(|module| {
                    match check::all(&module) {
                        Ok(()) => Ok(module),
                        Err(why) => Err(format!("backward passes: {}", first_line(&why))),
                    }
                }),
            )
        })
        .clone()
}

/// Why the kernels are not used, if they were asked for.
pub(super) fn trouble(device: &CudaDevice) -> Option<String> {
    let devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = devices.get(&device.id())?;
    loaded.as_ref().as_ref().err().cloned()
}

/// What `call` makes of the kernels, if they may run.
fn with<T>(
    operands: &[Option<&Tensor>],
    call: impl FnOnce(&Module) -> Result<Option<T>>,
) -> Result<Option<T>> {
    let Some(device) = device_of(operands) else {
        return Ok(None);
    };
    match loaded(device).as_ref() {
        Ok(module) => call(module),
        Err(_) => Ok(None),
    }
}

/// The gradient of `x` from that of gelu(x + bias), all (batch, tokens, width).
pub(in super::super) fn gelu_backward(
    x: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<Option<Tensor>> {
    with(&[Some(x), bias, Some(grad)], |module| {
        of_gelu(module, x, bias, grad)
    })
}

fn of_gelu(
    module: &Module,
    x: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<Option<Tensor>> {
    let (batch, tokens, width) = x.dims3()?;
    let out = module.blank(x.dtype(), batch * tokens * width)?;
    let written = gelu(module, x, bias, grad, (out.address()?, width))?;
    Ok(written.then(|| out.tensor((batch, tokens, width))))
}

/// Writes [`gelu_backward`] to rows of some stride that begin at an address; false if it does not fit.
fn gelu(
    module: &Module,
    x: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
    (out, stride): (u64, usize),
) -> Result<bool> {
    let (dtype, (batch, tokens, width)) = (x.dtype(), x.dims3()?);
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.place(out, stride);
    operands.fits(batch <= MAX_BLOCKS);
    let parameters = GeluBackward {
        x: operands.rows(x, &[batch, tokens, width])?,
        bias: operands.some_rows(bias, &[width])?,
        grad: operands.rows(grad, &[batch, tokens, width])?,
        out,
        tokens: tokens as i32,
        width: width as i32,
        stride: stride as i32,
        whole: operands.whole.into(),
    };
    if !operands.fits {
        return Ok(false);
    }
    let grid = grid(width.div_ceil(operands.piece()), tokens, batch);
    module.run(dtype, grid, [THREADS, 1], &parameters)?;
    Ok(true)
}

/// The gradient of `x` (batch, tokens, 2·width) from that of `swiglu::swiglu` of it, (batch, tokens, width).
pub(in super::super) fn swiglu_backward(x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    with(&[Some(x), Some(grad)], |module| of_swiglu(module, x, grad))
}

fn of_swiglu(module: &Module, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    let (dtype, (batch, tokens, width)) = (grad.dtype(), grad.dims3()?);
    let mut operands = Operands::new(dtype);
    operands.width(width);
    operands.fits(batch <= MAX_BLOCKS);
    let out = module.blank(dtype, 2 * batch * tokens * width)?;
    let parameters = SwigluBackward {
        x: operands.rows(x, &[batch, tokens, 2 * width])?,
        grad: operands.rows(grad, &[batch, tokens, width])?,
        out: out.address()?,
        tokens: tokens as i32,
        width: width as i32,
        whole: operands.whole.into(),
    };
    if !operands.fits {
        return Ok(None);
    }
    let grid = grid(width.div_ceil(operands.piece()), tokens, batch);
    module.run(dtype, grid, [THREADS, 1], &parameters)?;
    Ok(Some(out.tensor((batch, tokens, 2 * width))))
}

/// From the gradient of `norm::norm_modulate` (batch, tokens, width): that of `x`, and what summed over the tokens is
/// that of `scale` (batch, width); both (batch, tokens, width).
pub(in super::super) fn norm_backward(
    x: &Tensor,
    scale: &Tensor,
    grad: &Tensor,
) -> Result<Option<[Tensor; 2]>> {
    with(&[Some(x), Some(scale), Some(grad)], |module| {
        of_norm(module, x, scale, grad)
    })
}

fn of_norm(
    module: &Module,
    x: &Tensor,
    scale: &Tensor,
    grad: &Tensor,
) -> Result<Option<[Tensor; 2]>> {
    let (dtype, (batch, tokens, width)) = (x.dtype(), x.dims3()?);
    let mut operands = Operands::new(dtype);
    operands.width(width);
    let threads = width
        .div_ceil(operands.piece() * HELD)
        .next_multiple_of(WARP);
    operands.fits(threads <= MAX_THREADS && batch <= MAX_BLOCKS);
    let blank = || module.blank(dtype, batch * tokens * width);
    let (out, along) = (blank()?, blank()?);
    let parameters = NormBackward {
        x: operands.rows(x, &[batch, tokens, width])?,
        scale: operands.rows(scale, &[batch, width])?,
        grad: operands.rows(grad, &[batch, tokens, width])?,
        out: out.address()?,
        along: along.address()?,
        width: width as i32,
        whole: operands.whole.into(),
        eps: NORM_EPS as f32,
    };
    if !operands.fits {
        return Ok(None);
    }
    module.run(dtype, [tokens, 1, batch], [threads, 1], &parameters)?;
    Ok(Some([out, along].map(|t| t.tensor((batch, tokens, width)))))
}

/// The gradient of a projection (batch, tokens, width) from those of the queries, keys and values that are made of its
/// first columns, stacked, (3, batch, heads, all tokens, head size): this stream's are those from `first` on. The other
/// columns, if there are any, go into GELU: `mlp` is its bias and the gradient of what comes out.
pub(in super::super) fn projection_backward(
    stream: &Projected,
    of_heads: &Tensor,
    first: usize,
    rope: &Rope,
    mlp: Option<(Option<&Tensor>, &Tensor)>,
) -> Result<Option<Tensor>> {
    let Projected { qkv, bias, norms } = stream;
    let (mlp_bias, mlp_grad) = mlp.unzip();
    let (query, key) = (Some(&norms.query), Some(&norms.key));
    let all = [
        Some(*qkv),
        *bias,
        query,
        key,
        Some(of_heads),
        mlp_bias.flatten(),
        mlp_grad,
    ];
    if !rope.cos().device().same_device(qkv.device()) {
        return Ok(None);
    }
    with(&all, |module| {
        of_projection(module, stream, of_heads, first, rope, mlp)
    })
}

fn of_projection(
    module: &Module,
    Projected { qkv, bias, norms }: &Projected,
    of_heads: &Tensor,
    first: usize,
    rope: &Rope,
    mlp: Option<(Option<&Tensor>, &Tensor)>,
) -> Result<Option<Tensor>> {
    let (mlp_bias, mlp_grad) = mlp.unzip();
    if !of_heads.is_contiguous() {
        return Ok(None);
    }
    let (dtype, (batch, tokens, width)) = (qkv.dtype(), qkv.dims3()?);
    let (_, _, number, total, size) = of_heads.dims5()?;
    let hidden = number * size;
    let out = module.blank(dtype, batch * tokens * width)?;
    let mut operands = Operands::new(dtype);
    operands.width(size);
    operands.place(out.address()?, width);
    let table = [operands.table(rope.cos())?, operands.table(rope.sin())?];
    let grads = of_heads.reshape((3 * batch * number, total, size))?;
    let grad = operands.rows(&grads, &[3 * batch * number, total, size])?;
    let lanes = size.div_ceil(operands.piece()).next_power_of_two();
    operands.fits(size.is_multiple_of(2) && lanes <= WARP && batch <= MAX_BLOCKS);
    operands.fits(rope.head_dim() == size && first + tokens <= total);
    operands.fits(width == 3 * hidden || (width > 3 * hidden && mlp.is_some()));
    let bias_width = bias.map_or(Ok(width), |bias| bias.dim(0))?;
    operands.fits(bias_width >= 3 * hidden);
    let parameters = HeadsBackward {
        qkv: operands.rows(qkv, &[batch, tokens, width])?,
        bias: operands.some_rows(*bias, &[bias_width])?,
        query: operands.rows(&norms.query, &[size])?,
        key: operands.rows(&norms.key, &[size])?,
        cos: table[0],
        sin: table[1],
        grad: grad.data,
        out: out.address()?,
        number: number as i32,
        size: size as i32,
        first: first as i32,
        total: total as i32,
        stride: width as i32,
        whole: operands.whole.into(),
        eps: HEADS_EPS as f32,
    };
    if !operands.fits {
        return Ok(None);
    }
    module.run(
        dtype,
        [tokens, 1, batch],
        [lanes, THREADS / lanes],
        &parameters,
    )?;
    if let Some(grad) = mlp_grad.filter(|_| width > 3 * hidden) {
        let x = qkv.narrow(2, 3 * hidden, width - 3 * hidden)?;
        let to = out.address()? + (3 * hidden * dtype.size_in_bytes()) as u64;
        if !gelu(module, &x, mlp_bias.flatten(), grad, (to, width))? {
            return Ok(None);
        }
    }
    Ok(Some(out.tensor((batch, tokens, width))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::gpu;

    /// Needs NVRTC, but neither GPU nor driver.
    #[test]
    fn all_backward_passes_compile() {
        let ptx = BACKWARD.compiled().unwrap();
        for kernel in ALL {
            for dtype in ["f32", "f16", "bf16"] {
                let entry = format!(".entry {kernel}_{dtype}(");
                assert!(ptx.contains(&entry), "no {entry}");
            }
        }
    }

    #[test]
    fn backward_passes_agree_with_candles_gradients() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let device = gpu.as_cuda_device()?;
        assert_eq!(loaded(device).as_ref().as_ref().err(), None);
        assert_eq!(trouble(device), None);
        Ok(())
    }
}
