//! The kernels one by one: products, attention, blocks by kind, a training step, calibration sums, least squares, saving
//! a checkpoint.
//!
//! `cargo bench --bench kernels` (a minute), or `cargo bench --bench kernels -- attention` for those whose name holds
//! a word. Median and quartiles of each, in f32 if nothing else is said, on the CPU; `fastflux bench` times whole steps of a model.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use anyhow::Result;
use candle::{DType, Device, Tensor, Var};
use fastflux::{
    bench::timing::{Effort, Timing, measure},
    calibrate::stats::CalibrationStats,
    checkpoint::{Checkpoint, init, save},
    fit::{gram::with_ones, ridge, running::from_rows},
    layout::{BlockId, BlockKind, BlockSpec, FluxConfig, Form, Replacement},
    model::{
        Conditioning, Flux, Inputs, Linear, Lora, Rope, Stream,
        ops::{Norms, Projected, attend},
    },
    sample::latents,
};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EFFORT: Effort = Effort {
    warm_up: 1,
    min_runs: 5,
    max_runs: 200,
    seconds: 2.0,
};
/// Width of FLUX.1's smaller relatives: large enough to be bound by the kernels, small enough for any machine.
const WIDTH: usize = 1024;
/// Latent rows and columns, 512 pixels: 1,024 image tokens.
const SIDE: usize = 64;
/// Text tokens.
const TEXT: usize = 256;

fn main() -> Result<()> {
    // cargo adds `--bench`
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let wanted = |name: &str| {
        filter
            .as_ref()
            .is_none_or(|word| name.contains(word.as_str()))
    };
    println!("{:<52} {:>10}  quartiles, ms", "kernel", "median, ms");
    let report = |name: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        if wanted(name) {
            let timings = measure(&Device::Cpu, EFFORT, &mut [work])?;
            let Timing {
                median, low, high, ..
            } = timings[0];
            let [median, low, high] = [median, low, high].map(|seconds| 1e3 * seconds);
            println!("{name:<52} {median:>10.2}  {low:.2} to {high:.2}");
        }
        Ok(())
    };
    for dtype in [DType::F32, DType::BF16] {
        products(dtype, &report)?;
        for tokens in [256, 1280] {
            attention_of(tokens, dtype, &report)?;
        }
    }
    if ["block", "backward", "sums"]
        .iter()
        .any(|n| wanted(n) || filter.as_ref().is_some_and(|f| f.starts_with(n)))
    {
        blocks(&report)?;
    }
    least_squares(&report)?;
    saving(&report)
}

type Report<'a> = dyn Fn(&str, &mut dyn FnMut() -> Result<()>) -> Result<()> + 'a;

fn normal(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?)
}

/// The projections of a single block's 1,280 tokens.
fn products(dtype: DType, report: &Report) -> Result<()> {
    let rows = SIDE * SIDE / 4 + TEXT;
    for (input, output) in [(WIDTH, 7 * WIDTH), (5 * WIDTH, WIDTH)] {
        let linear = Linear::new(normal(&[output, input])?.to_dtype(dtype)?, None)?;
        let x = normal(&[rows, input])?.to_dtype(dtype)?;
        let name = format!("product of {rows} rows, {input} to {output}, {dtype:?}");
        report(&name, &mut || {
            linear.product(&x)?;
            Ok(())
        })?;
    }
    Ok(())
}

fn attention_of(tokens: usize, dtype: DType, report: &Report) -> Result<()> {
    let (heads, axes) = (WIDTH / 128, [16, 56, 56]);
    let ids = latents::txt_ids(tokens, 3, &Device::Cpu)?;
    let rope = Rope::new(&ids, &axes, 10_000.0, &Device::Cpu)?;
    let one = Tensor::ones(128, dtype, &Device::Cpu)?;
    let norms = Norms {
        query: one.clone(),
        key: one,
    };
    let stream = Projected {
        qkv: &normal(&[1, tokens, 3 * WIDTH])?.to_dtype(dtype)?,
        bias: None,
        norms: &norms,
    };
    let name = format!("attention, {tokens} tokens, {heads} heads of 128, {dtype:?}");
    report(&name, &mut || {
        attend(std::slice::from_ref(&stream), heads, &rope)?;
        Ok(())
    })
}

/// One block of every kind.
fn config() -> FluxConfig {
    let forms = [
        (Form::Linear, false),
        (Form::Linear, true),
        (Form::Conditioned, false),
        (Form::Modulated, false),
    ];
    let replaced = forms.into_iter().enumerate().map(|(i, (form, joint))| {
        BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(1 + i)],
            form,
            joint,
        })
    });
    let originals = [BlockId::double(0), BlockId::single(0)].map(BlockSpec::Original);
    FluxConfig {
        in_channels: 64,
        out_channels: 64,
        hidden_size: WIDTH,
        num_heads: WIDTH / 128,
        mlp_size: 4 * WIDTH,
        context_in_dim: 512,
        vec_in_dim: 256,
        guidance_embed: true,
        axes_dims: vec![16, 56, 56],
        theta: 10_000.0,
        family: fastflux::layout::Family::FLUX1,
        layout: originals.into_iter().chain(replaced).collect(),
    }
}

/// A model and what its first block is called with.
fn embedded(
    config: &FluxConfig,
    weights: &Checkpoint,
    dtype: DType,
) -> Result<(Flux, Stream, Conditioning)> {
    let device = Device::Cpu;
    let flux = Flux::new(config, weights.var_builder(dtype, &device))?;
    let img_ids = latents::img_ids(0, SIDE, SIDE, 3, &device)?;
    let txt_ids = latents::txt_ids(TEXT, 3, &device)?;
    let (img, txt, vec) = (
        normal(&[1, img_ids.dim(0)?, 64])?.to_dtype(dtype)?,
        normal(&[1, TEXT, 512])?.to_dtype(dtype)?,
        normal(&[1, 256])?.to_dtype(dtype)?,
    );
    let (timestep, guidance) = (
        Tensor::new(&[0.6f32], &device)?,
        Tensor::new(&[3.5f32], &device)?,
    );
    let (stream, conditioning) = flux.embed(&Inputs {
        img: &img,
        img_ids: &img_ids,
        txt: &txt,
        txt_ids: &txt_ids,
        timestep: &timestep,
        vec: &vec,
        guidance: Some(&guidance),
    })?;
    Ok((flux, stream, conditioning))
}

fn blocks(report: &Report) -> Result<()> {
    let config = config();
    let weights = init::random(&config, 0, safetensors::Dtype::F32)?;
    let (half, stream, conditioning) = embedded(&config, &weights, DType::BF16)?;
    for (spec, block) in half.trunk.entries() {
        if let BlockSpec::Original(id) = spec {
            let name = format!("block {id}, width {WIDTH}, 1024 + {TEXT} tokens, BF16");
            report(&name, &mut || {
                block.forward(&stream, &conditioning)?;
                Ok(())
            })?;
        }
    }
    drop(half);
    let (flux, stream, conditioning) = embedded(&config, &weights, DType::F32)?;
    for (spec, block) in flux.trunk.entries() {
        let name = match spec {
            BlockSpec::Original(id) if id.kind == BlockKind::Double => "double".to_owned(),
            BlockSpec::Original(_) => "single".to_owned(),
            BlockSpec::Replaced(r) if r.joint => format!("{}, joint", r.form),
            BlockSpec::Replaced(r) => r.form.to_string(),
        };
        report(
            &format!("block {name}, width {WIDTH}, 1024 + {TEXT} tokens"),
            &mut || {
                block.forward(&stream, &conditioning)?;
                Ok(())
            },
        )?;
    }
    for products in [false, true] {
        let what = if products {
            "sums and products"
        } else {
            "sums alone"
        };
        let mut stats = CalibrationStats::new(&config.layout[..1], products);
        report(
            &format!("double block with calibration {what}"),
            &mut || {
                flux.trunk
                    .forward_range(0..1, &stream, &conditioning, &mut stats)?;
                Ok(())
            },
        )?;
    }
    training_step(&flux, &stream, &conditioning, report)
}

/// Forward and backward of a single block with LoRA on its projections, as sandwich training takes them.
fn training_step(
    flux: &Flux,
    stream: &Stream,
    conditioning: &Conditioning,
    report: &Report,
) -> Result<()> {
    const RANK: usize = 16;
    let Some((_, block)) = flux.trunk.entries().get(1) else {
        return Ok(());
    };
    let mut block = block.clone();
    for (_, linear) in block.linears_mut() {
        let (output, input) = linear.shape()?;
        let a = Var::from_tensor(&(normal(&[RANK, input])? * 0.01)?)?;
        let b = Var::from_tensor(&(normal(&[output, RANK])? * 0.01)?)?;
        linear.set_lora(Some(Lora {
            a: a.as_tensor().clone(),
            b: b.as_tensor().clone(),
            scale: 1.0,
        }))?;
    }
    let name = format!("single block, forward and backward, LoRA {RANK}");
    report(&name, &mut || {
        let output = block.forward(stream, conditioning)?;
        output.tokens.sqr()?.mean_all()?.backward()?;
        Ok(())
    })
}

fn least_squares(report: &Report) -> Result<()> {
    for width in [256, WIDTH] {
        let features = with_ones(&normal(&[3 * width, width])?)?;
        let target = normal(&[3 * width, width])?;
        let mut sums = None;
        report(
            &format!("products of {} rows, width {width}", 3 * width),
            &mut || {
                sums = Some(from_rows(&features, &target)?);
                Ok(())
            },
        )?;
        let sums = match sums {
            Some(sums) => sums,
            None => from_rows(&features, &target)?,
        };
        report(&format!("least squares, width {width}"), &mut || {
            ridge::solve(&sums, 1e-4)?;
            Ok(())
        })?;
    }
    Ok(())
}

fn saving(report: &Report) -> Result<()> {
    let mut checkpoint = Checkpoint::default();
    for i in 0..8 {
        let source = fastflux::checkpoint::Source::dense(&normal(&[2048, 1024])?)?;
        checkpoint.insert(format!("tensor.{i}"), source);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    report("save of 67 MB in 8 tensors", &mut || {
        save::write(&checkpoint, &path)
    })
}
