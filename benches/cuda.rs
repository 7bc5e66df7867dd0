//! What lies between the matrix products of FLUX.1-dev at 1024×1024, one kernel after the other on the first GPU: time,
//! and the share of what a copy reaches in the same run. `fastflux bench` times whole steps of a model.
//!
//! `cargo bench --features cuda --bench cuda` (seconds); needs 4 GB on the GPU.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use anyhow::Result;
use candle::{DType, Device, Tensor};
use fastflux::{
    bench::timing::{Effort, measure, peak},
    model::{
        Rope,
        ops::{self, Branch, Norms, Projected},
    },
    sample::latents,
};

const EFFORT: Effort = Effort {
    warm_up: 2,
    min_runs: 5,
    max_runs: 100,
    seconds: 0.5,
};
/// Calls between two waits for the GPU, which take as long as a kernel does.
const CALLS: usize = 20;
const HIDDEN: usize = 3072;
const MLP: usize = 4 * HIDDEN;
const HEADS: usize = 24;
/// Text and image tokens.
const TOKENS: [usize; 2] = [512, 4096];

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    if let Some(why) = ops::trouble(&device) {
        println!("not all kernels are used: {why}");
    }
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        of(dtype, &device)?;
    }
    Ok(())
}

fn of(dtype: DType, device: &Device) -> Result<()> {
    let copy = peak(device, dtype)?.bytes;
    println!("{dtype:?}, a copy reaches {:.0} GB/s", copy / 1e9);
    // `numbers` are those that are read or written once
    let report = |name: &str, numbers: usize, work: &dyn Fn() -> candle::Result<Tensor>| {
        let mut calls = || {
            for _ in 0..CALLS {
                work()?;
            }
            Ok(())
        };
        let median = measure(device, EFFORT, &mut [&mut calls])?[0].median / CALLS as f64;
        let bytes = (numbers * dtype.size_in_bytes()) as f64 / median;
        let share = 100.0 * bytes / copy;
        let bandwidth = format!("{:>7.0} GB/s {share:>4.0} %", bytes / 1e9);
        let bandwidth = if numbers > 0 { &bandwidth } else { "" };
        println!("{name:<44} {:>8.1} µs {bandwidth}", 1e6 * median);
        anyhow::Ok(())
    };
    let normal = |shape: &[usize]| -> Result<_> {
        Ok(Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype)?)
    };

    let total = TOKENS[0] + TOKENS[1];
    let (x, y) = (normal(&[1, total, HIDDEN])?, normal(&[1, total, HIDDEN])?);
    let modulation = normal(&[1, 3 * HIDDEN])?;
    let [shift, scale, gate] = [0, 1, 2].map(|i| modulation.narrow(1, i * HIDDEN, HIDDEN));
    let (shift, scale, gate) = (shift?, scale?, gate?);
    report("layer norm, modulated", 2 * total * HIDDEN, &|| {
        ops::norm_modulate(&x, &shift, &scale)
    })?;

    let bias = normal(&[HIDDEN])?;
    let part = |x: &Tensor, i| x.narrow(1, [0, TOKENS[0]][i], TOKENS[i]);
    let parts = [[part(&x, 0)?, part(&y, 0)?], [part(&x, 1)?, part(&y, 1)?]];
    report("gate and residual, joined", 3 * total * HIDDEN, &|| {
        ops::gated_residual(&parts.each_ref().map(|[x, y]| Branch {
            x,
            y,
            bias: Some(&bias),
            gate: Some(&gate),
        }))
    })?;

    let projected = normal(&[1, total, 3 * HIDDEN + MLP])?;
    let bias = normal(&[3 * HIDDEN + MLP])?;
    let (mlp, mlp_bias) = (
        projected.narrow(2, 3 * HIDDEN, MLP)?,
        bias.narrow(0, 3 * HIDDEN, MLP)?,
    );
    report("GELU", 2 * total * MLP, &|| {
        ops::gelu(&mlp, Some(&mlp_bias), None)
    })?;
    report("GELU and attention", 2 * total * (HIDDEN + MLP), &|| {
        ops::gelu(&mlp, Some(&mlp_bias), Some(&x))
    })?;

    let [ids, img_ids] = [
        latents::txt_ids(TOKENS[0], 3, &Device::Cpu)?,
        latents::img_ids(0, 128, 128, 3, &Device::Cpu)?,
    ];
    let ids = Tensor::cat(&[ids, img_ids], 0)?;
    let rope = Rope::new(&ids, &[16, 56, 56], 10_000.0, device)?;
    let norms = Norms {
        query: normal(&[128])?,
        key: normal(&[128])?,
    };
    let projected = Projected {
        qkv: &projected,
        bias: Some(&bias),
        norms: &norms,
    };
    report("heads and attention", 0, &|| {
        ops::attend(std::slice::from_ref(&projected), HEADS, &rope)
    })
}
