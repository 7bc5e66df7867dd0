//! One forward of the transformer beside candle-transformers' own FLUX, same weights and inputs, in turn.
//!
//! `cargo bench` (about a minute). Prints the median of each and the ratio; the outputs are compared first.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::time::Instant;

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};
use candle_transformers::models::flux::{WithForward, model};
use fastflux::{
    checkpoint::init,
    layout::{FluxConfig, unpruned},
    model::{Flux, Inputs},
    sample::latents,
};

/// Forwards of each model that count, after one that does not.
const RUNS: usize = 7;
/// Text tokens.
const TEXT: usize = 256;
/// Latent rows and columns: 512 pixels.
const SIDE: usize = 64;

fn main() -> Result<()> {
    let config = FluxConfig {
        in_channels: 64,
        out_channels: 64,
        hidden_size: 1024,
        num_heads: 8,
        mlp_size: 4096,
        context_in_dim: 512,
        vec_in_dim: 256,
        guidance_embed: true,
        axes_dims: vec![16, 56, 56],
        theta: 10_000.0,
        layout: unpruned(2, 4),
    };
    let device = Device::Cpu;
    let weights = init::random(&config, 0, safetensors::Dtype::F32)?;
    let ours = Flux::new(&config, weights.var_builder(DType::F32, &device))?;
    let theirs = model::Flux::new(
        &model::Config {
            in_channels: 64,
            vec_in_dim: 256,
            context_in_dim: 512,
            hidden_size: 1024,
            mlp_ratio: 4.0,
            num_heads: 8,
            depth: 2,
            depth_single_blocks: 4,
            axes_dim: vec![16, 56, 56],
            theta: 10_000,
            qkv_bias: true,
            guidance_embed: true,
        },
        weights.var_builder(DType::F32, &device),
    )?;
    let normal = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &device);
    let img_ids = latents::img_ids(SIDE, SIDE, &device)?;
    let txt_ids = latents::txt_ids(TEXT, &device)?;
    let (img, txt, vec) = (
        normal(&[1, img_ids.dim(0)?, 64])?,
        normal(&[1, TEXT, 512])?,
        normal(&[1, 256])?,
    );
    let (timestep, guidance) = (
        Tensor::new(&[0.6f32], &device)?,
        Tensor::new(&[3.5f32], &device)?,
    );
    let inputs = Inputs {
        img: &img,
        img_ids: &img_ids,
        txt: &txt,
        txt_ids: &txt_ids,
        timestep: &timestep,
        vec: &vec,
        guidance: Some(&guidance),
    };
    let run_ours = || Ok(ours.forward(&inputs, &mut ())?);
    let run_theirs = || {
        let (img_ids, txt_ids) = (img_ids.unsqueeze(0)?, txt_ids.unsqueeze(0)?);
        Ok(theirs.forward(
            &img,
            &img_ids,
            &txt,
            &txt_ids,
            &timestep,
            &vec,
            Some(&guidance),
        )?)
    };
    let (a, b) = (run_ours()?, run_theirs()?);
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>();
    let error = (norm(&(&a - &b)?)? / norm(&b)?).sqrt();
    ensure!(error < 1e-4, "the two models differ by {error}");
    let time = |run: &dyn Fn() -> Result<Tensor>| -> Result<f64> {
        let start = Instant::now();
        run()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut fast, mut slow) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        fast.push(time(&run_ours)?);
        slow.push(time(&run_theirs)?);
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (fast, slow) = (median(&mut fast), median(&mut slow));
    println!(
        "forward of 2 + 4 blocks, width 1024, 1024 + 256 tokens, f32, CPU (relative difference {error:.1e})"
    );
    println!("fastflux             {fast:.3} s");
    println!("candle-transformers  {slow:.3} s");
    println!("ratio                {:.2}", slow / fast);
    Ok(())
}
