//! The autoencoder between latents and images (diffusers' `AutoencoderKL` and `AutoencoderKLFlux2`), under diffusers' tensor
//! names. Other names: `keys.rs`.

use bands::Bands;
use candle::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
pub use config::VaeConfig;
use layers::{Conv2d, Level, Mid, Norm, Turn};
pub use memory::MemoryEstimate;
use scaling::Scaling;

mod bands;
mod config;
mod conv;
pub mod keys;
mod layers;
mod memory;
mod norm;
mod open;
mod scaling;

/// An autoencoder; the encoder is there if its tensors are.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
    scaling: Scaling,
    dtype: DType,
    /// The file it was opened from, for messages.
    name: String,
}

impl Vae {
    /// Loads the decoder, and the encoder if the tensors hold one.
    pub fn new(config: &VaeConfig, vb: &VarBuilder) -> Result<Self> {
        let decoder = Decoder::new(config, vb)?;
        let encoder = vb
            .contains_tensor("encoder.conv_in.weight")
            .then(|| Encoder::new(config, vb))
            .transpose()?;
        Ok(Self {
            config: config.clone(),
            encoder,
            decoder,
            scaling: Scaling::new(config, vb)?,
            dtype: vb.dtype(),
            name: "vae".to_owned(),
        })
    }

    /// How messages name its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number format of the weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Latents as the transformer makes them (b, latent_channels, h, w) → images in about [-1, 1] (b, out_channels, 8h, 8w), in the
    /// weights' number format.
    ///
    /// # Errors
    /// When the latents have other channels.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder
            .forward(&self.unscaled(latents)?.to_dtype(self.dtype)?)
    }

    /// The same a band of `rows` rows of latents at a time, each layer after the other; what waits for its turn is kept
    /// on `offload_device`, where the image will be. Takes a little longer and gives the same image up to rounding.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_in_bands(
        &self,
        latents: &Tensor,
        rows: usize,
        offload_device: &Device,
    ) -> Result<Tensor> {
        let latents = self.unscaled(latents)?.to_dtype(self.dtype)?;
        self.decoder.in_bands(&latents, rows, offload_device)
    }

    /// Latents as the transformer makes them → as the decoder takes them, (b, latent_channels, h, w), f32.
    ///
    /// # Errors
    /// When the latents have other channels.
    pub fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        self.scaling.undo(&latents.to_dtype(DType::F32)?)
    }

    /// Images in [-1, 1] (b, in_channels, h, w), sizes divisible by [`VaeConfig::downsampling`] → the mean of their latents, as the
    /// transformer sees them (b, latent_channels, h/8, w/8), f32. The inverse of [`Self::decode`].
    ///
    /// # Errors
    /// When the size does not fit, or the file holds no encoder.
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        // as in `unscaled`: numbers of bf16 have three digits, and so would shift and scale
        self.scaling
            .apply(&self.encode_mean(image)?.to_dtype(DType::F32)?)
    }

    /// The mean of the latents' distribution without shift and scale: diffusers' `vae.encode(image).latent_dist.mean`.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_mean(&self, image: &Tensor) -> Result<Tensor> {
        let Some(encoder) = &self.encoder else {
            bail!("this VAE file holds no encoder (`encoder.conv_in.weight` is missing)")
        };
        let (_, _, h, w) = image.dims4()?;
        let step = self.config.downsampling();
        if h % step != 0 || w % step != 0 || h * w == 0 {
            bail!("the VAE cannot encode an image of {w}×{h}: both must be multiples of {step}")
        }
        let moments = encoder.forward(&image.to_dtype(self.dtype)?)?;
        moments
            .narrow(1, 0, self.config.latent_channels)?
            .contiguous()
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    mid: Mid,
    norm_out: Norm,
    conv_out: Conv2d,
    quant: Option<Conv2d>,
}

impl Encoder {
    fn new(config: &VaeConfig, vb: &VarBuilder) -> Result<Self> {
        let channels = &config.block_out_channels;
        let groups = config.norm_num_groups;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let moments = 2 * config.latent_channels;
        let root = vb.pp("encoder");
        let mut levels = Vec::new();
        let mut input = first;
        for (i, &output) in channels.iter().enumerate() {
            let turn = (i + 1 < channels.len()).then_some(Turn::Down);
            levels.push(Level::new(
                input,
                output,
                config.layers_per_block,
                groups,
                turn,
                &root.pp("down_blocks").pp(i),
            )?);
            input = output;
        }
        Ok(Self {
            conv_in: Conv2d::new(config.in_channels, first, 3, &root.pp("conv_in"))?,
            levels,
            mid: Mid::new(
                last,
                groups,
                config.mid_block_add_attention,
                &root.pp("mid_block"),
            )?,
            norm_out: Norm::new(last, groups, true, &root.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(last, moments, 3, &root.pp("conv_out"))?,
            quant: config
                .use_quant_conv
                .then(|| Conv2d::new(moments, moments, 1, &vb.pp("quant_conv")))
                .transpose()?,
        })
    }

    fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        let x = self
            .conv_out
            .forward(&self.norm_out.forward(&self.mid.forward(&x)?)?)?;
        self.quant
            .as_ref()
            .map_or(Ok(x.clone()), |quant| quant.forward(&x))
    }
}

#[derive(Debug)]
struct Decoder {
    post_quant: Option<Conv2d>,
    conv_in: Conv2d,
    mid: Mid,
    levels: Vec<Level>,
    norm_out: Norm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(config: &VaeConfig, vb: &VarBuilder) -> Result<Self> {
        let channels = config.decoder_channels();
        let groups = config.norm_num_groups;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let latent = config.latent_channels;
        let root = vb.pp("decoder");
        let mut levels = Vec::new();
        let mut input = last;
        for (i, &output) in channels.iter().rev().enumerate() {
            let turn = (i + 1 < channels.len()).then_some(Turn::Up);
            levels.push(Level::new(
                input,
                output,
                config.layers_per_block + 1,
                groups,
                turn,
                &root.pp("up_blocks").pp(i),
            )?);
            input = output;
        }
        Ok(Self {
            post_quant: config
                .use_post_quant_conv
                .then(|| Conv2d::new(latent, latent, 1, &vb.pp("post_quant_conv")))
                .transpose()?,
            conv_in: Conv2d::new(latent, last, 3, &root.pp("conv_in"))?,
            mid: Mid::new(
                last,
                groups,
                config.mid_block_add_attention,
                &root.pp("mid_block"),
            )?,
            levels,
            norm_out: Norm::new(first, groups, true, &root.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(first, config.out_channels, 3, &root.pp("conv_out"))?,
        })
    }

    /// The lowest level, whose attention is of every pixel to every pixel.
    fn lowest(&self, latents: &Tensor) -> Result<Tensor> {
        let x = self
            .post_quant
            .as_ref()
            .map_or(Ok(latents.clone()), |conv| conv.forward(latents))?;
        self.mid.forward(&self.conv_in.forward(&x)?)
    }

    fn in_bands(&self, latents: &Tensor, rows: usize, offload_device: &Device) -> Result<Tensor> {
        let mut x = Bands::cut(&self.lowest(latents)?, rows, offload_device)?;
        for level in &self.levels {
            x = x.level(level)?;
        }
        x.finish(&self.norm_out, &self.conv_out)
    }

    fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.lowest(latents)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        self.conv_out.forward(&self.norm_out.forward(&x)?)
    }
}
