//! Decoding an image: the VAE's own convolution and group norm against candle's (`candle_transformers`), with random
//! weights of FLUX.1's sizes, in f32 on the CPU.
//!
//! `cargo bench --bench vae` decodes 512×512; `cargo bench --bench vae -- 1024` another size (10 TFLOP at 1024). Rounds
//! alternate; the shortest of each is printed, in seconds of wall clock and, on Linux, of CPU time, which other processes
//! disturb less.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::flux::autoencoder::{AutoEncoder, Config};
use fastflux::{files::Blob, sample::vae::Vae};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 2;

fn main() -> Result<()> {
    let argument = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let pixels: usize = argument
        .map_or(Ok(512), |a| a.parse())
        .context("a size in pixels")?;
    let weights = VarMap::new();
    let peer = AutoEncoder::new(
        &Config::dev(),
        VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu),
    )?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("ae.safetensors");
    weights.save(&path)?;
    let ours = Vae::load_file(
        "ae.safetensors",
        &Blob::map(&path)?,
        DType::F32,
        &Device::Cpu,
    )?;
    let side = pixels / 8;
    let latents = Tensor::randn(0f32, 1.0, (1, 16, side, side), &Device::Cpu)?;

    let mut best = [[f64::INFINITY; 2]; 2];
    let mut images = Vec::new();
    for _ in 0..ROUNDS {
        images.clear();
        for (i, best) in best.iter_mut().enumerate() {
            let (start, cpu) = (Instant::now(), cpu_seconds());
            images.push(match i {
                0 => ours.decode(&latents)?,
                _ => peer.decode(&latents)?,
            });
            let took = [start.elapsed().as_secs_f64(), cpu_seconds() - cpu];
            for (best, took) in best.iter_mut().zip(took) {
                *best = best.min(took);
            }
        }
    }
    let difference = (&images[0] - &images[1])?
        .abs()?
        .max_all()?
        .to_scalar::<f32>()?;
    let range = images[1].abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(
        difference <= 1e-3 * range,
        "images differ by {difference} of {range}"
    );
    println!(
        "{pixels}×{pixels}, {} threads",
        rayon::current_num_threads()
    );
    for (name, [wall, cpu]) in [("fastflux", best[0]), ("candle", best[1])] {
        println!("{name:<10} {wall:>8.2} s wall, {cpu:>8.2} s CPU");
    }
    let ratio = |i: usize| best[1][i] / best[0][i];
    println!(
        "candle / fastflux: {:.2} wall, {:.2} CPU; largest difference {difference:.1e} of {range:.2}",
        ratio(0),
        ratio(1)
    );
    Ok(())
}

/// CPU time of this process so far, in seconds; 0 if `/proc` does not say.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return 0.0;
    };
    // fields 14 and 15, counted behind the parenthesised name
    let rest = stat.rsplit(')').next().unwrap_or("");
    let ticks = rest.split_whitespace().skip(11).take(2);
    ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND
}
