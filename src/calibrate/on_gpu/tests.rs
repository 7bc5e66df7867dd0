//! The same tokens on a GPU and, as the reference implementation, on the CPU in f64.

use candle::Device;

use super::*;
use crate::{
    calibrate::stats::CalibrationStats,
    layout::{BlockKind, BlockSpec},
};

const ID: BlockId = BlockId {
    kind: BlockKind::Double,
    index: 0,
};
const BATCH: usize = 2;
const TOKENS: usize = 50;
const WIDTH: usize = 24;

/// Sums of two forwards, of text tokens alone.
fn gathered(device: &Device, limit: Option<usize>) -> Result<StreamStats> {
    let mut stats =
        CalibrationStats::new(&[BlockSpec::Original(ID)], true).with_tokens_per_forward(limit);
    for forward in 0..2 {
        let numbers = |seed: f64| -> Result<Tensor> {
            let at = |i: usize| ((i + 1) as f64 * 0.618_034 + seed + f64::from(forward)).sin();
            let numbers: Vec<f32> = (0..BATCH * TOKENS * WIDTH).map(|i| at(i) as f32).collect();
            let numbers = Tensor::from_vec(numbers, (BATCH, TOKENS, WIDTH), &Device::Cpu)?;
            Ok(numbers.to_dtype(DType::BF16)?)
        };
        let x = numbers(0.0)?;
        let y = (&x + (numbers(0.3)? * 0.1)?)?;
        let timestep = Tensor::new(&[0.2f32, 0.95], device)?;
        stats.start_forward(u64::try_from(forward)?);
        let place = Place { id: ID, txt: true };
        let (x, y) = (x.to_device(device)?, y.to_device(device)?);
        stats.add_tokens(place, &x, &y, &timestep)?;
        stats.settle()?;
    }
    Ok(stats.blocks[0].txt.clone())
}

fn off(got: &Tensor, want: &Tensor) -> Result<f64> {
    let got = got.to_device(&Device::Cpu)?;
    let square = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((square(&(got - want)?)? / square(want)?).sqrt())
}

#[test]
fn sums_are_those_of_the_cpu() -> Result<()> {
    let Ok(gpu) = Device::new_cuda(0) else {
        crate::ui::skip("cuda");
        return Ok(());
    };
    for limit in [None, Some(30)] {
        let got = gathered(&gpu, limit)?;
        let want = gathered(&Device::Cpu, limit)?;
        assert!((got.rows - want.rows).abs() < 0.5);
        for (got, want) in got.buckets.iter().zip(&want.buckets) {
            assert!((got.tokens - want.tokens).abs() < 0.5);
            for (got, want) in [
                (got.input_sq, want.input_sq),
                (got.change_sq, want.change_sq),
                (got.cosine, want.cosine),
            ] {
                assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} {want}");
            }
        }
        let (Some(got), Some(want)) = (got.gram, want.gram) else {
            anyhow::bail!("no products")
        };
        assert!(off(&got.gram, &want.gram)? < 1e-6);
        assert!(off(&got.cross, &want.cross)? < 1e-5);
        assert!((got.target_sq - want.target_sq).abs() < 1e-6 * want.target_sq);
    }
    Ok(())
}
