//! The fused kernels on NVIDIA GPUs: whether they run. Each is compiled and compared with its reference implementation when a device is
//! first used; one that cannot be compiled or disagrees is not used, and [`trouble`] says so. No run fails for it.

mod attention_backward;
mod backward;
mod blas;
mod calls;
mod change;
mod check;
mod flash;
mod launch;
mod parameters;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle::cuda_backend::DeviceId;
use candle::{CudaDevice, DType, Device, Result, Tensor};

use super::types::{Branch, Heads, Projected};
use crate::model::rope::Rope;
pub(super) use attention_backward::{attention_backward, has_attention_backward};
pub(super) use backward::{
    gelu_backward, norm_backward, projection_backward, residual_backward, swiglu_backward,
    weighted_sum,
};
pub use blas::add_transposed_product;
pub(super) use blas::{multiply_onto, transposed_product};
pub use change::{add_products, token_sums};
use flash::Flash;
use launch::Module;
pub use launch::limit_kept_memory;
use parameters::{GatedResidual, Gelu, NormModulate, Parameters, Softmax, Swiglu};

/// The names of all kernels.
const ALL: [&str; 6] = [
    NormModulate::KERNEL,
    Softmax::KERNEL,
    GatedResidual::KERNEL,
    parameters::Heads::KERNEL,
    Gelu::KERNEL,
    Swiglu::KERNEL,
];

/// The product of cuBLAS that attention's scores are, which is compared like a kernel.
const SCORES: &str = "scores";

/// What became of the kernels on one device.
struct Kernels {
    module: std::result::Result<Module, String>,
    /// Kernels that disagree with their reference implementations, and in what.
    refused: Vec<(&'static str, String)>,
    /// Flash attention of others that agrees with its reference.
    flash: Option<Flash>,
}

impl Kernels {
    fn new(device: &CudaDevice) -> Self {
        let module = Module::load(device, &ALL);
        let mut refused = module
            .as_ref()
            .map_or_else(|_| vec![], check::disagreements);
        let device = Device::Cuda(device.clone());
        let mut flash = None;
        for candidate in Flash::all(&device) {
            match check::flash(candidate, &device) {
                Ok(()) => {
                    flash = Some(candidate);
                    break;
                }
                Err(why) => refused.push((candidate.kernel(), check::first_line(&why))),
            }
        }
        Self {
            module,
            refused,
            flash,
        }
    }

    /// Those of a device, made when they are first asked for.
    fn for_device(device: &CudaDevice) -> Arc<Self> {
        static DEVICES: LazyLock<Mutex<HashMap<DeviceId, Arc<Kernels>>>> =
            LazyLock::new(Mutex::default);
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let kernels = devices.entry(device.id());
        kernels
            .or_insert_with(|| Arc::new(Self::new(device)))
            .clone()
    }

    fn module(&self, kernel: &str) -> Option<&Module> {
        let refused = self.refused.iter().any(|(name, _)| *name == kernel);
        self.module.as_ref().ok().filter(|_| !refused)
    }
}

/// Why kernels of this device are not used; `None` if all are, and on devices that have none.
pub fn trouble(device: &Device) -> Option<String> {
    let Device::Cuda(device) = device else {
        return None;
    };
    let kernels = Kernels::for_device(device);
    if let Err(why) = &kernels.module {
        return Some(why.clone());
    }
    let each = kernels.refused.iter();
    let each = each.map(|(name, why)| format!("`{name}`: {why}"));
    let each: Vec<_> = each
        .chain(attention_backward::trouble(device))
        .chain(backward::trouble(device))
        .chain(change::trouble(device))
        .collect();
    (!each.is_empty()).then(|| each.join("; "))
}

/// Where kernels may run on these operands: all on one GPU, in one number format, none in a gradient graph.
fn device_of<'a>(operands: &[Option<&'a Tensor>]) -> Option<&'a CudaDevice> {
    let mut operands = operands.iter().copied().flatten();
    let first = operands.next()?;
    let (Device::Cuda(device), DType::F32 | DType::F16 | DType::BF16) =
        (first.device(), first.dtype())
    else {
        return None;
    };
    let alike = |x: &Tensor| x.dtype() == first.dtype() && x.device().same_device(first.device());
    (!first.track_op() && operands.all(|x| !x.track_op() && alike(x))).then_some(device)
}

/// What `call` makes of a kernel, if it may run. Nothing if the reference implementation has to do it.
fn with<T>(
    kernel: &str,
    operands: &[Option<&Tensor>],
    call: impl FnOnce(&Module) -> Result<Option<T>>,
) -> Result<Option<T>> {
    let Some(device) = device_of(operands) else {
        return Ok(None);
    };
    match Kernels::for_device(device).module(kernel) {
        Some(module) => call(module),
        None => Ok(None),
    }
}

/// See `norm::norm_modulate`.
pub(super) fn norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Option<Tensor>> {
    let operands = [Some(x), Some(shift), Some(scale)];
    with(NormModulate::KERNEL, &operands, |module| {
        calls::norm_modulate(module, x, shift, scale)
    })
}

/// See `residual::gated_residual`.
pub(super) fn gated_residual(branches: &[Branch]) -> Result<Option<Tensor>> {
    let operands = branches
        .iter()
        .flat_map(|b| [Some(b.x), Some(b.y), b.bias, b.gate]);
    let operands: Vec<_> = operands.collect();
    with(GatedResidual::KERNEL, &operands, |module| {
        calls::gated_residual(module, branches)
    })
}

/// See `heads::heads`.
pub(super) fn heads(streams: &[Projected], num_heads: usize, rope: &Rope) -> Result<Option<Heads>> {
    let operands = streams.iter().flat_map(|s| {
        let norms = [&s.norms.query, &s.norms.key].map(Some);
        [Some(s.qkv), s.bias].into_iter().chain(norms)
    });
    let operands: Vec<_> = operands.collect();
    if !streams
        .iter()
        .all(|s| rope.cos().device().same_device(s.qkv.device()))
    {
        return Ok(None);
    }
    with(parameters::Heads::KERNEL, &operands, |module| {
        calls::heads(module, streams, num_heads, rope)
    })
}

/// `scale · q·kᵀ` in f32: `q` (batch, heads, rows, size), `k` (batch, heads, tokens, size).
pub(super) fn scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    with(SCORES, &[Some(q), Some(k)], |module| {
        calls::scores(module, q, k, scale)
    })
}

/// Attention by other people's kernels, if one is built in and fits; see `attention::attention`.
pub(super) fn flash(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    if !has_flash(q.device(), q.dtype(), q.dim(3)?) || [q, k, v].iter().any(|x| x.track_op()) {
        return Ok(None);
    }
    let flash = Kernels::for_device(q.device().as_cuda_device()?).flash;
    let attended = flash.map(|flash| flash.attention(q, k, v, scale as f32));
    attended.transpose()
}

/// Whether [`flash`] computes attention with heads of this size in this format.
pub(super) fn has_flash(device: &Device, dtype: DType, head: usize) -> bool {
    match device {
        Device::Cuda(device) => {
            flash::fits(dtype, head) && Kernels::for_device(device).flash.is_some()
        }
        _ => false,
    }
}

/// The softmax of each row of `scores` (batch, heads, rows, tokens), f32, in `dtype`.
pub(super) fn softmax(scores: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if scores.dtype() != DType::F32 || !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(None);
    }
    with(Softmax::KERNEL, &[Some(scores)], |module| {
        calls::softmax(module, scores, dtype)
    })
}

/// See `gelu::gelu`.
pub(super) fn gelu(
    x: &Tensor,
    bias: Option<&Tensor>,
    prefix: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    with(Gelu::KERNEL, &[Some(x), bias, prefix], |module| {
        calls::gelu(module, x, bias, prefix)
    })
}

/// See `swiglu::swiglu`.
pub(super) fn swiglu(x: &Tensor, prefix: Option<&Tensor>) -> Result<Option<Tensor>> {
    with(Swiglu::KERNEL, &[Some(x), prefix], |module| {
        calls::swiglu(module, x, prefix)
    })
}
