//! The sums that one replacement's layers follow from, for each form.

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device, Tensor};

use super::activations::FitSplit;
use crate::{
    calibrate::subsample::pick,
    fit::{
        gated::{GatedGram, normal_product},
        gram::{self, product_dtype, with_bias},
        layers::{Fitted, Layers},
        ridge::{self, Solution},
        running::RunningGram,
    },
    layout::{Form, Replacement},
    model::{AffineLayer, Block, BlockModulation, Conditioning, Linear, Modulation, Stream},
};

/// Sums of one replacement: for the text tokens, then for the image tokens; all in the first for one layer for both.
pub(super) struct Sums<'a> {
    replacement: &'a Replacement,
    streams: [StreamSums; 2],
}

#[derive(Default)]
struct StreamSums {
    fitted: RunningGram,
    left_out: RunningGram,
    gated: GatedGram,
    modulation: Option<BlockModulation<3>>,
    /// Where the pairs are.
    device: Option<Device>,
    change_sq: f64,
}

impl<'a> Sums<'a> {
    pub(super) fn new(replacement: &'a Replacement, block: &Block) -> Result<Self> {
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

    /// Adds the pairs of a batch: what the layer will see and what is to stand behind it.
    pub(super) fn add(
        &mut self,
        input: &Stream,
        output: &Stream,
        conditioning: &Conditioning,
        rows: &FitSplit,
    ) -> Result<()> {
        let form = self.replacement.form;
        if form == Form::Remove {
            return Ok(());
        }
        let pairs = [(input.txt()?, output.txt()?), (input.img()?, output.img()?)];
        for (index, (x, y)) in pairs.into_iter().enumerate() {
            let stream = &mut self.streams[if self.replacement.joint { 0 } else { index }];
            let chosen = rows.tokens(&x)?;
            let take = |t: &Tensor| pick(t, None, chosen.as_ref());
            let (x, y) = (take(&x)?, take(&y)?);
            let wide = product_dtype(x.device());
            let target = (y.to_dtype(wide)? - x.to_dtype(wide)?)?; // (b, n, d)
            let change = gram::square(&target)?;
            ensure!(change.is_finite(), "activations are NaN or infinite");
            stream.change_sq += change;
            stream.device = Some(x.device().clone());
            if let Some(modulation) = &stream.modulation {
                let (z, gate) = gated_input(modulation, &x, conditioning)?;
                stream.gated.add(&z, &target, &gate)?;
                continue;
            }
            let x = x.to_dtype(wide)?;
            let vec = match form {
                Form::Conditioned => Some(conditioning.activated().to_dtype(wide)?),
                _ => None,
            };
            let c = with_bias(vec.as_ref(), &x)?;
            let sums = [&mut stream.fitted, &mut stream.left_out];
            for (part, sums) in rows.parts.iter().zip(sums) {
                if part.elem_count() > 0 {
                    let take = |t: &Tensor| pick(t, Some(part), None);
                    let target = take(&target)?;
                    sums.add(&take(&x)?, &take(&c)?, &target, gram::square(&target)?)?;
                }
            }
        }
        Ok(())
    }

    /// Whether [`Self::solve`] looks at all pairs again, through `inputs`.
    pub(super) fn revisits(&self) -> bool {
        self.replacement.form == Form::Modulated
    }

    /// The layers. `inputs` calls its argument with every batch that was added; only a gated solve does so, a few tens
    /// of times.
    pub(super) fn solve(self, ridge: Option<f64>, inputs: &mut Inputs) -> Result<Layers> {
        let [txt, img] = self.streams;
        Ok(match (self.replacement.form, self.replacement.joint) {
            (Form::Remove, _) => Layers::Remove,
            (Form::Modulated, true) => bail!("a modulated layer cannot be joint"),
            (form, true) => Layers::Joint(Box::new(txt.solve(form, ridge)?)),
            (Form::Modulated, false) => Layers::Streams {
                txt: Box::new(
                    txt.solve_gated(ridge, inputs, true)
                        .context("text tokens")?,
                ),
                img: Box::new(
                    img.solve_gated(ridge, inputs, false)
                        .context("image tokens")?,
                ),
            },
            (form, false) => Layers::Streams {
                txt: Box::new(txt.solve(form, ridge).context("text tokens")?),
                img: Box::new(img.solve(form, ridge).context("image tokens")?),
            },
        })
    }
}

/// Calls its argument with each batch: what the layer will see, what all blocks share, and which rows count.
pub(super) type Inputs<'a> =
    dyn FnMut(&mut dyn FnMut(&Stream, &Conditioning, &FitSplit) -> Result<()>) -> Result<()> + 'a;

/// What W of a modulated layer is applied to, (b, n, d), and its gate, (b, d).
fn gated_input(
    modulation: &BlockModulation<3>,
    x: &Tensor,
    conditioning: &Conditioning,
) -> Result<(Tensor, Tensor)> {
    let wide = product_dtype(x.device());
    let linear = Linear::new(Tensor::zeros((1, x.dim(2)?), x.dtype(), x.device())?, None)?;
    let layer = AffineLayer {
        linear,
        vec: None,
        modulation: Some(modulation.clone()),
    };
    let (z, gate) = layer.input(x, conditioning)?;
    let gate = gate.context("a modulated layer has a gate")?;
    Ok((z.to_dtype(wide)?, gate.to_dtype(wide)?))
}

impl StreamSums {
    fn solve(self, form: Form, ridge: Option<f64>) -> Result<Fitted> {
        let solution = ridge::solve_split(
            self.fitted.finish()?,
            self.left_out.finish()?,
            ridge,
            &ridge::RIDGES,
        )?;
        let width = solution.coefficients.ncols();
        let vec = (form == Form::Conditioned)
            .then(|| ridge::weight(&solution.coefficients, width..2 * width))
            .transpose()?;
        fitted(&solution, vec, None, self.change_sq)
    }

    fn solve_gated(self, ridge: Option<f64>, inputs: &mut Inputs, txt: bool) -> Result<Fitted> {
        let modulation = self.modulation.context("a modulated layer has one")?;
        let ridge = ridge.unwrap_or(ridge::DEFAULT_RIDGE);
        let device = self.device.context("no pairs to fit a layer on")?;
        let solution = self.gated.solve(ridge, &device, &mut |b| {
            // to the device and back once for all batches
            let b = b.to_device(&device)?.to_dtype(product_dtype(&device))?;
            let mut out = Tensor::zeros(b.dims(), DType::F64, &device)?;
            inputs(&mut |stream, conditioning, rows| {
                let x = if txt { stream.txt()? } else { stream.img()? };
                let x = pick(&x, None, rows.tokens(&x)?.as_ref())?;
                let (z, gate) = gated_input(&modulation, &x, conditioning)?;
                out = (&out + normal_product(&z, &gate, &b)?)?;
                Ok(())
            })?;
            Ok(out.to_device(&Device::Cpu)?)
        })?;
        let kept = match modulation {
            BlockModulation::Shared(_) => modulation,
            BlockModulation::Own(Modulation { lin }) => {
                let bias = lin.bias().map(host).transpose()?;
                let lin = Linear::new(host(&lin.weight()?)?, bias)?;
                BlockModulation::Own(Modulation { lin })
            }
        };
        fitted(&solution, None, Some(kept), self.change_sq)
    }
}

/// `t` on the CPU, without the rest of a larger tensor that it may be a part of on a GPU.
fn host(t: &Tensor) -> Result<Tensor> {
    if t.device().is_cpu() {
        return Ok(t.clone());
    }
    Ok(t.force_contiguous()?.to_device(&Device::Cpu)?)
}

fn fitted(
    solution: &Solution,
    vec: Option<Tensor>,
    modulation: Option<BlockModulation<3>>,
    change_sq: f64,
) -> Result<Fitted> {
    let b = &solution.coefficients;
    Ok(Fitted {
        weight: ridge::weight(b, 0..b.ncols())?,
        bias: ridge::bias(b)?,
        vec,
        modulation,
        error: solution.residual_sq / change_sq.max(f64::MIN_POSITIVE),
        ridge: solution.ridge,
    })
}
