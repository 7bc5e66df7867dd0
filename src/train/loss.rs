//! How far a stream is from what it should be, and the gradient of that; in f32 whatever the model's dtype.

use anyhow::{Result, ensure};
use candle::{DType, Tensor, Var};

use super::{
    data::Key,
    recipe::{LossRecipe, Normalise},
};
use crate::{
    model::{Conditioning, Flux, Stream, ops},
    sample::noise::Generator,
};

/// Share of the mean weight that every direction gets at least, if weights come from the velocity.
const FLOOR: f64 = 0.05;

/// A quadratic form over the error of each token.
#[derive(Clone, Debug)]
enum Form {
    /// Nothing counts.
    Zero,
    /// factor · Σ e².
    Same(f64),
    /// Σ w e², w (width,).
    Channels(Tensor),
    /// factor · Σ e² / mean square of the target's token.
    Token(f64),
    /// Σ eᵀ M e, M (width, width).
    Matrix(Tensor),
}

/// The loss of one sandwich.
#[derive(Clone, Debug)]
pub struct Loss {
    txt: Form,
    img: Form,
}

/// Sums over the targets of one stream.
struct Moments {
    tokens: f64,
    /// Means and mean squares of the channels, (width,).
    mean: Tensor,
    square: Tensor,
}

impl Moments {
    fn new(parts: &[Tensor]) -> Result<Self> {
        let rows: Vec<Tensor> = parts
            .iter()
            .map(|t| t.flatten_to(1)?.to_dtype(DType::F32))
            .collect::<candle::Result<_>>()?;
        let rows = Tensor::cat(&rows, 0)?;
        Ok(Self {
            tokens: rows.dim(0)? as f64,
            mean: rows.mean(0)?,
            square: rows.sqr()?.mean(0)?,
        })
    }

    /// Variances of the channels.
    fn variance(&self) -> Result<Tensor> {
        Ok((&self.square - self.mean.sqr()?)?.maximum(0f32)?)
    }

    /// Variance over tokens and channels together.
    fn overall(&self) -> Result<f64> {
        let mean = scalar(&self.mean.mean_all()?)?;
        Ok((scalar(&self.square.mean_all()?)? - mean * mean).max(f64::MIN_POSITIVE))
    }
}

fn scalar(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.to_dtype(DType::F32)?.to_scalar::<f32>()?))
}

impl Loss {
    /// Normalised by what `targets` look like. `last`: nothing but image tokens is read of what comes out here.
    /// `sensitivity` is what [`sensitivity`] found, if the recipe normalises by the velocity.
    ///
    /// # Errors
    /// When the targets are NaN, infinite or all the same.
    pub fn new(
        recipe: &LossRecipe,
        targets: &[Stream],
        last: bool,
        sensitivity: Option<[Tensor; 2]>,
    ) -> Result<Self> {
        let parts = |part: fn(&Stream) -> candle::Result<Tensor>| -> Result<Moments> {
            let parts: Vec<Tensor> = targets.iter().map(part).collect::<candle::Result<_>>()?;
            Moments::new(&parts)
        };
        let (txt, img) = (parts(Stream::txt)?, parts(Stream::img)?);
        for moments in [&txt, &img] {
            ensure!(
                moments.overall()?.is_finite(),
                "the original's activations are NaN or infinite"
            );
        }
        let text = if last { 0.0 } else { recipe.text_weight };
        if let Some([txt_matrix, img_matrix]) = sensitivity {
            // an error as large as the targets' spread is 1, over both streams together
            let spread = |m: &Moments, matrix: &Tensor| -> Result<f64> {
                let diagonal =
                    (matrix * Tensor::eye(matrix.dim(0)?, DType::F32, matrix.device())?)?.sum(1)?;
                Ok(m.tokens * scalar(&(diagonal * m.variance()?)?.sum_all()?)?)
            };
            let total = spread(&img, &img_matrix)? + text * spread(&txt, &txt_matrix)?;
            let total = total.max(f64::MIN_POSITIVE);
            let form = |matrix: Tensor, m: &Moments, weight: f64| -> Result<Form> {
                if weight == 0.0 {
                    return Ok(Form::Zero);
                }
                Ok(Form::Matrix((matrix * (weight * m.tokens / total))?))
            };
            return Ok(Self {
                txt: form(txt_matrix, &txt, text)?,
                img: form(img_matrix, &img, 1.0)?,
            });
        }
        let form = |m: &Moments, weight: f64| -> Result<Form> {
            if weight == 0.0 {
                return Ok(Form::Zero);
            }
            let width = m.mean.dim(0)? as f64;
            Ok(match recipe.normalise {
                Normalise::None => Form::Same(weight / width),
                Normalise::Stream | Normalise::Velocity => {
                    Form::Same(weight / width / m.overall()?)
                }
                Normalise::Channel => {
                    // a channel that hardly varies would drown all others
                    let variance = m.variance()?;
                    let floor = 1e-3 * scalar(&variance.mean_all()?)?;
                    let variance = variance.maximum(floor as f32)?;
                    Form::Channels((variance.recip()? * (weight / width))?)
                }
                Normalise::Token => Form::Token(weight / width),
            })
        };
        Ok(Self {
            txt: form(&txt, text)?,
            img: form(&img, 1.0)?,
        })
    }

    /// The loss of `output`, mean over tokens, and its gradient with respect to the tokens, in their dtype.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn judge(&self, output: &Stream, target: &Stream) -> Result<(f64, Tensor)> {
        let txt = self.txt.judge(&output.txt_view()?, &target.txt_view()?)?;
        let img = self.img.judge(&output.img_view()?, &target.img_view()?)?;
        // read together: a GPU would be waited for each time
        let sums = Tensor::stack(&[&txt.sum, &img.sum], 0)?.to_vec1::<f32>()?;
        let loss = sums.iter().zip([txt.tokens, img.tokens]);
        let loss = loss.map(|(sum, tokens)| f64::from(*sum) / tokens).sum();
        let dtype = output.tokens.dtype();
        let grads = [txt.grad.to_dtype(dtype)?, img.grad.to_dtype(dtype)?];
        Ok((loss, Tensor::cat(&grads, 1)?))
    }
}

/// The loss of one stream, times the number of its tokens (f32, a scalar), and the gradient of their quotient.
struct Judged {
    sum: Tensor,
    tokens: f64,
    grad: Tensor,
}

impl Form {
    fn judge(&self, output: &Tensor, target: &Tensor) -> Result<Judged> {
        let tokens = (output.dim(0)? * output.dim(1)?).max(1) as f64;
        if let Self::Same(factor) = self
            && let Some(sums) = ops::token_sums(target, output)?
        {
            let sum = (ops::total(&sums.narrow(1, 1, 1)?)? * *factor)?;
            let (x, y) = (output.contiguous()?, target.contiguous()?);
            let slope = factor * 2.0 / tokens;
            let grad = ops::weighted_sum(&x, slope, &y, -slope)?;
            return Ok(Judged { sum, tokens, grad });
        }
        let (output, target) = (output.to_dtype(DType::F32)?, target.to_dtype(DType::F32)?);
        let error = (output - &target)?;
        let weighted = match self {
            Self::Zero => error.zeros_like()?,
            Self::Same(factor) => (&error * *factor)?,
            Self::Channels(weights) => error.broadcast_mul(weights)?,
            Self::Token(factor) => {
                let size = (target.sqr()?.mean_keepdim(2)? + 1e-12)?;
                (error.broadcast_div(&size)? * *factor)?
            }
            Self::Matrix(matrix) => {
                let width = matrix.dim(0)?;
                error
                    .reshape(((), width))?
                    .matmul(matrix)?
                    .reshape(error.dims())?
            }
        };
        let sum = ops::total(&(&error * &weighted)?)?;
        let grad = (weighted * (2.0 / tokens))?;
        Ok(Judged { sum, tokens, grad })
    }
}

/// How the velocity of `flux` depends on its text and image tokens before entry `from`: E\[g gᵀ\] over tokens, (width,
/// width) each, where g is the gradient of the velocity's product with a random direction.
///
/// As the weight of an error e in a loss, eᵀ E\[g gᵀ\] e is its first-order effect on the velocity, apart from what
/// tokens do together.
///
/// # Errors
/// When a pass fails.
pub fn sensitivity(
    flux: &Flux,
    from: usize,
    samples: &[(Stream, Conditioning)],
    seed: u64,
    gradient_checkpointing: bool,
) -> Result<[Tensor; 2]> {
    let mut sums: [Option<Tensor>; 2] = [None, None];
    let mut tokens = [0usize; 2];
    for (index, (stream, conditioning)) in samples.iter().enumerate() {
        let key = Key {
            seed,
            purpose: Key::DIRECTIONS,
            index: index as u64,
        };
        let judge = |output: &Stream| -> Result<(f64, Tensor)> {
            let var = Var::from_tensor(&output.tokens)?;
            let tracked = Stream {
                tokens: var.as_tensor().clone(),
                txt_len: output.txt_len,
            };
            let velocity = flux.head(&tracked, conditioning)?;
            let direction = Generator::new(key.stream().bits())
                .randn(velocity.dims(), velocity.device())?
                .to_dtype(velocity.dtype())?;
            let mut grads = ops::backward(&velocity, &direction)?;
            let grad = grads.remove(&var);
            Ok((0.0, grad.map_or_else(|| output.tokens.zeros_like(), Ok)?))
        };
        let grad = super::backward::input_gradient(
            &flux.trunk,
            from..flux.trunk.len(),
            stream,
            conditioning,
            gradient_checkpointing,
            &judge,
        )?;
        for ((sum, count), part) in sums
            .iter_mut()
            .zip(&mut tokens)
            .zip([grad.txt()?, grad.img()?])
        {
            let rows = part.flatten_to(1)?.to_dtype(DType::F32)?;
            *count += rows.dim(0)?;
            let product = rows.t()?.matmul(&rows)?;
            *sum = Some(match sum.take() {
                None => product,
                Some(sum) => (sum + product)?,
            });
        }
    }
    let mut out = Vec::new();
    for (sum, count) in sums.into_iter().zip(tokens) {
        let Some(sum) = sum else {
            anyhow::bail!("no state to measure the velocity's sensitivity on")
        };
        let mean = (sum / count.max(1) as f64)?;
        let width = mean.dim(0)?;
        let eye = Tensor::eye(width, DType::F32, mean.device())?;
        let trace = scalar(&(&mean * &eye)?.sum_all()?)? / width as f64;
        out.push((mean + (eye * (FLOOR * trace))?)?);
    }
    out.try_into()
        .map_err(|_| anyhow::anyhow!("two streams, two matrices"))
}

#[cfg(test)]
mod tests {
    use candle::Device;

    use super::*;

    fn stream(seed: u64) -> Stream {
        let tokens = Generator::new(seed).randn((3, 7, 6), &Device::Cpu).unwrap();
        Stream { tokens, txt_len: 3 }
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss_in_every_form() {
        let (output, target) = (stream(1), stream(2));
        let matrix = || {
            let x = Generator::new(3).randn((6, 6), &Device::Cpu).unwrap();
            x.t().unwrap().matmul(&x).unwrap()
        };
        for normalise in [
            Normalise::None,
            Normalise::Stream,
            Normalise::Channel,
            Normalise::Token,
            Normalise::Velocity,
        ] {
            let recipe = LossRecipe {
                normalise,
                text_weight: 0.7,
            };
            let sensitivity = (normalise == Normalise::Velocity).then(|| [matrix(), matrix()]);
            let loss =
                Loss::new(&recipe, std::slice::from_ref(&target), false, sensitivity).unwrap();
            let (_, grad) = loss.judge(&output, &target).unwrap();
            let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for entry in [0, 20, 64, 100] {
                let moved = |step: f32| {
                    let mut values = output
                        .tokens
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f32>()
                        .unwrap();
                    values[entry] += step;
                    let tokens = Tensor::from_vec(values, (3, 7, 6), &Device::Cpu).unwrap();
                    loss.judge(&Stream { tokens, txt_len: 3 }, &target)
                        .unwrap()
                        .0
                };
                let slope = (moved(0.05) - moved(-0.05)) / 0.1;
                let error = (slope - f64::from(grad[entry])).abs();
                assert!(
                    error < 1e-3 * slope.abs().max(0.01),
                    "{normalise:?}, entry {entry}: {slope} instead of {}",
                    grad[entry]
                );
            }
        }
    }

    /// In 16 bits a GPU sums the squares of errors by a kernel and writes the gradient at once.
    #[test]
    fn a_gpu_finds_the_loss_that_a_cpu_does() {
        let Ok(gpu) = Device::new_cuda(0) else {
            return crate::ui::skip("cuda");
        };
        let judged = |device: &Device, dtype: DType| {
            let place = |stream: Stream| {
                let tokens = stream.tokens.to_dtype(DType::BF16).unwrap();
                let tokens = tokens.to_dtype(dtype).unwrap().to_device(device).unwrap();
                stream.with_tokens(tokens)
            };
            let (output, target) = (place(stream(1)), place(stream(2)));
            let targets = std::slice::from_ref(&target);
            let loss = Loss::new(&LossRecipe::default(), targets, false, None).unwrap();
            let (loss, grad) = loss.judge(&output, &target).unwrap();
            let grad = grad.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            (loss, grad.to_vec1::<f32>().unwrap())
        };
        let (got, want) = (judged(&gpu, DType::BF16), judged(&Device::Cpu, DType::F32));
        assert!(
            (got.0 - want.0).abs() < 1e-5 * want.0,
            "{} instead of {}",
            got.0,
            want.0
        );
        let most = want.1.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (got, want) in got.1.iter().zip(&want.1) {
            // rounded once
            assert!((got - want).abs() <= 4e-3 * want.abs() + 1e-6 * most);
        }
    }

    #[test]
    fn text_does_not_count_where_nothing_reads_it() {
        let (output, target) = (stream(1), stream(2));
        let loss = Loss::new(
            &LossRecipe::default(),
            std::slice::from_ref(&target),
            true,
            None,
        )
        .unwrap();
        let (_, grad) = loss.judge(&output, &target).unwrap();
        let text = grad.narrow(1, 0, 3).unwrap().abs().unwrap();
        assert!(text.max_all().unwrap().to_scalar::<f32>().unwrap() < f32::MIN_POSITIVE);
    }
}
