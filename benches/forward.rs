//! One forward of the transformer next to candle-transformers' own FLUX, same weights and inputs, in turn, in f32 and bf16.
//!
//! `cargo bench --bench forward` (about a minute), or with `-- --runs 3` for fewer forwards, `-- --alone` without the other
//! model. Prints the median of each and the ratios; the outputs are compared first.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};
use candle_transformers::models::flux::{WithForward, model};
use fastflux::{
    checkpoint::{Checkpoint, init},
    layout::{FluxConfig, unpruned},
    model::{Flux, Inputs},
    sample::latents,
};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Text tokens.
const TEXT: usize = 256;
/// Latent rows and columns: 512 pixels.
const SIDE: usize = 64;

struct Arguments {
    /// Forwards of each model that count, after one that does not.
    runs: usize,
    /// Without candle-transformers.
    alone: bool,
}

impl Arguments {
    fn read() -> Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let runs = arguments.iter().position(|a| a == "--runs");
        let runs = runs.map(|at| {
            let count = arguments.get(at + 1).context("--runs needs a number")?;
            count.parse().context("--runs needs a number")
        });
        Ok(Self {
            runs: runs.unwrap_or(Ok(7))?,
            alone: arguments.iter().any(|a| a == "--alone"),
        })
    }
}

/// What a model is called with.
struct Data {
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timestep: Tensor,
    guidance: Tensor,
}

impl Data {
    fn random(device: &Device) -> Result<Self> {
        let normal = |shape: &[usize]| Tensor::randn(0f32, 1., shape, device);
        let img_ids = latents::img_ids(0, SIDE, SIDE, 3, device)?;
        Ok(Self {
            img: normal(&[1, img_ids.dim(0)?, 64])?,
            img_ids,
            txt: normal(&[1, TEXT, 512])?,
            txt_ids: latents::txt_ids(TEXT, 3, device)?,
            vec: normal(&[1, 256])?,
            timestep: Tensor::new(&[0.6f32], device)?,
            guidance: Tensor::new(&[3.5f32], device)?,
        })
    }

    /// The same with all but positions, timestep and guidance in `dtype`.
    fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            img: self.img.to_dtype(dtype)?,
            img_ids: self.img_ids.clone(),
            txt: self.txt.to_dtype(dtype)?,
            txt_ids: self.txt_ids.clone(),
            vec: self.vec.to_dtype(dtype)?,
            timestep: self.timestep.clone(),
            guidance: self.guidance.clone(),
        })
    }
}

/// A forward, to be timed.
type Forward<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;

fn ours<'a>(config: &FluxConfig, weights: &Checkpoint, data: &'a Data) -> Result<Forward<'a>> {
    let flux = Flux::new(config, weights.var_builder(data.img.dtype(), &Device::Cpu))?;
    Ok(Box::new(move || {
        let inputs = Inputs {
            img: &data.img,
            img_ids: &data.img_ids,
            txt: &data.txt,
            txt_ids: &data.txt_ids,
            timestep: &data.timestep,
            vec: &data.vec,
            guidance: Some(&data.guidance),
        };
        Ok(flux.forward(&inputs, &mut ())?)
    }))
}

fn theirs<'a>(weights: &Checkpoint, data: &'a Data) -> Result<Forward<'a>> {
    let dtype = data.img.dtype();
    let flux = model::Flux::new(
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
        weights.var_builder(dtype, &Device::Cpu),
    )?;
    Ok(Box::new(move || {
        // positions are computed in the dtype of the weights there
        let ids = |ids: &Tensor| ids.unsqueeze(0)?.to_dtype(dtype);
        let step = |x: &Tensor| x.to_dtype(dtype);
        Ok(flux.forward(
            &data.img,
            &ids(&data.img_ids)?,
            &data.txt,
            &ids(&data.txt_ids)?,
            &step(&data.timestep)?,
            &data.vec,
            Some(&step(&data.guidance)?),
        )?)
    }))
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>();
    Ok((norm(&(&a - &b)?)? / norm(&b)?).sqrt())
}

fn main() -> Result<()> {
    let arguments = Arguments::read()?;
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
        family: fastflux::layout::Family::FLUX1,
        layout: unpruned(2, 4),
    };
    let weights = init::random(&config, 0, safetensors::Dtype::F32)?;
    let single = Data::random(&Device::Cpu)?;
    let half = single.to_dtype(DType::BF16)?;
    let mut models = vec![
        ("fastflux f32", ours(&config, &weights, &single)?),
        ("fastflux bf16", ours(&config, &weights, &half)?),
    ];
    if !arguments.alone {
        models.push(("candle-transformers f32", theirs(&weights, &single)?));
        models.push(("candle-transformers bf16", theirs(&weights, &half)?));
    }
    // the forward that does not count
    let mut first: Option<Tensor> = None;
    let mut running = Vec::new();
    println!("forward of 2 + 4 blocks, width 1024, 1024 + {TEXT} tokens, CPU");
    for (name, forward) in models {
        let tolerance = if name.ends_with("bf16") { 5e-2 } else { 1e-4 };
        match (forward(), &first) {
            (Ok(velocity), None) => first = Some(velocity),
            (Ok(velocity), Some(first)) => {
                let error = difference(&velocity, first)?;
                println!("{name:<25} differs by {error:.1e}");
                // candle-transformers computes positions in bf16, for one
                let ours = name.starts_with("fastflux");
                ensure!(error < tolerance || !ours, "`{name}` differs by {error}");
            }
            (Err(error), _) => {
                println!("{name:<25} cannot: {}", first_line(&error));
                continue;
            }
        }
        running.push((name, forward, Vec::new()));
    }
    for _ in 0..arguments.runs {
        for (_, forward, times) in &mut running {
            let start = Instant::now();
            forward()?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let mut fastest = 0.0;
    for (name, _, times) in &mut running {
        times.sort_by(f64::total_cmp);
        let median = times.get(times.len() / 2).context("--runs 0")?;
        if fastest == 0.0 {
            fastest = *median;
        }
        println!(
            "{name:<25} {median:.3} s  {:.2} times fastflux f32",
            median / fastest
        );
    }
    Ok(())
}

fn first_line(error: &anyhow::Error) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}
