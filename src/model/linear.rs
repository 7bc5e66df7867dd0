//! The only projection type: a weight, dense or quantized, with an optional LoRA.
//! Knows no names; the blocks know which projection is where.

use candle::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::ops;
use super::weight::Weight;
use crate::layout::Activation;

/// `x·Wᵀ + scale·(x·Aᵀ)·Bᵀ + bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    lora: Option<Lora>,
}

/// A low-rank addition `scale·B·A` to a weight. May be of a wider dtype than the weight (f32 on bf16): the input is
/// converted for its product and the result converted back.
#[derive(Clone, Debug)]
pub struct Lora {
    /// (rank, in)
    pub a: Tensor,
    /// (out, rank)
    pub b: Tensor,
    /// alpha / rank
    pub scale: f64,
}

impl Lora {
    /// The same factors outside of any gradient graph, sharing their storage.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self {
            a: self.a.detach(),
            b: self.b.detach(),
            scale: self.scale,
        }
    }
}

impl Linear {
    /// From `weight` (out, in) and `bias` (out,). Either may be a `Var`'s tensor, of a wider dtype than the activations.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::from_weight(Weight::Dense(weight), bias)
    }

    fn from_weight(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let (output, input) = weight.shape()?;
        if let Some(bias) = &bias
            && bias.dims() != [output]
        {
            candle::bail!(
                "a bias of shape {:?} for a weight of shape {:?}",
                bias.shape(),
                [output, input]
            );
        }
        Ok(Self {
            weight,
            bias,
            lora: None,
        })
    }

    /// Reads `weight` (output, input) and, with `bias`, `bias` (output,); a quantized weight stays quantized.
    pub fn load(input: usize, output: usize, bias: bool, vb: &VarBuilder) -> Result<Self> {
        let bias = bias.then(|| vb.get(output, "bias")).transpose()?;
        Self::from_weight(Weight::load(output, input, vb)?, bias)
    }

    /// (out, in); dequantized again at every call if it is quantized.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.dense()
    }

    /// (out, in)
    pub fn shape(&self) -> Result<(usize, usize)> {
        self.weight.shape()
    }

    /// Where the weight is.
    pub fn device(&self) -> Device {
        self.weight.device()
    }

    /// (out,)
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The LoRA, if one is attached.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// Attaches a LoRA, or takes it off.
    pub fn set_lora(&mut self, lora: Option<Lora>) -> Result<()> {
        if let Some(Lora { a, b, .. }) = &lora {
            let (output, input) = self.weight.shape()?;
            let rank = a.dim(0)?;
            if a.dims() != [rank, input] || b.dims() != [output, rank] {
                candle::bail!(
                    "a LoRA with A {:?} and B {:?} does not fit a weight of shape {:?}",
                    a.shape(),
                    b.shape(),
                    [output, input]
                );
            }
        }
        self.lora = lora;
        Ok(())
    }

    /// The same projection outside of any gradient graph, sharing the storage of its tensors.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self {
            weight: self.weight.detached(),
            bias: self.bias.as_ref().map(Tensor::detach),
            lora: self.lora.as_ref().map(Lora::detached),
        }
    }

    /// The same projection with its tensors on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let lora = self.lora.as_ref().map(|lora| -> Result<Lora> {
            Ok(Lora {
                a: lora.a.to_device(device)?,
                b: lora.b.to_device(device)?,
                scale: lora.scale,
            })
        });
        let bias = self.bias.as_ref().map(|bias| bias.to_device(device));
        Ok(Self {
            weight: self.weight.to_device(device)?,
            bias: bias.transpose()?,
            lora: lora.transpose()?,
        })
    }

    /// The product without the bias, for the operation that folds it in: `x` (…, in) to (…, out), in the dtype of `x`.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (output, input) = self.weight.shape()?;
        if x.rank() < 2 || x.dim(D::Minus1)? != input {
            candle::bail!(
                "an input of shape {:?} for a weight of shape {:?}",
                x.shape(),
                [output, input]
            );
        }
        let low_rank = self.lora.as_ref().map(|l| (&l.a, &l.b, l.scale));
        ops::product(x, &self.weight.dense()?, low_rank)
    }

    /// `gelu` of the product and the bias: `x` (batch, tokens, in) to (batch, tokens, out).
    fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        // kernels on other devices and in training do not join, and asking would dequantize a weight once more
        if self.lora.is_none()
            && x.device().is_cpu()
            && !x.track_op()
            && let Some(y) = ops::gelu_of_product(x, &self.weight.dense()?, self.bias())?
        {
            return Ok(y);
        }
        ops::gelu(&self.product(x)?, self.bias(), None)
    }

    /// The first half of an MLP, `activation(x·Wᵀ + b)`: `x` (batch, tokens, in) to (batch, tokens, out), or out / 2 if
    /// the activation takes halves.
    pub fn activated(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        match activation {
            Activation::Gelu => self.gelu(x),
            Activation::SwiGlu => ops::swiglu(&self.forward(x)?, None),
        }
    }

    /// The product with the bias, for places where nothing follows that could fold it in.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::biased(&self.product(x)?, self.bias())
    }

    /// The same map without LoRA: `W + scale·B·A`, summed in f32 and rounded to the weight's dtype once.
    pub fn merge(&self) -> Result<Self> {
        let dense = self.weight.dense()?;
        let weight = match &self.lora {
            None => dense,
            Some(Lora { a, b, scale }) => {
                let wide = if dense.dtype() == DType::F64 {
                    DType::F64
                } else {
                    DType::F32
                };
                let delta = (b.to_dtype(wide)?.matmul(&a.to_dtype(wide)?)? * *scale)?;
                (dense.to_dtype(wide)? + delta)?.to_dtype(dense.dtype())?
            }
        };
        Self::new(weight, self.bias.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    fn with_lora(dtype: DType) -> Result<Linear> {
        let mut linear = Linear::new(
            random("w", (24, 16))?.to_dtype(dtype)?,
            Some(random("b", 24)?.to_dtype(dtype)?),
        )?;
        linear.set_lora(Some(Lora {
            a: random("a", (3, 16))?,
            b: random("c", (24, 3))?,
            scale: 0.5,
        }))?;
        Ok(linear)
    }

    #[test]
    fn merged_weights_give_the_same_output() -> Result<()> {
        let linear = with_lora(DType::F32)?;
        for shape in [vec![2, 5, 16], vec![4, 16]] {
            let x = random("x", shape)?;
            let plain = Linear::new(linear.weight()?, linear.bias.clone())?;
            close(&linear.merge()?.forward(&x)?, &linear.forward(&x)?, 1e-6)?;
            assert!(
                close(&plain.forward(&x)?, &linear.forward(&x)?, 1e-2).is_err(),
                "the LoRA had no effect"
            );
        }
        Ok(())
    }

    #[test]
    fn an_f32_lora_works_on_bf16_weights() -> Result<()> {
        let (narrow, wide) = (with_lora(DType::BF16)?, with_lora(DType::F32)?);
        let x = random("x", (2, 5, 16))?;
        let y = narrow.forward(&x.to_dtype(DType::BF16)?)?;
        assert_eq!(y.dtype(), DType::BF16);
        close(&y, &wide.forward(&x)?, 1e-2)
    }

    #[test]
    fn views_are_taken_as_they_are_seen() -> Result<()> {
        let (linear, x) = (with_lora(DType::F32)?, random("x", (3, 7, 16))?);
        let view = x.narrow(1, 2, 4)?;
        close(
            &linear.forward(&view)?,
            &linear.forward(&x)?.narrow(1, 2, 4)?,
            1e-6,
        )
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let mut linear = with_lora(DType::F32)?;
        assert!(linear.product(&random("x", (2, 15))?).is_err());
        assert!(Linear::new(random("w", (4, 3))?, Some(random("b", 3)?)).is_err());
        let lora = Lora {
            a: random("a", (3, 24))?,
            b: random("b", (16, 3))?,
            scale: 1.0,
        };
        assert!(linear.set_lora(Some(lora)).is_err());
        Ok(())
    }
}
