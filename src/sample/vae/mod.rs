//! The autoencoder between latents and images (diffusers' `AutoencoderKL`), under diffusers' tensor names. Other names: `keys.rs`.

use anyhow::{Context as _, ensure};
use candle::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::Deserialize;

use bands::Bands;
use layers::{Conv2d, Level, Mid, Norm, Turn};
pub use memory::MemoryEstimate;

mod bands;
mod conv;
pub mod keys;
mod layers;
mod memory;
mod norm;
mod open;

/// `vae/config.json`; what is missing there has the value that diffusers' class gives it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of the image that goes in.
    pub in_channels: usize,
    /// Channels of the image that comes out.
    pub out_channels: usize,
    /// Channels of each level, full size first; each further level halves the size.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each encoder level; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// The transformer sees `(latents - shift_factor) · scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`; absent is 0.
    pub shift_factor: Option<f64>,
    /// Attention at the lowest level.
    pub mid_block_add_attention: bool,
    /// A 1×1 convolution after the encoder.
    pub use_quant_conv: bool,
    /// A 1×1 convolution before the decoder.
    pub use_post_quant_conv: bool,
    act_fn: String,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            act_fn: "silu".into(),
            down_block_types: Vec::new(),
            up_block_types: Vec::new(),
        }
    }
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    pub fn from_json(bytes: &[u8]) -> anyhow::Result<Self> {
        let config: Self = serde_json::from_slice(bytes).context("not a VAE config")?;
        ensure!(
            config.act_fn == "silu",
            "VAE option `act_fn` is `{}`; only `silu` is supported",
            config.act_fn
        );
        let blocks = [
            (
                "down_block_types",
                &config.down_block_types,
                "DownEncoderBlock2D",
            ),
            ("up_block_types", &config.up_block_types, "UpDecoderBlock2D"),
        ];
        for (name, blocks, supported) in blocks {
            if let Some(other) = blocks.iter().find(|block| *block != supported) {
                anyhow::bail!(
                    "VAE option `{name}` names `{other}`; only `{supported}` is supported"
                );
            }
        }
        ensure!(
            (1..=8).contains(&config.block_out_channels.len()),
            "VAE option `block_out_channels` has {} levels, expected 1 to 8",
            config.block_out_channels.len()
        );
        let sizes = config.block_out_channels.iter().copied();
        let sizes = sizes.map(|channels| ("block_out_channels", channels, 1 << 16));
        for (field, value, most) in sizes.chain([
            ("layers_per_block", config.layers_per_block, 64),
            ("latent_channels", config.latent_channels, 1 << 12),
        ]) {
            ensure!(
                (1..=most).contains(&value),
                "VAE option `{field}` says {value}, expected a number from 1 to {most}"
            );
        }
        let groups = config.norm_num_groups;
        ensure!(
            groups > 0
                && config
                    .block_out_channels
                    .iter()
                    .all(|c| *c > 0 && c % groups == 0),
            "VAE option `norm_num_groups` {groups} does not divide `block_out_channels` {:?}",
            config.block_out_channels
        );
        ensure!(
            config.scaling_factor.is_finite() && config.scaling_factor != 0.0,
            "VAE option `scaling_factor` must be finite and not 0"
        );
        Ok(config)
    }

    /// Pixels of the image along one pixel of the latents: 8 for FLUX.1.
    pub fn downsampling(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// An autoencoder; the encoder is there if its tensors are.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    encoder: Option<Encoder>,
    decoder: Decoder,
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
        self.decoder.forward(&self.unscaled(latents)?)
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
        self.decoder
            .in_bands(&self.unscaled(latents)?, rows, offload_device)
    }

    fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        let latents = latents.to_dtype(DType::F32)?;
        let latents =
            ((latents / self.config.scaling_factor)? + self.config.shift_factor.unwrap_or(0.0))?;
        latents.to_dtype(self.dtype)
    }

    /// Images in [-1, 1] (b, in_channels, h, w), sizes divisible by [`VaeConfig::downsampling`] → the mean of their latents, as the
    /// transformer sees them (b, latent_channels, h/8, w/8), f32. The inverse of [`Self::decode`].
    ///
    /// # Errors
    /// When the size does not fit, or the file holds no encoder.
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        // as in `unscaled`: numbers of bf16 have three digits, and so would shift and scale
        let mean = self.encode_mean(image)?.to_dtype(DType::F32)?;
        (mean - self.config.shift_factor.unwrap_or(0.0))? * self.config.scaling_factor
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
        let channels = &config.block_out_channels;
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
