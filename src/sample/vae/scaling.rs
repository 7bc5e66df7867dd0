//! Between latents as the autoencoder has them and as the transformer sees them: shift and scale. Values only, f32.

use candle::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::VaeConfig;
use crate::sample::latents::{pack, unpack};

/// How latents are scaled.
#[derive(Debug)]
pub(super) enum Scaling {
    /// By two numbers of the configuration: the transformer sees `(latents - shift) · scale`.
    Numbers { shift: f64, scale: f64 },
    /// By statistics of each number of a token (2×2 latent pixels), (4 · channels,), as diffusers' `Flux2Pipeline` does it
    /// around `AutoencoderKLFlux2`: the transformer sees `(latents - mean) / deviation`.
    Statistics { mean: Tensor, deviation: Tensor },
}

impl Scaling {
    /// Statistics if the file has them (`bn.running_mean`, `bn.running_var`).
    pub(super) fn new(config: &VaeConfig, vb: &VarBuilder) -> Result<Self> {
        let vb = vb.pp("bn").to_dtype(DType::F32);
        if !vb.contains_tensor("running_mean") {
            return Ok(Self::Numbers {
                shift: config.shift_factor.unwrap_or(0.0),
                scale: config.scaling_factor,
            });
        }
        let channels = 4 * config.latent_channels;
        let variance = vb.get(channels, "running_var")?;
        Ok(Self::Statistics {
            mean: vb.get(channels, "running_mean")?,
            deviation: (variance + config.batch_norm_eps)?.sqrt()?,
        })
    }

    /// (b, channels, h, w) as the autoencoder has them → as the transformer sees them.
    pub(super) fn apply(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Numbers { shift, scale } => (latents - *shift)? * *scale,
            Self::Statistics { mean, deviation } => by_token(latents, |tokens| {
                tokens.broadcast_sub(mean)?.broadcast_div(deviation)
            }),
        }
    }

    /// The inverse of [`Self::apply`].
    pub(super) fn undo(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Numbers { shift, scale } => (latents / *scale)? + *shift,
            Self::Statistics { mean, deviation } => by_token(latents, |tokens| {
                tokens.broadcast_mul(deviation)?.broadcast_add(mean)
            }),
        }
    }
}

/// Latents (b, c, h, w) with `f` applied to their tokens (b, h/2·w/2, 4c).
fn by_token(latents: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, _, h, w) = latents.dims4()?;
    unpack(&f(&pack(latents)?)?, h, w)?.contiguous()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle::Device;

    use super::*;

    #[test]
    fn statistics_are_of_each_pixel_of_a_patch() -> Result<()> {
        let cpu = Device::Cpu;
        let config = VaeConfig {
            latent_channels: 1,
            batch_norm_eps: 0.0,
            ..VaeConfig::default()
        };
        let tensors = HashMap::from([
            (
                "bn.running_mean".to_owned(),
                Tensor::new(&[1f32, 2., 3., 4.], &cpu)?,
            ),
            (
                "bn.running_var".to_owned(),
                Tensor::new(&[1f32, 4., 9., 16.], &cpu)?,
            ),
        ]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &cpu);
        let scaling = Scaling::new(&config, &vb)?;
        // (row, column) of a patch: (0, 0), (0, 1), (1, 0), (1, 1)
        let x =
            Tensor::new(&[[2f32, 4., 1., 2.], [6., 8., 3., 4.]], &cpu)?.reshape((1, 1, 2, 4))?;
        let y = scaling.apply(&x)?;
        let expected = [[1f32, 1., 0., 0.], [1., 1., 0., 0.]];
        assert_eq!(y.reshape((2, 4))?.to_vec2::<f32>()?, expected);
        assert_eq!(
            scaling.undo(&y)?.flatten_all()?.to_vec1::<f32>()?,
            x.flatten_all()?.to_vec1::<f32>()?
        );
        Ok(())
    }
}
