//! Fits every replacement of a plan, in network order.
//!
//! Sequentially (the default), each layer sees what the already pruned prefix puts out and aims at what the original
//! model has after the replaced blocks, so that later layers correct the errors of earlier ones; otherwise every layer
//! is fitted on the original's own activations.

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Tensor};
use indicatif::ProgressBar;

use super::{
    fit::{self, Solution},
    gated::GatedGram,
    layers::{Fitted, LayerMap, Layers},
};
use crate::{
    calibrate::{
        states::States,
        stats::{Gram, product_dtype, with_ones},
    },
    device::Runtime,
    layout::{Form, Replacement},
    model::{
        AffineLayer, Block, Conditioning, Flux, Linear, Modulation, ReplacementBlock, Stream, Trunk,
    },
};

/// How to fit.
#[derive(Clone, Copy, Debug)]
pub struct Fitting {
    /// Relative to the mean diagonal; `None`: chosen by the residual on states left out.
    pub ridge: Option<f64>,
    /// On the activations of the already pruned prefix.
    pub sequential: bool,
    /// States in one forward.
    pub batch: usize,
}

/// One batch in eight is left out of the fit to choose the ridge, and used after that.
const LEFT_OUT: usize = 8;
/// The gated solve has no cheap way to compare ridges.
const GATED_RIDGE: f64 = 1e-4;

/// The streams of one batch, both just before the block at hand.
struct Passing {
    original: Stream,
    pruned: Stream,
    conditioning: Conditioning,
    /// Time of each sample.
    times: Vec<f32>,
}

/// Fits `replace` on `states`.
///
/// # Errors
/// When a replacement's blocks are not neighbours, activations are NaN or infinite, or a forward fails.
pub fn fit_layers(
    flux: &Flux,
    states: &States,
    replace: &[Replacement],
    fitting: Fitting,
    runtime: &Runtime,
    progress: &ProgressBar,
) -> Result<LayerMap> {
    let runs = runs(&flux.trunk, replace)?;
    let mut batches = Vec::new();
    for range in states.batches(fitting.batch) {
        let times = states.times(range.clone());
        let batch = states.batch(range, &runtime.device, runtime.dtype)?;
        let (stream, conditioning) = flux.embed(&batch.inputs())?;
        batches.push(Passing {
            original: stream.clone(),
            pruned: stream,
            conditioning,
            times,
        });
    }
    let mut out = LayerMap::new();
    let mut at = 0;
    for (first, replacement) in runs {
        let id = *replacement
            .replaces
            .first()
            .context("a replacement of no block")?;
        let end = first + replacement.replaces.len();
        let block = flux
            .trunk
            .entries()
            .get(first)
            .map(|(_, block)| block)
            .context("no such block")?;
        let mut sums = Sums::new(replacement, block)?;
        for (index, batch) in batches.iter_mut().enumerate() {
            let before = flux.trunk.forward_range(
                at..first,
                &batch.original,
                &batch.conditioning,
                &mut (),
            )?;
            batch.pruned =
                flux.trunk
                    .forward_range(at..first, &batch.pruned, &batch.conditioning, &mut ())?;
            batch.original =
                flux.trunk
                    .forward_range(first..end, &before, &batch.conditioning, &mut ())?;
            let input = if fitting.sequential {
                &batch.pruned
            } else {
                &before
            };
            sums.add(
                input,
                &batch.original,
                &batch.conditioning,
                &batch.times,
                index % LEFT_OUT == LEFT_OUT - 1,
            )
            .with_context(|| format!("block {id}"))?;
            progress.inc(1);
        }
        let layers = sums
            .solve(fitting.ridge)
            .with_context(|| format!("block {id}"))?;
        let block = layers.block(&runtime.device, runtime.dtype)?;
        for batch in &mut batches {
            batch.pruned = block.forward(&batch.pruned, &batch.conditioning)?;
        }
        out.insert(id, layers);
        at = end;
    }
    Ok(out)
}

/// The replacements in network order with the trunk entry each starts at.
fn runs<'a>(trunk: &Trunk, replace: &'a [Replacement]) -> Result<Vec<(usize, &'a Replacement)>> {
    let index = |id| trunk.entries().iter().position(|(spec, _)| spec.id() == id);
    let mut runs = Vec::new();
    for replacement in replace {
        let Some(first) = replacement.replaces.first().and_then(|id| index(*id)) else {
            bail!("the plan names a block that the model does not have");
        };
        for (offset, id) in replacement.replaces.iter().enumerate() {
            ensure!(
                index(*id) == Some(first + offset),
                "the plan replaces {} and {id} by one layer, but they are not neighbours",
                replacement.replaces[0]
            );
        }
        runs.push((first, replacement));
    }
    runs.sort_by_key(|(first, _)| *first);
    Ok(runs)
}

/// The model with fitted layers in place of their blocks; it shares all other weights.
///
/// # Errors
/// When a layer does not fit on the device.
pub fn pruned(
    flux: &Flux,
    replace: &[Replacement],
    layers: &LayerMap,
    runtime: &Runtime,
) -> Result<Flux> {
    let mut out = flux.clone();
    for (first, replacement) in runs(&flux.trunk, replace)? {
        let fitted = replacement
            .replaces
            .first()
            .and_then(|id| layers.get(id))
            .context("a layer was not fitted")?;
        out.trunk = out
            .trunk
            .with_block(first, fitted.block(&runtime.device, runtime.dtype)?)?;
        for later in first + 1..first + replacement.replaces.len() {
            out.trunk = out
                .trunk
                .with_block(later, ReplacementBlock::Remove.into())?;
        }
    }
    Ok(out)
}

/// Sums of one replacement: for the text tokens, then for the image tokens.
struct Sums<'a> {
    replacement: &'a Replacement,
    streams: [StreamSums; 2],
}

#[derive(Default)]
struct StreamSums {
    fitted: Option<Gram>,
    left_out: Option<Gram>,
    gated: GatedGram,
    modulation: Option<Modulation<3>>,
    rows: f64,
    change_sq: f64,
}

impl<'a> Sums<'a> {
    fn new(replacement: &'a Replacement, block: &Block) -> Result<Self> {
        let mut streams = [StreamSums::default(), StreamSums::default()];
        if replacement.form == Form::Modulated {
            ensure!(
                replacement.replaces.len() == 1,
                "a modulated layer stands for one block, the plan gives it {}",
                replacement.replaces.len()
            );
            let Some(modulations) = block.modulations()? else {
                bail!("a replaced block has no modulation to keep")
            };
            for (stream, modulation) in streams.iter_mut().zip(modulations) {
                stream.modulation = Some(modulation);
            }
        }
        Ok(Self {
            replacement,
            streams,
        })
    }

    fn add(
        &mut self,
        input: &Stream,
        output: &Stream,
        conditioning: &Conditioning,
        times: &[f32],
        left_out: bool,
    ) -> Result<()> {
        let form = self.replacement.form;
        if form == Form::Remove {
            return Ok(());
        }
        let pairs = [(input.txt()?, output.txt()?), (input.img()?, output.img()?)];
        for (stream, (x, y)) in self.streams.iter_mut().zip(pairs) {
            let wide = product_dtype(x.device());
            let target = (y.to_dtype(wide)? - x.to_dtype(wide)?)?; // (b, n, d)
            let (_, tokens, width) = x.dims3()?;
            let change = target
                .sqr()?
                .sum_all()?
                .to_dtype(DType::F64)?
                .to_scalar::<f64>()?;
            ensure!(change.is_finite(), "activations are NaN or infinite");
            stream.change_sq += change;
            stream.rows += (x.elem_count() / width) as f64;
            if let Some(modulation) = &stream.modulation {
                stream.add_gated(modulation.clone(), &x, &target, conditioning, times)?;
                continue;
            }
            let mut features = x.to_dtype(wide)?;
            if form == Form::Conditioned {
                let vec = conditioning.activated().to_dtype(wide)?.unsqueeze(1)?;
                let vec = vec.broadcast_as((vec.dim(0)?, tokens, width))?;
                features = Tensor::cat(&[&features, &vec.contiguous()?], 2)?;
            }
            let k = features.dim(2)?;
            let sums = Gram::of(
                &with_ones(&features.reshape(((), k))?)?,
                &target.reshape(((), width))?,
            )?;
            sums.add_to(if left_out {
                &mut stream.left_out
            } else {
                &mut stream.fitted
            })?;
        }
        Ok(())
    }

    fn solve(self, ridge: Option<f64>) -> Result<Layers> {
        let [txt, img] = self.streams;
        Ok(match (self.replacement.form, self.replacement.joint) {
            (Form::Remove, _) => Layers::Remove,
            (Form::Modulated, true) => bail!("a modulated layer cannot be joint"),
            (form, true) => Layers::Joint(Box::new(txt.merge(img)?.solve(form, ridge)?)),
            (form, false) => Layers::Streams {
                txt: Box::new(txt.solve(form, ridge).context("text tokens")?),
                img: Box::new(img.solve(form, ridge).context("image tokens")?),
            },
        })
    }
}

impl StreamSums {
    fn add_gated(
        &mut self,
        modulation: Modulation<3>,
        x: &Tensor,
        target: &Tensor,
        conditioning: &Conditioning,
        times: &[f32],
    ) -> Result<()> {
        let wide = product_dtype(x.device());
        let linear = Linear::new(Tensor::zeros((1, x.dim(2)?), x.dtype(), x.device())?, None)?;
        let layer = AffineLayer {
            linear,
            vec: None,
            modulation: Some(modulation),
        };
        let (z, gate) = layer.input(x, conditioning)?;
        let gate = gate
            .context("a modulated layer has a gate")?
            .to_dtype(wide)?;
        for (sample, t) in times.iter().enumerate() {
            let features = with_ones(&z.get(sample)?.to_dtype(wide)?)?;
            self.gated.add(
                &features,
                &target.get(sample)?,
                &gate.get(sample)?,
                f64::from(*t),
            )?;
        }
        Ok(())
    }

    /// The sums of both streams as one problem.
    fn merge(self, other: Self) -> Result<Self> {
        let mut out = Self {
            rows: self.rows + other.rows,
            change_sq: self.change_sq + other.change_sq,
            ..Self::default()
        };
        for share in [self.fitted, other.fitted].into_iter().flatten() {
            share.add_to(&mut out.fitted)?;
        }
        for share in [self.left_out, other.left_out].into_iter().flatten() {
            share.add_to(&mut out.left_out)?;
        }
        Ok(out)
    }

    fn solve(self, form: Form, ridge: Option<f64>) -> Result<Fitted> {
        let solution = match (form, ridge, self.fitted, self.left_out) {
            (Form::Modulated, ..) => self.gated.solve(ridge.unwrap_or(GATED_RIDGE))?,
            (_, None, Some(fitted), Some(left_out)) => {
                fit::solve_with_best_ridge(&fitted, &left_out)?
            }
            (_, Some(ridge), Some(fitted), Some(left_out)) => {
                fit::solve(&fitted.plus(&left_out)?, ridge)?
            }
            (_, ridge, Some(sums), None) | (_, ridge, None, Some(sums)) => {
                fit::solve(&sums, ridge.unwrap_or(1e-4))?
            }
            (_, _, None, None) => bail!("no tokens were seen"),
        };
        let Solution {
            coefficients: b,
            residual_sq,
            ridge,
        } = solution;
        let width = b.ncols();
        Ok(Fitted {
            weight: fit::weight(&b, 0..width)?,
            bias: fit::bias(&b)?,
            vec: (form == Form::Conditioned)
                .then(|| fit::weight(&b, width..2 * width))
                .transpose()?,
            modulation: match self.modulation {
                None => None,
                Some(m) => {
                    let bias = m.lin.bias().context("the modulation has no bias")?;
                    Some((m.lin.weight().clone(), bias.clone()))
                }
            },
            error: residual_sq / self.change_sq.max(f64::MIN_POSITIVE),
            ridge,
        })
    }
}
