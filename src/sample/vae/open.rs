//! Opens an autoencoder from a folder in diffusers layout or from one file, with diffusers' or original names.

use anyhow::{Context as _, Result, bail};
use candle::{DType, Device};

use super::{Vae, VaeConfig, keys};
use crate::checkpoint::{Checkpoint, with_hint};
use crate::files::{Blob, Files};

/// What to do about a file that is damaged.
const DAMAGED: &str = "fetch the file again, or name another with --vae";

impl Vae {
    /// Opens `diffusion_pytorch_model.safetensors` with `config.json`, or the only `.safetensors` file of a folder.
    ///
    /// # Errors
    /// When files are missing or damaged, or shapes contradict the config; the message names the file.
    pub fn load_folder(files: &Files, dtype: DType, device: &Device) -> Result<Self> {
        let raw = Checkpoint::open_if_present(files, "diffusion_pytorch_model");
        let raw = match with_hint(raw, DAMAGED)? {
            Some(raw) => raw,
            None => only_file(files)?,
        };
        let config = files.get("config.json")?;
        let config = config
            .map(|blob| VaeConfig::from_json(&blob))
            .transpose()
            .with_context(|| files.describe("config.json"))?;
        Self::load(&raw, config, dtype, device)
    }

    /// Opens one file, such as `ae.safetensors`; sizes come from its tensors.
    ///
    /// # Errors
    /// When it is damaged or holds no autoencoder like those of FLUX.1 and FLUX.2.
    pub fn load_file(name: &str, blob: &Blob, dtype: DType, device: &Device) -> Result<Self> {
        let raw = with_hint(Checkpoint::from_blob(name, blob), DAMAGED)?;
        Self::load(&raw, None, dtype, device)
    }

    fn load(
        raw: &Checkpoint,
        config: Option<VaeConfig>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let renamed = if keys::is_original(raw.names()) {
            let levels = keys::levels(raw.names());
            raw.rename(|name| keys::to_diffusers(name, levels))?
        } else {
            raw.clone()
        };
        let parts = [
            "encoder.",
            "decoder.",
            "quant_conv.",
            "post_quant_conv.",
            "bn.running_",
        ];
        let of_vae = |name: &&str| parts.iter().any(|part| name.starts_with(part));
        for name in renamed.names().filter(of_vae) {
            renamed.expect_floats(name)?;
        }
        let config = match config {
            Some(config) => config,
            None => keys::infer_config(|name| Some(renamed.get(name)?.shape().to_vec()))
                .with_context(|| format!("`{}`", raw.name))?,
        };
        // half-precision convolutions on the CPU are slow, and float16 overflows in this network
        let dtype = if device.is_cpu() || dtype == DType::F16 {
            DType::F32
        } else {
            dtype
        };
        let mut vae = Self::new(&config, &renamed.var_builder(dtype, device))
            .with_context(|| format!("cannot load the VAE `{}`", raw.name))?;
        vae.name.clone_from(&raw.name);
        Ok(vae)
    }
}

fn only_file(files: &Files) -> Result<Checkpoint> {
    let weights: Vec<String> = files
        .list()?
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    match weights.as_slice() {
        [one] => with_hint(
            Checkpoint::from_blob(&files.describe(one), &files.read(one)?),
            DAMAGED,
        ),
        [] => bail!(
            "`{}` holds no VAE: there is no .safetensors file",
            files.model_ref()
        ),
        many => bail!(
            "`{}` holds several .safetensors files ({}); name the VAE's",
            files.model_ref(),
            many.join(", ")
        ),
    }
}
