//! Tests of `gemm`.

use candle::{DType, Device, Result, Tensor};

use super::super::cpu::{Operand, by_dtype};
use super::super::uninit::filled;
use super::*;
use crate::model::testing::{close, random};

const SHAPES: [(usize, usize, usize); 9] = [
    (1, 8, 3),
    (3, 7, 1),
    (16, 2, 8),
    (47, 33, 17),
    (49, 130, 250),
    (193, 1030, 263),
    (200, 64, 600),
    (5, 2050, 9),
    (390, 31, 40),
];

/// Every way there is on this machine.
fn ways() -> Vec<Option<Avx512>> {
    let mut ways = vec![None];
    ways.extend(Avx512::ways().into_iter().map(Some));
    ways
}

fn product<T: Vector>(
    simd: Option<Avx512>,
    x: &Tensor,
    weight: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let ((rows, inner), columns) = (x.dims2()?, weight.dim(0)?);
    let sum = sum.map(Operand::new);
    let (x, weight) = (Operand::new(x), Operand::new(weight));
    let (x, weight) = (x.slice::<T>()?, weight.slice::<T>()?);
    let then = match &sum {
        Some(sum) => {
            let sum = sum.slice::<T>()?;
            Then::Add(MatRef::from_row_major_slice(sum, rows, columns))
        }
        None => Then::Put,
    };
    let out = filled(rows, columns, |out| by(simd, x, weight, inner, out, then));
    Tensor::from_vec(out, (rows, columns), &Device::Cpu)
}

#[test]
fn every_way_is_the_exact_product_within_rounding() -> Result<()> {
    // half a unit in the last place of the result
    for (rows, inner, columns) in SHAPES {
        for (dtype, tolerance) in [(DType::F32, 5e-7), (DType::BF16, 4e-3), (DType::F16, 5e-4)] {
            let x = random("x", (rows, inner))?.to_dtype(dtype)?;
            let weight = random("w", (columns, inner))?.to_dtype(dtype)?;
            let sum = random("s", (rows, columns))?.to_dtype(dtype)?;
            let wide = |t: &Tensor| t.to_dtype(DType::F64);
            let exact = wide(&x)?.matmul(&wide(&weight)?.t()?)?;
            for simd in ways() {
                let got = by_dtype!(dtype, product(simd, &x, &weight, None))?;
                close(&got, &exact, tolerance)?;
                let got = by_dtype!(dtype, product(simd, &x, &weight, Some(&sum)))?;
                close(&got, &(&exact + wide(&sum)?)?, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn numbers_beyond_the_end_of_a_row_or_panel_do_not_matter() -> Result<()> {
    // every second row is not a number: its neighbours' products must be
    let (rows, inner, columns) = (37, 70, 21);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let x = random("x", (rows, inner))?.to_dtype(dtype)?;
        let mut weight = random("w", (columns, inner))?.to_vec2::<f32>()?;
        for row in weight.iter_mut().skip(1).step_by(2) {
            row.fill(f32::NAN);
        }
        let weight = Tensor::new(weight, &Device::Cpu)?.to_dtype(dtype)?;
        for simd in ways() {
            let got = by_dtype!(dtype, product(simd, &x, &weight, None))?;
            for row in got.to_dtype(DType::F32)?.to_vec2::<f32>()? {
                for (column, x) in row.iter().enumerate() {
                    assert_eq!(x.is_nan(), column % 2 == 1, "{dtype:?}, column {column}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let x = random("x", (300, 1100))?.to_dtype(dtype)?;
        let weight = random("w", (700, 1100))?.to_dtype(dtype)?;
        for simd in ways() {
            let run = |threads: usize| -> Result<Tensor> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let pool = pool.map_err(candle::Error::wrap)?;
                pool.install(|| by_dtype!(dtype, product(simd, &x, &weight, None)))
            };
            let one = run(1)?;
            for threads in [2, 5] {
                close(&run(threads)?, &one, 0.0)?;
            }
            let top = by_dtype!(dtype, product(simd, &x.narrow(0, 0, 50)?, &weight, None))?;
            close(&top, &one.narrow(0, 0, 50)?, 0.0)?;
        }
    }
    Ok(())
}
