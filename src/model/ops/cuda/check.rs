//! Compares the kernels with their reference implementations: on every device before they are used, and in the tests.

use candle::{DType, Device, Result, Tensor};

use super::super::plain;
use super::super::types::{Branch, Norms, Projected};
use super::SCORES;
use super::calls;
use super::flash::{self, Flash};
use super::launch::Module;
use super::parameters::{self, GatedResidual, Gelu, NormModulate, Parameters, Softmax, Swiglu};
use crate::model::rope::Rope;

/// Number formats, and how far a result may be from the exact one: it is rounded once.
const FORMATS: [(DType, f64); 3] = [(DType::F32, 1e-6), (DType::F16, 4e-4), (DType::BF16, 3e-3)];

/// A kernel on views, odd widths, several samples; its results.
type Case = fn(&Side) -> Result<Vec<Tensor>>;

const CASES: [(&str, Case); 7] = [
    (NormModulate::KERNEL, norms),
    (GatedResidual::KERNEL, residuals),
    (parameters::Heads::KERNEL, all_heads),
    (Gelu::KERNEL, gelus),
    (Swiglu::KERNEL, swiglus),
    (SCORES, all_scores),
    (Softmax::KERNEL, softmaxes),
];

/// The kernels that disagree with their reference implementations, and in what.
pub(super) fn disagreements(module: &Module) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    for (kernel, case) in CASES {
        let wrong = FORMATS.iter().find_map(|(dtype, tolerance)| {
            let why = agree(module, case, *dtype, *tolerance).err()?;
            Some(format!("{dtype:?}: {}", first_line(&why)))
        });
        found.extend(wrong.map(|why| (kernel, why)));
    }
    found
}

/// What an error says, without the backtrace that candle appends.
pub(super) fn first_line(error: &candle::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

/// Whether flash attention agrees with its reference, in tokens that fill no tile. Its weights are rounded to bf16 too.
pub(super) fn flash(flash: Flash, device: &Device) -> Result<()> {
    for (batch, heads, tokens) in [(1, 2, 333), (2, 3, 77)] {
        let shape = [3, batch, heads, tokens, flash::HEAD];
        let numbers: Vec<f32> = (0..shape.iter().product::<usize>())
            .map(|i| 4.0 * ((i * i % 65_521) as f32 / 65_521.0 - 0.5))
            .collect();
        let all = Tensor::from_vec(numbers, &shape, &Device::Cpu)?.to_dtype(DType::BF16)?;
        let scale = 1.0 / (flash::HEAD as f64).sqrt();
        let on_device = all.to_device(device)?;
        let (q, k, v) = (on_device.get(0)?, on_device.get(1)?, on_device.get(2)?);
        let got = flash.attention(&q, &k, &v, scale as f32)?;
        let exact = all.to_dtype(DType::F32)?;
        let scores = (exact.get(0)?.matmul(&exact.get(1)?.t()?)? * scale)?;
        let want = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&exact.get(2)?)?;
        let want = want.transpose(1, 2)?.flatten_from(2)?;
        compare(0, &got, &want, 1e-2)?;
    }
    Ok(())
}

/// Who computes a case: the kernels, or the reference implementations in f32 on the CPU from the same numbers.
struct Side<'a> {
    kernels: Option<&'a Module>,
    dtype: DType,
}

impl Side<'_> {
    /// Numbers between -2 and 2, no two alike.
    fn numbers(&self, seed: usize, shape: &[usize]) -> Result<Tensor> {
        self.numbers_to(2.0, seed, shape)
    }

    fn numbers_to(&self, most: f64, seed: usize, shape: &[usize]) -> Result<Tensor> {
        let at = |i: usize| ((i + 1) as f64 * 0.618_034 + seed as f64 * 0.414_214).fract();
        let numbers: Vec<f32> = (0..shape.iter().product())
            .map(|i| (most * (2.0 * at(i) - 1.0)) as f32)
            .collect();
        let numbers = Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(self.dtype)?;
        match self.kernels {
            Some(module) => numbers.to_device(&module.device()),
            None => numbers.to_dtype(DType::F32),
        }
    }

    fn device(&self) -> Device {
        self.kernels.map_or(Device::Cpu, Module::device)
    }

    fn compute<T>(
        &self,
        kernel: impl FnOnce(&Module) -> Result<Option<T>>,
        reference: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(module) = self.kernels else {
            return reference();
        };
        match kernel(module)? {
            Some(result) => Ok(result),
            None => candle::bail!("the kernel takes no such operands"),
        }
    }
}

fn agree(module: &Module, case: Case, dtype: DType, tolerance: f64) -> Result<()> {
    let kernels = Some(module);
    let got = case(&Side { kernels, dtype })?;
    let want = case(&Side {
        kernels: None,
        dtype,
    })?;
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        if got.dtype() != dtype {
            candle::bail!("result {i} is {:?}", got.dtype());
        }
        compare(i, got, want, tolerance)?;
    }
    Ok(())
}

/// Fails if result `i` is further than `tolerance` from what is wanted, relative, over all its numbers.
pub(super) fn compare(i: usize, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    if got.dims() != want.dims() {
        candle::bail!(
            "result {i} is {:?} instead of {:?}",
            got.shape(),
            want.shape()
        );
    }
    let numbers = |x: &Tensor| -> Result<Vec<f64>> {
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        x.flatten_all()?.to_vec1()
    };
    let (got, want) = (numbers(got)?, numbers(want)?);
    let error: f64 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
    let error = (error / want.iter().map(|x| x * x).sum::<f64>()).sqrt();
    if error.is_nan() || error > tolerance {
        candle::bail!("result {i} is off by {error:.1e}");
    }
    Ok(())
}

fn norms(side: &Side) -> Result<Vec<Tensor>> {
    let sizes = [
        (1, 1, 8, 2.0),
        (2, 3, 256, 0.002), // so small that epsilon counts
        (3, 2, 37, 2.0),
        (1, 2, 3072, 2.0),
        (2, 3, 1031, 2.0),
    ];
    let each = sizes
        .into_iter()
        .enumerate()
        .map(|(seed, (batch, tokens, width, most))| {
            let joint = side.numbers_to(most, seed, &[batch, tokens + 4, width])?;
            let x = joint.narrow(1, 3, tokens)?;
            let modulation = side.numbers(seed + 1, &[batch, 3 * width])?;
            let (shift, scale) = (
                modulation.narrow(1, width, width)?,
                modulation.narrow(1, 0, width)?,
            );
            side.compute(
                |module| calls::norm_modulate(module, &x, &shift, &scale),
                || plain::norm_modulate(&x, &shift, &scale),
            )
        });
    each.collect()
}

fn residuals(side: &Side) -> Result<Vec<Tensor>> {
    let mut results = Vec::new();
    for (batch, txt, img, width) in [(1, 1, 9, 8), (2, 3, 6, 1280), (3, 2, 5, 37)] {
        let joint = side.numbers(0, &[batch, txt + img, width])?;
        let y = side.numbers(1, &[batch, txt + img, width])?;
        let gate = side
            .numbers(2, &[batch, 2 * width])?
            .narrow(1, width, width)?;
        let (shared, bias) = (side.numbers(3, &[1, width])?, side.numbers(4, &[width])?);
        let [txt_x, txt_y] = [joint.narrow(1, 0, txt)?, y.narrow(1, 0, txt)?];
        let [img_x, img_y] = [joint.narrow(1, txt, img)?, y.narrow(1, txt, img)?];
        let branch = |x, y, bias, gate| Branch { x, y, bias, gate };
        let (bias, gate, shared) = (Some(&bias), Some(&gate), Some(&shared));
        for branches in [
            vec![
                branch(&txt_x, &txt_y, bias, gate),
                branch(&img_x, &img_y, None, None),
            ],
            vec![
                branch(&img_x, &img_y, None, gate),
                branch(&txt_x, &txt_y, bias, None),
            ],
            vec![branch(&joint, &y, bias, shared)],
        ] {
            results.push(side.compute(
                |module| calls::gated_residual(module, &branches),
                || plain::gated_residual(&branches),
            )?);
        }
    }
    Ok(results)
}

fn all_heads(side: &Side) -> Result<Vec<Tensor>> {
    let mut results = Vec::new();
    for (batch, txt, img, num_heads, axes, more) in [
        (2, 2, 3, 2, [16, 56, 56], 64),
        (1, 3, 4, 3, [16, 56, 56], 7),
        (2, 1, 5, 5, [8, 12, 12], 0),
        (2, 2, 2, 3, [2, 4, 6], 3),
    ] {
        let (size, tokens) = (axes.iter().sum::<usize>(), txt + img);
        let width = 3 * num_heads * size;
        let ids: Vec<f32> = (0..3 * tokens).map(|i| (i * i % 23) as f32).collect();
        let ids = Tensor::from_vec(ids, (tokens, 3), &Device::Cpu)?;
        let rope = Rope::new(&ids, &axes, 10_000.0, &side.device())?;
        let norms = |seed| -> Result<_> {
            let (query, key) = (
                side.numbers(seed, &[size])?,
                side.numbers(seed + 1, &[size])?,
            );
            Ok(Norms { query, key })
        };
        let (a, b) = (norms(0)?, norms(2)?);
        let bias = side.numbers(4, &[width + more])?;
        let txt = side.numbers(5, &[batch, txt, width])?;
        // so small that epsilon counts
        let img = side.numbers_to(0.002, 6, &[batch, img, width])?;
        let all = side.numbers(7, &[batch, tokens, width + more])?;
        let stream = |qkv, bias, norms| Projected { qkv, bias, norms };
        for streams in [
            vec![stream(&txt, Some(&bias), &a), stream(&img, None, &b)],
            vec![stream(&all, Some(&bias), &b)],
        ] {
            let heads = side.compute(
                |module| calls::heads(module, &streams, num_heads, &rope),
                || plain::heads(&streams, num_heads, &rope),
            )?;
            results.extend([heads.q, heads.k, heads.v]);
        }
    }
    Ok(results)
}

fn all_scores(side: &Side) -> Result<Vec<Tensor>> {
    let sizes = [(1, 1, 1, 9, 8), (2, 3, 5, 7, 24), (1, 2, 33, 40, 128)];
    let each = sizes.into_iter().map(|(batch, heads, rows, tokens, size)| {
        let q = side.numbers(0, &[batch, heads, rows, size])?;
        // keys as they lie between queries and values
        let k = side.numbers(1, &[3, batch, heads, tokens, size])?.get(1)?;
        let scores = side.compute(
            |module| calls::scores(module, &q, &k, 0.3),
            || (q.to_dtype(DType::F32)? * 0.3)?.matmul(&k.t()?),
        )?;
        // f32 whatever the operands are
        scores.to_dtype(side.dtype)
    });
    each.collect()
}

fn softmaxes(side: &Side) -> Result<Vec<Tensor>> {
    let sizes = [
        (1, 1, 1, 8, 2.0),
        (2, 3, 5, 37, 40.0), // most of it tiny
        (1, 2, 3, 1031, 8.0),
        (1, 1, 2, 4608, 8.0),
    ];
    let each = sizes.into_iter().map(|(batch, heads, rows, tokens, most)| {
        let scores = side.numbers_to(most, 0, &[batch, heads, rows, tokens])?;
        let scores = scores.to_dtype(DType::F32)?;
        side.compute(
            |module| calls::softmax(module, &scores, side.dtype),
            || candle_nn::ops::softmax_last_dim(&scores),
        )
    });
    each.collect()
}

fn gelus(side: &Side) -> Result<Vec<Tensor>> {
    let mut results = Vec::new();
    for (batch, tokens, width, front, skipped) in
        [(1, 1, 5, 3, 0), (2, 9, 1280, 128, 384), (3, 3, 70, 1, 9)]
    {
        let wider = side.numbers(0, &[batch, tokens, skipped + width])?;
        let x = (wider.narrow(2, skipped, width)? * 2.0)?;
        let columns = wider.narrow(2, skipped, width)?;
        let bias = side.numbers(1, &[width])?;
        let prefix = side.numbers(2, &[batch, tokens, front])?;
        for x in [&x, &columns] {
            for bias in [None, Some(&bias)] {
                for prefix in [None, Some(&prefix)] {
                    results.push(side.compute(
                        |module| calls::gelu(module, x, bias, prefix),
                        || plain::gelu(x, bias, prefix),
                    )?);
                }
            }
        }
    }
    Ok(results)
}

fn swiglus(side: &Side) -> Result<Vec<Tensor>> {
    let mut results = Vec::new();
    for (batch, tokens, width, front, skipped) in
        [(1, 1, 5, 3, 0), (2, 9, 1280, 128, 384), (3, 3, 70, 1, 9)]
    {
        let wider = side.numbers(0, &[batch, tokens, skipped + 2 * width])?;
        let x = wider.narrow(2, skipped, 2 * width)?;
        let prefix = side.numbers(1, &[batch, tokens, front])?;
        for prefix in [None, Some(&prefix)] {
            results.push(side.compute(
                |module| calls::swiglu(module, &x, prefix),
                || plain::swiglu(&x, prefix),
            )?);
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::super::ALL;
    use super::*;
    use crate::model::testing::gpu;

    /// Needs NVRTC, but neither GPU nor driver.
    #[test]
    fn all_kernels_compile() {
        let ptx = super::super::launch::KERNELS.compiled().unwrap();
        for kernel in ALL {
            for (dtype, _) in FORMATS {
                let entry = format!(".entry {kernel}_{}(", dtype.as_str());
                assert!(ptx.contains(&entry), "no {entry}");
            }
        }
    }

    #[test]
    fn kernels_agree_with_their_twins() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let module = Module::load(gpu.as_cuda_device()?, &ALL).unwrap();
        assert_eq!(disagreements(&module), []);
        assert_eq!(super::super::trouble(&gpu), None);
        Ok(())
    }
}
