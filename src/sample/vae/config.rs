//! An autoencoder's sizes and options, as `vae/config.json` says them.

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

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
    /// The same of the decoder, if they are others.
    pub decoder_block_out_channels: Option<Vec<usize>>,
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
    /// Added to the variances, in a VAE whose latents are scaled by statistics of their own.
    pub batch_norm_eps: f64,
    /// Attention at the lowest level.
    pub mid_block_add_attention: bool,
    /// A 1×1 convolution after the encoder.
    pub use_quant_conv: bool,
    /// A 1×1 convolution before the decoder.
    pub use_post_quant_conv: bool,
    pub(super) act_fn: String,
    pub(super) down_block_types: Vec<String>,
    pub(super) up_block_types: Vec<String>,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            decoder_block_out_channels: None,
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            batch_norm_eps: 1e-4,
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
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let mut json: Value = serde_json::from_slice(bytes).context("not a VAE config")?;
        if json["_class_name"] == "AutoencoderKLFlux2" {
            // defaults of that class which differ
            for (key, value) in [
                ("block_out_channels", json!([128, 256, 512, 512])),
                ("layers_per_block", json!(2)),
                ("latent_channels", json!(32)),
            ] {
                if json[key].is_null() {
                    json[key] = value;
                }
            }
        }
        let config: Self = serde_json::from_value(json).context("not a VAE config")?;
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
        ensure!(
            config.decoder_channels().len() == config.block_out_channels.len(),
            "VAE option `decoder_block_out_channels` has {} levels, `block_out_channels` {}",
            config.decoder_channels().len(),
            config.block_out_channels.len()
        );
        let sizes = config.block_out_channels.iter();
        let sizes = sizes.chain(config.decoder_channels()).copied();
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
                    .chain(config.decoder_channels())
                    .all(|c| *c > 0 && c % groups == 0),
            "VAE option `norm_num_groups` {groups} does not divide `block_out_channels` {:?}",
            config.block_out_channels
        );
        ensure!(
            config.scaling_factor.is_finite() && config.scaling_factor != 0.0,
            "VAE option `scaling_factor` must be finite and not 0"
        );
        ensure!(
            config.batch_norm_eps.is_finite() && config.batch_norm_eps >= 0.0,
            "VAE option `batch_norm_eps` must be finite and not negative"
        );
        Ok(config)
    }

    /// Channels of the decoder's levels, full size first.
    pub fn decoder_channels(&self) -> &[usize] {
        let own = self.decoder_block_out_channels.as_ref();
        own.unwrap_or(&self.block_out_channels)
    }

    /// Pixels of the image along one pixel of the latents: 8 for FLUX.1.
    pub fn downsampling(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}
